"""The sensitivity curve of a block, and the table of all curves and roundings. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

import numpy as np

from mmcompress.graph.structure import Candidate

MIN_LOSS_INCREASE_SHARE = 3e-5
"""Share of a node's largest loss increase that every loss increase gets on top before it is scaled.

A factor of a value near zero would be chance.
"""

MIN_LOSS_INCREASE = 1e-9
"""In units of the loss: added to that floor, for a node whose curves are zero everywhere."""

CutWeights = Mapping[str, Mapping[str, float]]
"""Factor of a block's loss increase by node and block; 1 where a block is missing."""

EQUAL_WEIGHTS: CutWeights = MappingProxyType({})
"""Factor 1 for every block: loss increases count as they were measured."""


@dataclass(frozen=True, kw_only=True)
class SensitivityCurve:
    """Loss increase of the pipeline against the units one block keeps, all other blocks whole."""

    kept_units: tuple[int, ...]
    """Units kept at each point, ascending; the last point is the whole block."""
    loss_increases: tuple[float, ...]
    """In units of the pipeline's loss, at each point: loss after cut and refit minus dense loss.

    At least 0.
    """

    @classmethod
    def from_points(cls, points: Mapping[int, float]) -> SensitivityCurve:
        """Make a curve from loss increases by units kept."""
        kept_units = tuple(sorted(points))
        loss_increases = tuple(points[kept] for kept in kept_units)
        return cls(kept_units=kept_units, loss_increases=loss_increases)

    def interpolate(self, kept: float | np.ndarray) -> np.ndarray:
        """Interpolate linearly between the measured points.

        Args:
            kept: Units kept, one number or an array of any shape.

        Returns:
            Loss increases of the same shape.
        """
        return np.asarray(np.interp(kept, self.kept_units, self.loss_increases))

    def rise_with_every_cut(self, floor: float) -> SensitivityCurve:
        """Return the curve made monotonic, plus a line from 0 at the whole block to `floor`.

        Args:
            floor: Loss increase that is added where no unit is left.
        """
        from_right = self.loss_increases[::-1]
        monotonic_increases = np.maximum.accumulate(from_right)[::-1]
        removed_shares = 1 - np.asarray(self.kept_units) / self.kept_units[-1]
        raised_increases = monotonic_increases + floor * removed_shares
        return SensitivityCurve(
            kept_units=self.kept_units, loss_increases=tuple(raised_increases.tolist())
        )

    def multiply(self, factor: float) -> SensitivityCurve:
        """Return the curve with every loss increase times `factor`."""
        scaled_increases = tuple(factor * loss_increase for loss_increase in self.loss_increases)
        return SensitivityCurve(kept_units=self.kept_units, loss_increases=scaled_increases)


SensitivityCurves = Mapping[str, SensitivityCurve]
"""Curves of one node by block."""


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """Loss increases of every cut and every rounding of a pipeline, each measured alone."""

    curves: dict[str, dict[str, SensitivityCurve]]
    """Curve by node and block."""
    rounding: dict[str, dict[str, float]]
    """In units of the loss: increase when one whole node is rounded, by node and precision.

    0 for fp32.
    """

    def estimate_loss_increase(self, node: str, block: str, *, kept: int) -> float:
        """Estimate the loss increase when one block keeps `kept` units and all else is dense."""
        return float(self.curves[node][block].interpolate(kept))

    def add_losses(self, candidate: Candidate, *, cut_weights: CutWeights = EQUAL_WEIGHTS) -> float:
        """Return the loss increase of a candidate if cuts and roundings do not interact.

            sum over blocks of weight * curve(units kept) + sum over nodes of rounding(precision)

        Args:
            candidate: Blocks it does not name are whole.
            cut_weights: Factor by node and block, such as the protection of cross-modal blocks.
        """
        cut_loss = 0.0
        for node_name, kept_units in candidate.kept_units.items():
            node_weights = cut_weights.get(node_name, {})
            for block_name, kept in kept_units.items():
                weight = node_weights.get(block_name, 1.0)
                cut_loss += weight * self.estimate_loss_increase(node_name, block_name, kept=kept)
        rounding_loss = 0.0
        for node_name, precision in candidate.precision.items():
            rounding_loss += self.rounding[node_name][precision]
        return cut_loss + rounding_loss

    def scale_loss_increases(
        self, cut_factors: Mapping[str, Mapping[str, float]], rounding_factors: Mapping[str, float]
    ) -> Self:
        """Return the same record with loss increases multiplied by factors.

        Curves are made monotonic first, and every loss increase gets a small floor: a factor of a
        value near zero would be chance.

        Args:
            cut_factors: Factor by node and block; 1 where it is missing.
            rounding_factors: Factor by node, for every precision but fp32; 1 where it is missing.
        """
        scaled_curves: dict[str, dict[str, SensitivityCurve]] = {}
        for node_name, curves in self.curves.items():
            floor = self._find_floor(node_name)
            node_factors = cut_factors.get(node_name, {})
            scaled_curves[node_name] = {
                block_name: curve.rise_with_every_cut(floor).multiply(
                    node_factors.get(block_name, 1.0)
                )
                for block_name, curve in curves.items()
            }
        scaled_rounding: dict[str, dict[str, float]] = {}
        for node_name, loss_increases in self.rounding.items():
            floor = self._find_floor(node_name)
            factor = rounding_factors.get(node_name, 1.0)
            scaled_rounding[node_name] = {
                precision: loss if precision == "fp32" else factor * (loss + floor)
                for precision, loss in loss_increases.items()
            }
        return replace(self, curves=scaled_curves, rounding=scaled_rounding)

    def _find_floor(self, node_name: str) -> float:
        """Return a loss increase next to nothing: a share of the node's largest one."""
        largest_increase = max(
            (max(curve.loss_increases) for curve in self.curves[node_name].values()), default=0.0
        )
        return MIN_LOSS_INCREASE_SHARE * largest_increase + MIN_LOSS_INCREASE
