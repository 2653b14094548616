"""Right or wrong, input by input: a metric's figure with its 95 % interval, and the gap between answers to the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of `n` samples."""

    p50: float
    p95: float
    n: int
    iqr: float = 0.0
    """Interquartile range."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A metric with its 95 % interval over `n` samples."""

    value: float
    low: float
    high: float
    n: int
    is_error_rate: bool = False
    """An error rate: lower is better."""


NORMAL_975 = 1.959964


BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class PerSampleScores:
    """What a metric counted for each input: `hits` out of `of` (nothing: out of one); its figure is sum over sum."""

    numerators: tuple[float, ...]
    denominators: tuple[float, ...] = ()
    is_error_rate: bool = False
    """Hits are errors: lower is better."""

    @property
    def share_right(self) -> float:
        """The share that is right."""
        share = (
            sum(self.numerators) / max(sum(self.denominators), 1)
            if self.denominators
            else float(np.mean(self.numerators))
        )
        return 1 - share if self.is_error_rate else share


@dataclass(frozen=True)
class SplitScores:
    """`outcomes.json`: tallies of both sides over the test split, by metric."""

    baseline: dict[str, PerSampleScores]
    compressed: dict[str, PerSampleScores]


def estimate_quality(t: PerSampleScores) -> Quality:
    """The figure with its 95 % interval: Wilson's for a share of inputs, else by bootstrap over inputs."""
    hits, n = np.array(t.numerators), len(t.numerators)
    if not t.denominators:
        p = float(hits.mean())
        middle = (p + NORMAL_975 * NORMAL_975 / (2 * n)) / (1 + NORMAL_975 * NORMAL_975 / n)
        half = (
            NORMAL_975
            / (1 + NORMAL_975 * NORMAL_975 / n)
            * math.sqrt(p * (1 - p) / n + NORMAL_975 * NORMAL_975 / (4 * n * n))
        )
        return Quality(
            value=p,
            low=max(0.0, middle - half),
            high=min(1.0, middle + half),
            n=n,
            is_error_rate=t.is_error_rate,
        )
    of, draws = (
        np.array(t.denominators),
        np.random.default_rng(0).integers(0, n, (BOOTSTRAP_DRAWS, n)),
    )
    rate = lambda a, b: a.sum(-1) / np.maximum(b.sum(-1), 1)
    low, high = np.percentile(rate(hits[draws], of[draws]), (2.5, 97.5))
    return Quality(
        value=float(rate(hits, of)),
        low=float(low),
        high=float(high),
        n=n,
        is_error_rate=t.is_error_rate,
    )


def estimate_paired_difference(
    better: Sequence[Mapping[str, PerSampleScores]], worse: Sequence[Mapping[str, PerSampleScores]]
) -> tuple[float, float]:
    """(how much more of what is right the first side keeps, mean over metrics and over several runs of a side; half its
    95 % interval).

    The interval is paired: inputs are drawn anew with all answers to them (bootstrap), so what both sides get right or
    wrong together does not widen it, and metrics that hang together do not narrow it. Where a side is several runs,
    they are drawn anew as well.
    """
    n = len(next(iter(better[0].values())).numerators)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n, np.full(n, 1 / n), BOOTSTRAP_DRAWS)
    point, drawn = 0.0, np.zeros(BOOTSTRAP_DRAWS)
    for sign, side in ((1, better), (-1, worse)):
        often = rng.multinomial(len(side), np.full(len(side), 1 / len(side)), BOOTSTRAP_DRAWS)
        for run, times in zip(side, often.T, strict=True):
            for t in run.values():
                share = sign / len(side) / len(run)
                of = np.array(t.denominators) if t.denominators else np.ones(n)
                rate = weights @ np.array(t.numerators) / np.maximum(weights @ of, 1)
                point += share * t.share_right
                drawn += share * times * (1 - rate if t.is_error_rate else rate)
    return point, NORMAL_975 * float(drawn.std())


def decide_claim(
    better: Sequence[Mapping[str, PerSampleScores]], worse: Sequence[Mapping[str, PerSampleScores]]
) -> tuple[str, float, float]:
    """(supported, not supported or undecided; the gap; half its 95 % interval)."""
    found, half = estimate_paired_difference(better, worse)
    return (
        (
            "supported"
            if found > half
            else "not supported"
            if found < -half
            else "undecided at this n"
        ),
        found,
        half,
    )


def compute_quality_retained(baseline: dict[str, Quality], compressed: dict[str, Quality]) -> float:
    """The smallest ratio compressed / baseline over the metrics; of an error rate, the ratio of what is right."""
    good = lambda q: max(1 - q.value, 0.0) if q.is_error_rate else q.value
    return min(
        (good(compressed[k]) / good(b) for k, b in baseline.items() if good(b) > 0), default=0.0
    )


def summarize_latency(ms: Sequence[float]) -> Latency:
    p25, p50, p75, p95 = np.percentile(ms, (25, 50, 75, 95))
    return Latency(p50=float(p50), p95=float(p95), n=len(ms), iqr=float(p75 - p25))
