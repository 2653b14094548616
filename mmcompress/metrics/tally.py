"""Right or wrong, input by input: a metric's figure with its 95 % interval, and the gap between answers to the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmcompress.records import Quality

Z = 1.959964
DRAWS = 2000


@dataclass(frozen=True)
class Tally:
    """What a metric counted for each input: `hits` out of `of` (nothing: out of one); its figure is sum over sum."""

    hits: tuple[float, ...]
    of: tuple[float, ...] = ()
    error: bool = False
    """Hits are errors: lower is better."""

    @property
    def good(self) -> float:
        """The share that is right."""
        share = sum(self.hits) / max(sum(self.of), 1) if self.of else float(np.mean(self.hits))
        return 1 - share if self.error else share


@dataclass(frozen=True)
class Outcomes:
    """`outcomes.json`: tallies of both sides over the test split, by metric."""

    baseline: dict[str, Tally]
    compressed: dict[str, Tally]


def quality(t: Tally) -> Quality:
    """The figure with its 95 % interval: Wilson's for a share of inputs, else by bootstrap over inputs."""
    hits, n = np.array(t.hits), len(t.hits)
    if not t.of:
        p = float(hits.mean())
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return Quality(p, max(0.0, middle - half), min(1.0, middle + half), n, t.error)
    of, draws = np.array(t.of), np.random.default_rng(0).integers(0, n, (DRAWS, n))
    rate = lambda a, b: a.sum(-1) / np.maximum(b.sum(-1), 1)
    low, high = np.percentile(rate(hits[draws], of[draws]), (2.5, 97.5))
    return Quality(float(rate(hits, of)), float(low), float(high), n, t.error)


def gap(better: Sequence[Mapping[str, Tally]], worse: Sequence[Mapping[str, Tally]]) -> tuple[float, float]:
    """(how much more of what is right the first side keeps, mean over metrics and over several runs of a side; half its
    95 % interval).

    The interval is paired: inputs are drawn anew with all answers to them (bootstrap), so what both sides get right or
    wrong together does not widen it, and metrics that hang together do not narrow it. Where a side is several runs,
    they are drawn anew as well.
    """
    n = len(next(iter(better[0].values())).hits)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(n, np.full(n, 1 / n), DRAWS)
    point, drawn = 0.0, np.zeros(DRAWS)
    for sign, side in ((1, better), (-1, worse)):
        often = rng.multinomial(len(side), np.full(len(side), 1 / len(side)), DRAWS)
        for run, times in zip(side, often.T, strict=True):
            for t in run.values():
                share = sign / len(side) / len(run)
                of = np.array(t.of) if t.of else np.ones(n)
                rate = weights @ np.array(t.hits) / np.maximum(weights @ of, 1)
                point += share * t.good
                drawn += share * times * (1 - rate if t.error else rate)
    return point, Z * float(drawn.std())


def verdict(better: Sequence[Mapping[str, Tally]], worse: Sequence[Mapping[str, Tally]]) -> tuple[str, float, float]:
    """(supported, not supported or undecided; the gap; half its 95 % interval)."""
    found, half = gap(better, worse)
    return ("supported" if found > half else "not supported" if found < -half else "undecided at this n"), found, half
