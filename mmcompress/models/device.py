"""Where torch computes: on the processor, or on an accelerator (`compute` in a spec).

Importance, sensitivity, refit, trials, training and the loss of torch models run there. Exports and
proofs run on the processor, whatever device trains: they need double precision and ONNX Runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmcompress.errors import SpecError
from mmcompress.models.base import Model
from mmcompress.spec.schema import Compute

CPU = torch.device("cpu")
"""The processor."""


def choose_device(name: str) -> torch.device:
    """Return the device behind `compute.device`.

    Args:
        name: `auto`, or the kind of device. `auto` takes an accelerator where torch finds one.

    Raises:
        SpecError: Torch finds no such device.
    """
    found_kinds = ["cpu"]
    if torch.cuda.is_available():
        found_kinds.append("cuda")
    if torch.backends.mps.is_available():
        found_kinds.append("mps")
    kind = found_kinds[-1] if name == "auto" else name
    if kind not in found_kinds:
        raise SpecError(
            f"compute.device: torch finds no '{kind}' on this machine "
            f"(it finds: {', '.join(found_kinds)}); 'auto' takes the best one"
        )
    return torch.device(kind)


def forbid_tf32() -> None:
    """Let an Nvidia GPU compute products of float32 in float32.

    By default, convolutions round their inputs to 10 bits of mantissa there.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def find_device(models: Mapping[str, Model]) -> torch.device:
    """Return the device that some models are on; the processor for models without weights."""
    for model in models.values():
        return get_device(model)
    return CPU


def get_device(module: nn.Module) -> torch.device:
    """Return the device that the weights of a module are on; the processor without weights."""
    for parameter in module.parameters():
        return parameter.device
    return CPU


def place_models(models: Mapping[str, Model], compute: Compute) -> dict[str, Model]:
    """Return models on the device that a spec computes on.

    Args:
        models: Models by node, as they were loaded.
        compute: The section `compute` of the spec. In `fp32`, a GPU is kept from rounding to TF32.

    Raises:
        SpecError: Torch finds no such device.
    """
    device = choose_device(compute.device)
    if compute.precision == "fp32":
        forbid_tf32()
    return {name: copy_to_device(model, device) for name, model in models.items()}


def free_memory(device: torch.device) -> None:
    """Give memory back that torch keeps for later, after it ran out on a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def copy_to_device(model: Model, device: torch.device) -> Model:
    """Return a model on a device: itself where it is there already, else a copy.

    A loader may hand out the same model again, so it is not moved.
    """
    if get_device(model) == device:
        return model
    return copy.deepcopy(model).to(device)


def make_double(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision, on the processor where its device has none."""
    if tensor.device.type == "mps":
        tensor = tensor.to(CPU)
    return tensor.double()
