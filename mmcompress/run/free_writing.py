"""Separates what a finished pipeline writes from how quickly it writes. No torch.

A structure is measured before its training while it writes what the dense pipeline wrote. A
finished artifact writes freely. Its decode steps are counted, so its latency for the dense texts
follows. A factor from the one measurement to the other is then learned of equal work.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from mmcompress.measure.latency.bench import Samples
from mmcompress.results.records import DecodeSteps, FreeWriting
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.stats import estimate_relative_margin, summarize_latency


def estimate_free_writing(
    compressed: Samples,
    dense: Samples,
    *,
    fitted: FittedStructure,
    distinct_requests: int,
    statistic: Literal["p50", "p95"] = "p50",
) -> FreeWriting:
    """Estimate what it costs that an artifact writes freely, and how much each generator writes.

    A generator is taken to need its time step by step. So a request takes, with the dense texts,

        dictated_ms = free_ms - sum over generators of node_ms * (1 - dense_steps / steps)

    Args:
        compressed: What was observed of the artifact while it wrote freely.
        dense: The same of the dense pipeline, request by request.
        fitted: The structure of the artifact, as it was measured before its training.
        distinct_requests: Different requests that were sent: texts of the same ones are the same.
        statistic: The statistic of the latency that counts.
    """
    nodes: dict[str, DecodeSteps] = {}
    dictated_ms = list(compressed.ms)
    for node_name, steps in compressed.decode_steps.items():
        dense_steps = dense.decode_steps[node_name]
        if not all(steps) or not all(dense_steps):
            # A request without a step has no time of a step.
            continue
        node_ms = compressed.nodes[node_name]
        dictated_node_ms = _scale_to_steps(node_ms, steps, wanted=dense_steps)
        for i, free_ms in enumerate(node_ms):
            dictated_ms[i] -= free_ms - dictated_node_ms[i]
        nodes[node_name] = DecodeSteps(
            dense=statistics.fmean(dense_steps),
            compressed=statistics.fmean(steps),
            ratio=statistics.median(dictated_node_ms) / statistics.median(dense.nodes[node_name]),
            fitted_ratio=_find_fitted_ratio(fitted, node_name),
        )
    factors = [free / dictated for free, dictated in zip(compressed.ms, dictated_ms, strict=True)]
    free_latency = summarize_latency(compressed.ms)
    dictated_latency = summarize_latency(dictated_ms)
    return FreeWriting(
        latency_factor=getattr(free_latency, statistic) / getattr(dictated_latency, statistic),
        margin=estimate_relative_margin(factors[:distinct_requests]),
        nodes=nodes,
    )


def _scale_to_steps(
    node_ms: Sequence[float], steps: Sequence[int], *, wanted: Sequence[int]
) -> list[float]:
    """Return the milliseconds of a node for another number of steps, request by request."""
    scaled: list[float] = []
    for ms, own_steps, wanted_steps in zip(node_ms, steps, wanted, strict=True):
        scaled.append(ms * wanted_steps / own_steps)
    return scaled


def _find_fitted_ratio(fitted: FittedStructure, node_name: str) -> float | None:
    """Return latency of a node / that of the dense one, as measured before the training."""
    measurement = fitted.find_measurement()
    return measurement.node_ratios.get(node_name) if measurement else None
