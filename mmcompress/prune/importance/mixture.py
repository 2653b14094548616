"""Several criteria added up: `fisher + 0.5 * magnitude`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmcompress.models.base import Model
from mmcompress.prune.importance.inputs import Criterion, ImportanceInputs, Scores

MIN_MEAN_SCORE = 1e-12
"""Least mean that scores are divided by: a criterion may give 0 to every unit of a kind."""


def mix_criteria(parts: Sequence[tuple[float, Criterion]]) -> Criterion:
    """Make one criterion that adds up several.

    The scores of each are divided by their mean over the units of one node and kind of block.
    Otherwise criteria would differ by orders of magnitude.

    Args:
        parts: The weight of each criterion, and the criterion.
    """

    def score_by_mixture(inputs: ImportanceInputs) -> Scores:
        total: Scores = {node_name: {} for node_name in inputs.models}
        for weight, criterion in parts:
            scores = criterion(inputs)
            for node_name, model in inputs.models.items():
                _add_scores_(total[node_name], weight, model=model, scores=scores[node_name])
        return total

    return score_by_mixture


def _add_scores_(
    total: dict[str, Tensor], weight: float, *, model: Model, scores: Mapping[str, Tensor]
) -> None:
    """Add the scores of one criterion for one node, divided by the mean of each kind."""
    for names in _group_by_kind(model, scores).values():
        all_scores = torch.cat([scores[name] for name in names])
        mean = all_scores.abs().mean().clamp(min=MIN_MEAN_SCORE)
        for name in names:
            weighted_scores = weight * scores[name] / mean
            total[name] = total.get(name, 0) + weighted_scores


def _group_by_kind(model: Model, scores: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of the blocks that have scores, by kind of block."""
    names_by_kind: dict[str, list[str]] = {}
    for block in model.blocks:
        # Most criteria say nothing about positions.
        if block.name in scores:
            names_by_kind.setdefault(block.kind, []).append(block.name)
    return names_by_kind
