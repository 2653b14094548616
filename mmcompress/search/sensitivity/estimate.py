"""TODO."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmcompress.kinds.base import Models
from mmcompress.search.sensitivity.curves import SensitivityCurve
from mmcompress.search.sensitivity.measure import NO_LIMIT, _levels


def estimate_sensitivity(
    models: Models,
    scores: Mapping[str, Mapping[str, Tensor]],
    *,
    pairs: int,
    shortest: Mapping[str, float] = NO_LIMIT,
) -> dict[str, dict[str, SensitivityCurve]]:
    """Curves without running anything: half the mask Fisher information that is cut, per pair (Kwon et al. 2022)."""
    found: dict[str, dict[str, SensitivityCurve]] = {}
    for node, model in models.items():
        found[node] = {}
        for block in model.blocks:
            given = scores[node][block.name]
            lost = (given.flip(0) if block.prefix_only else given.sort().values).cumsum(0) / (
                2 * pairs
            )
            kept = sorted({block.units, *_levels(block, shortest.get(node, 0.0))})
            points = tuple(
                float(lost[block.units - k - 1]) if k < block.units else 0.0 for k in kept
            )
            found[node][block.name] = SensitivityCurve(tuple(kept), points)
    return found
