"""Scale a predictor to the speed that the same device has at another time. No torch."""

from __future__ import annotations

from dataclasses import replace

from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.cost_model.predictor import LinearFit, Predictor


def scale_predictor(
    predictor: Predictor, *, before: PipelineMeasurement, now: PipelineMeasurement
) -> Predictor:
    """Return a predictor for a machine that is as quick as it is now.

    Every node keeps the shape of its fits. Sessions and the rest are each scaled by what the dense
    node takes now, over what it took when the predictor was fitted.

    Args:
        predictor: It was fitted to the earlier measurement.
        before: The dense pipeline then.
        now: The same dense pipeline now, on the same device.
    """
    fits: dict[str, dict[str, LinearFit]] = {}
    outside_ms: dict[str, float] = {}
    for node, node_fits in predictor.fits.items():
        in_session_ms = now.in_session_ms[node]
        factor = _divide(in_session_ms, before.in_session_ms[node])
        fits[node] = {precision: fit.multiply(factor) for precision, fit in node_fits.items()}
        rest_factor = _divide(
            now.nodes[node].p50 - in_session_ms,
            before.nodes[node].p50 - before.in_session_ms[node],
        )
        if node in predictor.outside_sessions_ms:
            outside_ms[node] = predictor.outside_sessions_ms[node] * rest_factor
    overhead_ms = predictor.overhead_ms * _divide(now.latency.p50, before.latency.p50)
    dense_node_ms = {node: now.nodes[node].p50 for node in predictor.deployed}
    combined_ms = predictor.combine_node_ms(dense_node_ms) + overhead_ms
    return replace(
        predictor,
        fits=fits,
        outside_sessions_ms=outside_ms,
        overhead_ms=overhead_ms,
        request_factor=_divide(now.latency.p50, combined_ms),
    )


def _divide(now_ms: float, before_ms: float) -> float:
    """Return the ratio of two times; 1 where there is no time to compare."""
    if now_ms <= 0 or before_ms <= 0:
        return 1.0
    return now_ms / before_ms
