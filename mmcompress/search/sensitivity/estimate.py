"""Sensitivity curves estimated from importance scores: no model is run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmcompress.graph.blocks import Block
from mmcompress.kinds.base import Models
from mmcompress.search.sensitivity.curves import SensitivityCurve
from mmcompress.search.sensitivity.measure import NO_LIMIT, list_measured_levels


def estimate_sensitivity(
    models: Models,
    scores: Mapping[str, Mapping[str, Tensor]],
    *,
    pairs: int,
    max_token_shares: Mapping[str, float] = NO_LIMIT,
) -> dict[str, dict[str, SensitivityCurve]]:
    """Estimate the curve of every block from the mask Fisher information of its units.

        loss increase = sum of the scores of the units removed / (2 * pairs)

    Kwon et al. 2022, A Fast Post-Training Pruning Framework for Transformers.

    Args:
        models: Dense models by node.
        scores: Fisher information [units] by node and block, summed over pairs.
        pairs: Pairs behind the scores.
        max_token_shares: See `measure_sensitivity`.

    Returns:
        Curves by node and block.
    """
    curves: dict[str, dict[str, SensitivityCurve]] = {}
    for node_name, model in models.items():
        curves[node_name] = {}
        for block in model.blocks:
            levels = list_measured_levels(block, max_token_shares.get(node_name, 0.0))
            curves[node_name][block.name] = _estimate_curve(
                block, scores[node_name][block.name], levels=levels, pairs=pairs
            )
    return curves


def _estimate_curve(
    block: Block, scores: Tensor, *, levels: list[int], pairs: int
) -> SensitivityCurve:
    """Estimate one curve at the given numbers of units kept; the whole block is added."""
    in_order_of_removal = scores.flip(0) if block.prefix_only else scores.sort().values
    removed_losses = in_order_of_removal.cumsum(0) / (2 * pairs)
    points = {block.units: 0.0}
    for kept in levels:
        points[kept] = float(removed_losses[block.units - kept - 1])
    return SensitivityCurve.from_points(points)
