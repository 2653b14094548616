"""Criteria that read the weights only: magnitude and magnitude_l1.

Shapes in this file:
    U  units of a block     F  features that are read: units * width of a unit
    R  rows of a writer     P  parts of a fused writer (q, k and v: 3)
    W  rows that a unit has in one part of a writer
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block, Writer
from mmcompress.models.base import Model
from mmcompress.prune.importance.inputs import (
    ImportanceInputs,
    Scores,
    score_weighted_blocks,
    sum_over_width,
)
from mmcompress.prune.masks import get_weight, list_writer_rows


def score_by_magnitude(inputs: ImportanceInputs) -> Scores:
    """Score units by the L2 norm of all weights that write or read them (Li et al. 2017)."""

    def score_block(node_name: str, model: Model, *, block: Block) -> Tensor:
        squares_U = _sum_unit_weights(model, block, size_of=Tensor.square)
        return squares_U.sqrt()

    return score_weighted_blocks(inputs, score_block)


def score_by_magnitude_l1(inputs: ImportanceInputs) -> Scores:
    """Score units by the L1 norm of all weights that write or read them."""

    def score_block(node_name: str, model: Model, *, block: Block) -> Tensor:
        return _sum_unit_weights(model, block, size_of=Tensor.abs)

    return score_weighted_blocks(inputs, score_block)


def _sum_unit_weights(model: Model, block: Block, *, size_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Add up a size of every weight that writes or reads a unit [units]."""
    read_sizes = size_of(get_weight(model, block.reader))
    # Inputs are the second axis; behind it lie the places of a convolution's kernel.
    read_F = read_sizes.transpose(0, 1).flatten(1).sum(1)
    total_U = sum_over_width(read_F, block)
    for writer in block.writers:
        total_U = total_U + _sum_written_weights(model, block, writer=writer, size_of=size_of)
    return total_U


def _sum_written_weights(
    model: Model, block: Block, *, writer: Writer, size_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Add up a size of every weight of a writer that writes a unit [units]."""
    written_sizes = size_of(get_weight(model, writer.path))
    written_R = written_sizes.flatten(1).sum(1)
    all_units = torch.arange(block.units, device=written_R.device)
    rows = list_writer_rows(block, writer, units=all_units)
    rows_PUW = rows.view(writer.parts, block.units, writer.width)
    written_PUW = written_R[rows_PUW]
    return written_PUW.sum((0, 2))
