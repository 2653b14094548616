"""Dynamic int8: weights quantized ahead, per output channel; activations per tensor at run time.

Weights keep 7 bits (`reduce_range`): without VNNI the 8-bit products of AVX2 saturate in 16 bits and results are
silently wrong. The same rounding is simulated in torch, so that a trial is judged on what would be deployed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

LEVELS = 63
"""Largest magnitude of a 7-bit symmetric weight."""


def quantize(model: object, target: Path) -> Path:
    """Write the int8 version of an ONNX model (a path or a `ModelProto`)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it asks for pre-processing that changes nothing here
    quantize_dynamic(
        str(model) if isinstance(model, Path) else model,
        str(target),
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
    )
    return target


def fake_weight(w: Tensor) -> Tensor:
    """A weight [o, i] rounded as `quantize` rounds it."""
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / LEVELS
    return (w / scale).round() * scale


def fake_activation(x: Tensor) -> Tensor:
    """x rounded to 8 asymmetric bits over its range, as DynamicQuantizeLinear does."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


@contextmanager
def simulated(model: nn.Module) -> Iterator[None]:
    """Run `model` as if its linear layers were int8."""
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.data
                module.weight.data = fake_weight(weight)
                stack.callback(setattr, module.weight, "data", weight)
                handle = module.register_forward_pre_hook(lambda m, args: (fake_activation(args[0]), *args[1:]))
                stack.callback(handle.remove)
        for name, matrix in model.named_parameters():  # open_clip's projections: x @ p, not a linear layer
            if matrix.ndim == 2 and name.rsplit(".", 1)[-1] in ("proj", "text_projection"):
                whole = matrix.data
                matrix.data = fake_weight(whole.T).T
                stack.callback(setattr, matrix, "data", whole)
        yield
