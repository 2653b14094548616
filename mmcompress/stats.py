"""Figures with their spread: latencies, metrics with a 95 % interval, differences between two
sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

T_QUANTILES_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Quantiles of Student's t for an interval of 95 %, by degrees of freedom from 1. Devices have no
scipy; the last one stands for all above."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of some samples."""

    p50: float
    """Milliseconds: the median."""
    p95: float
    """Milliseconds: 95 of 100 samples take less."""
    n: int
    """Samples; 0 where the figure is a prediction."""
    iqr: float = 0.0
    """Milliseconds: interquartile range."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A metric with its 95 % interval."""

    value: float
    """The figure itself."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Inputs that were scored."""
    is_error_rate: bool = False
    """Whether lower is better."""

    @property
    def share_right(self) -> float:
        """What is right: the figure itself, or 1 - an error rate. Errors may be more than words."""
        return 1 - self.value if self.is_error_rate else self.value

    @property
    def margin(self) -> float:
        """Half the width of the interval: what the figure may be off by."""
        return (self.high - self.low) / 2


NORMAL_975 = 1.959964
"""The 97.5 % point of the normal distribution: half a 95 % interval, in standard deviations."""

BOOTSTRAP_DRAWS = 2000
"""Draws of a bootstrap. The ends of a 95 % interval then rest on 50 draws each."""


@dataclass(frozen=True, kw_only=True)
class PerSampleScores:
    """What a metric counted for each input. Its figure is the sum of the numerators / that of the
    denominators."""

    numerators: tuple[float, ...]
    """Hits of each input; of an error rate, its errors."""
    denominators: tuple[float, ...] = ()
    """What each input could have; empty: 1."""
    is_error_rate: bool = False
    """Whether hits are errors, so that lower is better."""

    @property
    def share_right(self) -> float:
        """The share that is right, 0..1."""
        if self.denominators:
            share = sum(self.numerators) / max(sum(self.denominators), 1)
        else:
            share = float(np.mean(self.numerators))
        return 1 - share if self.is_error_rate else share


@dataclass(frozen=True, kw_only=True)
class SplitScores:
    """`outcomes.json`: scores of both sides over the test split, by metric."""

    baseline: dict[str, PerSampleScores]
    """Of the dense pipeline."""
    compressed: dict[str, PerSampleScores]
    """Of the compressed one."""


def estimate_quality(scores: PerSampleScores) -> Quality:
    """Estimate the figure of a metric with its 95 % interval.

    Args:
        scores: What was counted for each input.

    Returns:
        The figure. A share of inputs has Wilson's interval (Wilson 1927), any other one a bootstrap
        over inputs.
    """
    if scores.denominators:
        value, low, high = _bootstrap_ratio(scores)
    else:
        value, low, high = _estimate_wilson_interval(scores)
    return Quality(
        value=value,
        low=low,
        high=high,
        n=len(scores.numerators),
        is_error_rate=scores.is_error_rate,
    )


def _estimate_wilson_interval(scores: PerSampleScores) -> tuple[float, float, float]:
    """Return the share of hits with its lower and upper end.

    With the share p over n inputs and z = 1.96:

        middle     = (p + z^2 / 2n) / (1 + z^2 / n)
        half width = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)
    """
    input_count = len(scores.numerators)
    share = float(np.array(scores.numerators).mean())
    z_squared = NORMAL_975 * NORMAL_975
    shrinkage = 1 + z_squared / input_count
    middle = (share + z_squared / (2 * input_count)) / shrinkage
    variance = share * (1 - share) / input_count + z_squared / (4 * input_count * input_count)
    half_width = NORMAL_975 / shrinkage * math.sqrt(variance)
    return share, max(0.0, middle - half_width), min(1.0, middle + half_width)


def _bootstrap_ratio(scores: PerSampleScores) -> tuple[float, float, float]:
    """Return the ratio of sums with its lower and upper end: inputs are drawn with replacement
    (Efron 1979)."""
    numerators = np.array(scores.numerators)
    denominators = np.array(scores.denominators)
    input_count = len(numerators)
    draws = np.random.default_rng(0).integers(0, input_count, (BOOTSTRAP_DRAWS, input_count))
    drawn_ratios = _divide_sums(numerators[draws], denominators[draws])
    low, high = np.percentile(drawn_ratios, (2.5, 97.5))
    return float(_divide_sums(numerators, denominators)), float(low), float(high)


