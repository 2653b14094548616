"""Precisions of a node whose latencies lie so near that only a measurement tells which is quicker.

Tables predict a node to some percent. Where another precision is predicted within
`NEAR_SHARE`, the fit measures the node in both, beside each other. What it learns corrects the
predictor, and a node that is no slower in fp32 goes on in fp32: rounding would cost quality for
nothing. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.plan import DENSE_NAME
from mmcompress.measure.cost_model.predictor import Predictor

NEAR_SHARE = 0.10
"""Relative difference of two predictions of a node up to which both precisions are measured."""


@dataclass(frozen=True, kw_only=True)
class PrecisionComparison:
    """One node of a structure in two precisions, measured beside each other."""

    precision: str
    """The precision that the structure does not have."""
    ratio: float
    """Latency of the node in that precision / latency in its own: median over requests."""


def find_near_precisions(
    candidate: Candidate, predictor: Predictor, *, precisions: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Find the nodes that another precision is predicted to make hardly quicker or slower.

    Args:
        candidate: The structure.
        predictor: Predicts the latency of a node.
        precisions: Precisions that each node may have.

    Returns:
        The precision that is predicted nearest to that of the structure, by node; nodes without a
        near one are missing.
    """
    near: dict[str, str] = {}
    for node_name, precision in candidate.precision.items():
        own_ms = predictor.predict_node_ms(node_name, candidate)
        smallest_difference = NEAR_SHARE
        for other_precision in precisions.get(node_name, ()):
            if other_precision == precision:
                continue
            changed = change_precisions(candidate, {node_name: other_precision})
            difference = abs(predictor.predict_node_ms(node_name, changed) / own_ms - 1)
            if difference <= smallest_difference:
                smallest_difference = difference
                near[node_name] = other_precision
    return near


def change_precisions(candidate: Candidate, changes: Mapping[str, str]) -> Candidate:
    """Return a structure with other precisions of some nodes."""
    return replace(candidate, precision={**candidate.precision, **changes})


def prefer_fp32(
    candidate: Candidate, predictor: Predictor, *, precisions: Mapping[str, Sequence[str]]
) -> Candidate:
    """Return a structure with fp32 for each node that is predicted to be no slower in it.

    Args:
        candidate: The structure.
        predictor: Predicts the latency of a node, corrected by what was measured.
        precisions: Precisions that each node may have.
    """
    for node_name, precision in candidate.precision.items():
        if precision == DENSE_NAME or DENSE_NAME not in precisions.get(node_name, ()):
            continue
        exact = change_precisions(candidate, {node_name: DENSE_NAME})
        exact_ms = predictor.predict_node_ms(node_name, exact)
        if exact_ms <= predictor.predict_node_ms(node_name, candidate):
            candidate = exact
    return candidate


def correct_by_comparisons(
    predictor: Predictor, candidate: Candidate, *, comparisons: Mapping[str, PrecisionComparison]
) -> Predictor:
    """Return a predictor that predicts the measured ratios of two precisions.

    Args:
        predictor: The predictor so far.
        candidate: The structure that was measured.
        comparisons: What was measured of its nodes in another precision.
    """
    for node_name, comparison in comparisons.items():
        changed = change_precisions(candidate, {node_name: comparison.precision})
        own_ms = predictor.predict_node_ms(node_name, candidate)
        predicted_ratio = predictor.predict_node_ms(node_name, changed) / own_ms
        factor = comparison.ratio / predicted_ratio
        predictor = predictor.correct_precision(
            node_name, precision=comparison.precision, factor=factor
        )
    return predictor
