"""Criteria that weigh the weights by what they read: activation and fluctuation.

Shapes in this file:
    F  features that a block's reader reads
"""

from __future__ import annotations

from torch import Tensor

from mmcompress.graph.blocks import Block
from mmcompress.models.base import Model
from mmcompress.prune.importance.inputs import (
    ImportanceInputs,
    Scores,
    score_weighted_blocks,
    sum_over_width,
)
from mmcompress.prune.masks import measure_reader_norms


def score_by_activation(inputs: ImportanceInputs) -> Scores:
    """Score units by reading weights times input (Wanda, Sun et al. 2024).

    score(u) = sum over features f of u of |W_:f|^2 mean(x_f^2)
    """

    def score_block(node_name: str, model: Model, *, block: Block) -> Tensor:
        gram = inputs.grams[node_name][block.name]
        mean_squares_F = gram.compute_second_moment().diag()
        norms_F = measure_reader_norms(model, block)
        return sum_over_width(norms_F * mean_squares_F, block)

    return score_weighted_blocks(inputs, score_block)


def score_by_fluctuation(inputs: ImportanceInputs) -> Scores:
    """Score units by reading weights times variance of the input (FLAP, An et al. 2024).

    score(u) = sum over features f of u of |W_:f|^2 var(x_f)

    The mean of an input does not count: a bias can stand in for it.
    """

    def score_block(node_name: str, model: Model, *, block: Block) -> Tensor:
        gram = inputs.grams[node_name][block.name]
        variances_F = gram.compute_covariance().diag()
        norms_F = measure_reader_norms(model, block)
        return sum_over_width(norms_F * variances_F, block)

    return score_weighted_blocks(inputs, score_block)