def _divide_sums(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Divide sums over the last axis; a denominator of nothing counts as 1."""
    ratios: np.ndarray = numerators.sum(-1) / np.maximum(denominators.sum(-1), 1)
    return ratios


def estimate_paired_difference(
    better: Sequence[Mapping[str, PerSampleScores]], worse: Sequence[Mapping[str, PerSampleScores]]
) -> tuple[float, float]:
    """Estimate how much more of what is right one side keeps than the other.

    The interval is paired: a bootstrap draws inputs together with all answers to them. So what both
    sides get right or wrong together does not widen it, and metrics that depend on each other do
    not narrow it. Where a side is several runs, they are drawn as well.

    Args:
        better: Scores by metric, of every run of the side that may be better.
        worse: The same of the other side, over the same inputs.

    Returns:
        The difference of the shares that are right, a mean over metrics and runs, and half its 95 %
        interval.
    """
    first_scores = next(iter(better[0].values()))
    input_count = len(first_scores.numerators)
    random = np.random.default_rng(0)
    # how often each draw holds each input
    input_counts = random.multinomial(
        input_count, np.full(input_count, 1 / input_count), BOOTSTRAP_DRAWS
    )
    difference = 0.0
    drawn_differences = np.zeros(BOOTSTRAP_DRAWS)
    for sign, side in ((1, better), (-1, worse)):
        run_count = len(side)
        run_counts = random.multinomial(
            run_count, np.full(run_count, 1 / run_count), BOOTSTRAP_DRAWS
        )
        for scores_by_metric, counts_of_run in zip(side, run_counts.T, strict=True):
            weight = sign / run_count / len(scores_by_metric)
            for scores in scores_by_metric.values():
                difference += weight * scores.share_right
                drawn_shares = _draw_shares_right(scores, input_counts)
                drawn_differences += weight * counts_of_run * drawn_shares
    return difference, NORMAL_975 * float(drawn_differences.std())


def _draw_shares_right(scores: PerSampleScores, input_counts: np.ndarray) -> np.ndarray:
    """Return the share that is right in every draw; `input_counts` [draws, inputs] says what each
    draw holds."""
    input_count = len(scores.numerators)
    hits = input_counts @ np.array(scores.numerators)
    # Every draw holds as many inputs as there are.
    totals = np.full(len(hits), float(input_count))
    if scores.denominators:
        totals = input_counts @ np.array(scores.denominators)
    shares: np.ndarray = hits / np.maximum(totals, 1)
    return 1 - shares if scores.is_error_rate else shares


def decide_claim(
    better: Sequence[Mapping[str, PerSampleScores]], worse: Sequence[Mapping[str, PerSampleScores]]
) -> tuple[str, float, float]:
    """Decide whether one side keeps more of what is right than the other.

    Args:
        better: Scores by metric, of every run of the side that is claimed to be better.
        worse: The same of the other side, over the same inputs.

    Returns:
        The verdict (`supported`, `not supported` or `undecided at this n`), the difference, and
        half its 95 % interval. The claim is undecided when the interval holds 0.
    """
    difference, half_width = estimate_paired_difference(better, worse)
    if difference > half_width:
        return "supported", difference, half_width
    if difference < -half_width:
        return "not supported", difference, half_width
    return "undecided at this n", difference, half_width


def compute_quality_retained(
    baseline: Mapping[str, Quality], compressed: Mapping[str, Quality]
) -> float:
    """Compute how much of its quality a pipeline keeps.

    Args:
        baseline: Metrics of the dense pipeline.
        compressed: The same metrics of the compressed one.

    Returns:
        The smallest ratio compressed / baseline over the metrics; of an error rate, the ratio of
        what is right. 0 when the dense pipeline gets nothing right.
    """
    ratios: list[float] = []
    for metric, dense_quality in baseline.items():
        dense_share = max(dense_quality.share_right, 0.0)
        if dense_share > 0:
            ratios.append(max(compressed[metric].share_right, 0.0) / dense_share)
    return min(ratios, default=0.0)


def estimate_quality_retained(
    baseline: Mapping[str, PerSampleScores], compressed: Mapping[str, PerSampleScores]
) -> Quality:
    """Estimate how much of its quality a pipeline keeps, with a 95 % interval.

    The interval is paired: a bootstrap draws inputs together with the answers of both sides (Efron
    1979). The worst metric is found anew in every draw.

    Args:
        baseline: Scores of the dense pipeline by metric.
        compressed: The same of the compressed one, over the same inputs.

    Returns:
        The smallest ratio compressed / baseline over the metrics, of what is right. Metrics that
        the dense pipeline gets nothing right of are left out.
    """
    drawn_ratios: list[np.ndarray] = []
    ratios: list[float] = []
    counts: list[int] = []
    for metric, dense in baseline.items():
        if dense.share_right <= 0:
            continue
        count = len(dense.numerators)
        counts.append(count)
        input_counts = _draw_input_counts(count)
        dense_shares = _draw_shares_right(dense, input_counts)
        own_shares = _draw_shares_right(compressed[metric], input_counts)
        # A draw of which the dense pipeline gets nothing right says nothing of the metric.
        drawn = np.full(BOOTSTRAP_DRAWS, np.nan)
        np.divide(own_shares, dense_shares, out=drawn, where=dense_shares > 0)
        drawn_ratios.append(drawn)
        ratios.append(max(compressed[metric].share_right, 0.0) / dense.share_right)
    if not ratios:
        return Quality(value=0.0, low=0.0, high=0.0, n=0)
    worst = np.nanmin(np.array(drawn_ratios), axis=0)
    low, high = np.nanpercentile(worst, (2.5, 97.5))
    return Quality(
        value=min(ratios),
        low=max(float(low), 0.0),
        high=float(high),
        n=max(counts),
    )


@lru_cache(maxsize=4)
def _draw_input_counts(count: int) -> np.ndarray:
    """Return how often each draw of a bootstrap holds each input: [draws, inputs]."""
    uniform = np.full(count, 1 / count)
    counts = np.random.default_rng(0).multinomial(count, uniform, BOOTSTRAP_DRAWS)
    # Products of floats are quicker than those of integers with floats.
    return counts.astype(np.float64)


def summarize_latency(ms: Sequence[float]) -> Latency:
    """Summarize samples.

    Args:
        ms: Milliseconds of each sample.

    Returns:
        Median, 95 % point and interquartile range.
    """
    p25, p50, p75, p95 = np.percentile(ms, (25, 50, 75, 95))
    return Latency(p50=float(p50), p95=float(p95), n=len(ms), iqr=float(p75 - p25))


def estimate_relative_margin(values: Sequence[float]) -> float:
    """Return the half-width of the interval of 95 % of a mean, as a share of the mean.

    It is t * sd / sqrt(n), for independent values of a normal distribution. 0 for fewer than two
    values.
    """
    count = len(values)
    if count < 2:
        return 0.0
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1))
    quantile = T_QUANTILES_95[min(count - 1, len(T_QUANTILES_95)) - 1]
    return quantile * deviation / (math.sqrt(count) * mean)
