"""The rounding of each precision in torch, so that a trial is evaluated as what would be deployed.

Shapes in this file:
    O  outputs of a layer, I  its inputs
    G  groups of inputs that share a scale, S  inputs in a group
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.quantize.base import Precision
from mmcompress.registry import PRECISIONS, resolve_entry

BYTE_LEVELS = 255
"""Steps of an unsigned byte."""

SIGNED_BYTE_LEVELS = 127
"""Largest magnitude of a signed byte that is used."""

MIN_SCALE = 1e-12
"""Least step of a grid: what is all zeros has none."""

PROJECTION_NAMES = ("proj", "text_projection")
"""Last names of matrices that open_clip multiplies with itself, without a linear layer."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """How a precision rounds what a matrix product reads."""

    round_weight: Callable[[Tensor, Precision], Tensor]
    """Round a weight [o, i] as it is stored."""
    round_input: Callable[[Tensor, Precision], Tensor] | None = None
    """Round an input [..., i]. None: it stays a float."""


def round_signed_channels(weight_OI: Tensor, precision: Precision) -> Tensor:
    """Round weights to signed integers with a scale for each output channel."""
    magnitude_O1 = weight_OI.abs().amax(1, keepdim=True)
    scale_O1 = magnitude_O1.clamp(min=MIN_SCALE) / precision.levels
    return (weight_OI / scale_O1).round() * scale_O1


def round_unsigned_channels(weight_OI: Tensor, precision: Precision) -> Tensor:
    """Round weights to unsigned bytes with a scale and a zero for each output channel."""
    lowest_O1 = weight_OI.amin(1, keepdim=True)
    highest_O1 = weight_OI.amax(1, keepdim=True)
    return _round_between(weight_OI, lowest_O1, highest=highest_O1)


def round_weight_groups(weight_OI: Tensor, precision: Precision) -> Tensor:
    """Round weights to signed integers with a scale for each group, as MatMulNBits does."""
    rows, columns = weight_OI.shape
    padding = -columns % precision.group_size
    padded_weight = F.pad(weight_OI, (0, padding))
    weight_OGS = padded_weight.view(rows, -1, precision.group_size)
    # The largest weight of a group, with its sign, becomes the lowest level: there is one more
    # level below zero than above.
    largest_index = weight_OGS.abs().argmax(2, keepdim=True)
    largest_OG1 = weight_OGS.gather(2, largest_index)
    lowest_level = -precision.levels - 1
    scale_OG1 = largest_OG1 / lowest_level
    scale_OG1 = torch.where(largest_OG1 == 0, torch.ones_like(scale_OG1), scale_OG1)
    levels_OGS = (weight_OGS / scale_OG1).round().clamp(lowest_level, precision.levels)
    rounded_values = (levels_OGS * scale_OG1).view(rows, -1)
    return rounded_values[:, :columns]


def round_to_float16(weight_OI: Tensor, precision: Precision) -> Tensor:
    """Round weights to floats of 16 bits with 5 bits of exponent."""
    return weight_OI.to(torch.float16).float()


def round_to_bfloat16(weight_OI: Tensor, precision: Precision) -> Tensor:
    """Round weights to floats of 16 bits with 8 bits of exponent."""
    return weight_OI.to(torch.bfloat16).float()


def round_to_bytes(x: Tensor, precision: Precision) -> Tensor:
    """Round an input to unsigned bytes over its whole range, as DynamicQuantizeLinear does."""
    return _round_between(x, x.min(), highest=x.max())


def round_input_groups(x: Tensor, precision: Precision) -> Tensor:
    """Round an input [..., i] to signed bytes with a scale for each group of inputs.

    MatMulNBits does so at accuracy level 4.
    """
    inputs = x.shape[-1]
    padding = -inputs % precision.group_size
    groups: Tensor = F.pad(x, (0, padding)).unflatten(-1, (-1, precision.group_size))
    magnitude = groups.abs().amax(-1, keepdim=True)
    scale = (magnitude / SIGNED_BYTE_LEVELS).clamp(min=MIN_SCALE)
    rounded_values = (groups / scale).round() * scale
    return rounded_values.flatten(-2)[..., :inputs]


def _round_between(x: Tensor, lowest: Tensor, *, highest: Tensor) -> Tensor:
    """Round to unsigned bytes between two values; zero stays exact."""
    lowest = lowest.clamp(max=0)
    highest = highest.clamp(min=0)
    scale = ((highest - lowest) / BYTE_LEVELS).clamp(min=MIN_SCALE)
    zero = (-lowest / scale).round()
    levels = ((x / scale).round() + zero).clamp(0, BYTE_LEVELS)
    return (levels - zero) * scale


SIGNED_CHANNELS = Simulation(round_weight=round_signed_channels, round_input=round_to_bytes)
"""int8, int8_full, int8_static. A static range is taken to be that of the batch."""

UNSIGNED_CHANNELS = Simulation(round_weight=round_unsigned_channels, round_input=round_to_bytes)
"""uint8."""

GROUPS = Simulation(round_weight=round_weight_groups, round_input=round_input_groups)
"""w8, w4."""

FLOAT16 = Simulation(round_weight=round_to_float16)
"""fp16. Activations are rounded too when it is deployed, but far less than weights."""

BFLOAT16 = Simulation(round_weight=round_to_bfloat16)
"""bf16."""


@contextmanager
def simulate_precision(
    model: nn.Module,
    precision: str = "int8",
    *,
    fp32_layers: Container[nn.Module] = (),
    selected_layers: Container[nn.Module] | None = None,
) -> Iterator[None]:
    """Run a model inside the context as if its linear layers were deployed in a precision.

    Args:
        model: The model; its weights are as before when the context ends.
        precision: The name of a precision.
        fp32_layers: Layers that are not rounded.
        selected_layers: The layers that are rounded; by default all linear layers and projections.
    """
    scheme: Precision = PRECISIONS.get(precision)
    if scheme.simulation is None:
        yield
        return
    simulation: Simulation = resolve_entry(scheme.simulation)
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            is_chosen = selected_layers is None or module in selected_layers
            if isinstance(module, nn.Linear) and is_chosen and module not in fp32_layers:
                stack.enter_context(_round_layer(module, simulation, precision=scheme))
        if selected_layers is None:
            for projection in _list_projections(model):
                stack.enter_context(_round_projection(projection, simulation, precision=scheme))
        yield


@contextmanager
def _round_layer(
    layer: nn.Linear, simulation: Simulation, *, precision: Precision
) -> Iterator[None]:
    """Round the weight of a layer and what it reads inside the context."""
    weight_OI = layer.weight.data
    layer.weight.data = simulation.round_weight(weight_OI, precision)
    handle = None
    if simulation.round_input is not None:
        hook = _make_input_hook(simulation.round_input, precision)
        handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        layer.weight.data = weight_OI


def _make_input_hook(
    round_input: Callable[[Tensor, Precision], Tensor], precision: Precision
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Make a forward pre-hook that rounds the first input of a module."""

    def round_first_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rounded_values = round_input(inputs[0], precision)
        return (rounded_values, *inputs[1:])

    return round_first_input


@contextmanager
def _round_projection(
    projection: nn.Parameter, simulation: Simulation, *, precision: Precision
) -> Iterator[None]:
    """Round a matrix [i, o] that is multiplied as it is, inside the context."""
    matrix_IO = projection.data
    rounded_OI = simulation.round_weight(matrix_IO.T, precision)
    projection.data = rounded_OI.T
    try:
        yield
    finally:
        projection.data = matrix_IO


def _list_projections(model: nn.Module) -> list[nn.Parameter]:
    """Return the matrices of a model that are multiplied without a linear layer."""
    projections: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        last_name = name.rsplit(".", 1)[-1]
        if parameter.ndim == 2 and last_name in PROJECTION_NAMES:
            projections.append(parameter)
    return projections
