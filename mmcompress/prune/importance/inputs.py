"""What a criterion is given and what it returns.

A criterion is one function: it takes `ImportanceInputs` and returns scores for the units of every
block, higher for what should stay. Scores are compared only within one node and kind of block.

Shapes in this file:
    U  units of a block, W  features of a unit, F  features of a block: units * width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block
from mmcompress.kinds.base import Batch, Models
from mmcompress.models.base import Model
from mmcompress.models.device import CPU
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.refit import Grams

Scores = dict[str, dict[str, Tensor]]
"""Importance of units: node -> block -> scores [units]."""


@dataclass(frozen=True, kw_only=True)
class ImportanceInputs:
    """What a criterion may look at."""

    pipeline: TorchPipeline
    """The graph, with its own loss."""
    models: Models
    """The models by node. A criterion must not change them."""
    batch: Batch
    """Calibration pairs."""
    grams: dict[str, Grams]
    """Moments of what the blocks' output projections read, by node and block."""
    seed: int
    """Seed of what is drawn at random."""


Criterion = Callable[[ImportanceInputs], Scores]
"""A criterion must score `model.weighted_blocks`; positions may be left out."""


def score_units(criterion: Criterion, inputs: ImportanceInputs) -> Scores:
    """Score all units by a criterion; positions that it says nothing about are spread evenly.

    The scores are on the processor, whatever device the models are on: they choose indices.
    """
    criterion_scores = inputs.pipeline.retry_with_fewer_pairs(partial(criterion, inputs))
    scores: Scores = {}
    for node_name, model in inputs.models.items():
        scores[node_name] = {}
        for block in model.blocks:
            block_scores = criterion_scores[node_name].get(block.name)
            if block_scores is None:
                block_scores = score_positions_evenly(block)
            scores[node_name][block.name] = block_scores.to(CPU)
    return scores


def score_positions_evenly(block: Block) -> Tensor:
    """Score positions, which have no weights, so that any number of the best lies evenly.

    The score falls with the van der Corput sequence: the bits of the index in reverse order.
    """
    bit_count = max(1, (block.units - 1).bit_length())
    reversed_indices: list[int] = []
    for i in range(block.units):
        bits = f"{i:0{bit_count}b}"
        reversed_indices.append(int(bits[::-1], 2))
    # The first ones of the sequence stay longest, so scores fall along it.
    return -torch.tensor(reversed_indices, dtype=torch.float, device=CPU)


class ScoreBlock(Protocol):
    """Scores the units of one block of a node's model."""

    def __call__(self, node_name: str, model: Model, /, *, block: Block) -> Tensor: ...


def score_weighted_blocks(inputs: ImportanceInputs, score_block: ScoreBlock) -> Scores:
    """Score every block that has weights by one function."""
    scores: Scores = {}
    for node_name, model in inputs.models.items():
        scores[node_name] = {}
        for block in model.weighted_blocks:
            scores[node_name][block.name] = score_block(node_name, model, block=block)
    return scores


def sum_over_width(per_feature_F: Tensor, block: Block) -> Tensor:
    """Add up a value of every feature [units * width] within each unit [units]."""
    per_feature_UW = per_feature_F.view(block.units, block.width)
    return per_feature_UW.sum(1)
