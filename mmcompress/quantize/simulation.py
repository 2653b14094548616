"""The rounding of each precision in torch, so that a trial is judged on what would be deployed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.quantize.base import INT8, Precision
from mmcompress.registry import PRECISIONS


def round_weight(w: Tensor, p: Precision = INT8) -> Tensor:
    """A weight [o, i] rounded as it is stored."""
    if p.bits == 16:
        return w.to(torch.float16 if p.exponent == 5 else torch.bfloat16).float()
    if p.group:
        rows, columns = w.shape
        padded = F.pad(w, (0, -columns % p.group)).view(rows, -1, p.group)
        # a group's largest weight, sign and all, becomes the lowest level, of which there is one
        # more
        top = padded.gather(2, padded.abs().argmax(2, keepdim=True))
        scale = torch.where(top == 0, torch.ones_like(top), -top / (p.levels + 1))
        return ((padded / scale).round().clamp(-p.levels - 1, p.levels) * scale).view(rows, -1)[
            :, :columns
        ]
    if p.levels:
        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / p.levels
        return (w / scale).round() * scale
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((w / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def round_activation(x: Tensor) -> Tensor:
    """x rounded to 8 asymmetric bits over its range, as DynamicQuantizeLinear does."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def round_groups(x: Tensor, size: int) -> Tensor:
    """x [..., i] rounded to 8 symmetric bits over every `size` inputs, as MatMulNBits does at
    accuracy level 4."""
    padded = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    scale = (padded.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return ((padded / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]


@contextmanager
def simulate_precision(
    model: nn.Module,
    precision: str = "int8",
    *,
    spared: Container[nn.Module] = (),
    only: Container[nn.Module] | None = None,
) -> Iterator[None]:
    """Run `model` as if its linear layers were of a precision; a static range is taken to be that
    of the batch.

    `spared`: layers that are not rounded; `only`: if given, nothing but these is.
    """
    p: Precision | None = PRECISIONS.get(precision)
    if p is None:
        yield
        return
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if (
                isinstance(module, nn.Linear)
                and module not in spared
                and (only is None or module in only)
            ):
                weight = module.weight.data
                module.weight.data = round_weight(weight, p)
                stack.callback(setattr, module.weight, "data", weight)
                if p.activations != "none":
                    rounded = (
                        partial(round_groups, size=p.group)
                        if p.activations == "grouped"
                        else round_activation
                    )
                    handle = module.register_forward_pre_hook(
                        lambda m, args, r=rounded: (r(args[0]), *args[1:])
                    )
                    stack.callback(handle.remove)
        for name, matrix in (
            model.named_parameters() if only is None else ()
        ):  # open_clip's projections: x @ p, no linear layer
            if matrix.ndim == 2 and name.rsplit(".", 1)[-1] in ("proj", "text_projection"):
                whole = matrix.data
                matrix.data = round_weight(whole.T, p).T
                stack.callback(setattr, matrix, "data", whole)
        yield
