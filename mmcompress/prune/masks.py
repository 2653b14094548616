"""Units switched off by masks, which change no weights: surgery is proved against them.

Shapes in this file:
    B  samples of a batch, or their rows    F  features: units times the width of a unit
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block, Writer
from mmcompress.models.base import Model, TokenSelector
from mmcompress.models.device import CPU


@contextmanager
def transform_inputs(
    model: Model, paths: Iterable[str], *, transform: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the first input of some modules by `transform(input)` inside the context.

    Args:
        model: The model; it is as before when the context ends.
        paths: Its modules.
        transform: Makes the new input of the old one.
    """

    def transform_first_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first_input = transform(inputs[0])
        return (first_input, *inputs[1:])

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            handle = module.register_forward_pre_hook(transform_first_input)
            stack.callback(handle.remove)
        yield


@contextmanager
def mask_units(model: Model, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a model with its units scaled by masks inside the context.

    Args:
        model: The model; its weights are not changed.
        masks: Mask by name of the block: [units] for all samples, or a row for each one [b, units].
    """
    with ExitStack() as stack:
        for block_name, mask in masks.items():
            block = model.get_block(block_name)
            if block.group == "tokens":
                stack.enter_context(_mask_positions(model, block, mask=mask))
            else:
                stack.enter_context(_mask_features(model, block, mask=mask))
        yield


@contextmanager
def _mask_features(model: Model, block: Block, *, mask: Tensor) -> Iterator[None]:
    """Scale the units of a block where its readers read them."""

    def scale_units(x: Tensor) -> Tensor:
        return x * expand_mask(mask, block, reference=x)

    paths = (block.reader, *block.extra_readers)
    with transform_inputs(model, paths, transform=scale_units):
        yield


@contextmanager
def _mask_positions(model: Model, block: Block, *, mask: Tensor) -> Iterator[None]:
    """Leave out the positions where a mask [units] is 0, or scale them by a row a sample."""
    selector = model.get_submodule(block.reader)
    assert isinstance(selector, TokenSelector)

    def mask_output(module: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        if mask.ndim == 1:
            sequence = x[:, : selector.extra + selector.count]
            positions = mask.nonzero().flatten()
            return selector.select_positions(sequence, positions)
        # Leading positions, such as a class token, always stay.
        leading_count = x.shape[1] - mask.shape[1]
        leading_ones = mask.new_ones(len(mask), leading_count)
        scales = torch.cat([leading_ones, mask], 1)
        return x * scales[..., None]

    handle = selector.register_forward_hook(mask_output)
    try:
        yield
    finally:
        handle.remove()


def expand_mask(mask: Tensor, block: Block, *, reference: Tensor) -> Tensor:
    """Expand a mask of units to one that multiplies what a block's reader reads.

    Args:
        mask: [units] for all samples, or a row for each one [b, units].
        block: The block.
        reference: What is multiplied: [b, ..., f], or [b, f, h, w] of a convolution. It may hold
            several texts for each sample.
    """
    features_F = mask.repeat_interleave(block.width, -1)
    # A sample may hold several texts; `like` then has a row for each of them.
    if mask.ndim == 2 and len(reference) != len(mask):
        texts_per_sample = len(reference) // len(mask)
        features_F = features_F.repeat_interleave(texts_per_sample, 0)
    # A convolution has its features on the second axis, all other layers on the last one.
    if reference.ndim == 4:
        return features_F[..., None, None]
    if mask.ndim == 1:
        return features_F
    middle_axes = [1] * (reference.ndim - 2)
    return features_F.view([len(features_F), *middle_axes, -1])


def sample_units(block: Block, count: int, *, generator: torch.Generator) -> Tensor:
    """Draw some units of a block at random; the first ones where only a prefix may stay.

    Args:
        block: The block.
        count: Units to draw.
        generator: Where chance comes from.

    Returns:
        Their indices [count], ascending.
    """
    if block.prefix_only:
        return torch.arange(count, device=CPU)
    order = torch.randperm(block.units, generator=generator, device=CPU)
    return torch.sort(order[:count]).values


def list_feature_indices(block: Block, units: Tensor) -> Tensor:
    """Return the indices of the features of some units."""
    return _list_spans(units, block.width)


def list_writer_rows(block: Block, writer: Writer, *, units: Tensor) -> Tensor:
    """Return the rows of a writer that write some units, part by part.

    Args:
        block: The block.
        writer: One of its writers.
        units: Indices of the units [units].

    Returns:
        Indices [parts * units * width].
    """
    first_part_rows = _list_spans(units, writer.width)
    rows_per_part = block.units * writer.width
    rows: list[Tensor] = []
    for i in range(writer.parts):
        rows.append(first_part_rows + i * rows_per_part)
    return torch.cat(rows)


def _list_spans(units: Tensor, width: int) -> Tensor:
    """Return the indices that units of a width cover."""
    first_indices = units[:, None] * width
    spans = first_indices + torch.arange(width, device=units.device)
    return spans.flatten()


def get_weight(model: Model, path: str) -> Tensor:
    """Return the weight of the linear layer or convolution at a path, without its gradient."""
    weight = model.get_submodule(path).weight
    assert isinstance(weight, Tensor), path
    return weight.detach()


def measure_reader_norms(model: Model, block: Block) -> Tensor:
    """Return the squared norm of the weights that read each feature of a block [f]."""
    squares = get_weight(model, block.reader).square()
    # Inputs are the second axis; behind it lie the places of a convolution's kernel.
    squares_by_feature = squares.transpose(0, 1).flatten(1)
    return squares_by_feature.sum(1)
