"""The target of a spec: a speed-up over the dense pipeline, or a latency."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mmcompress.errors import SpecError, shorten
from mmcompress.spec.schema import Spec
from mmcompress.stats import Latency

TARGET = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(x|ms)(\s+(p50|p95))?\s*")
"""A number, `x` or `ms`, and the statistic when it is not the median."""

WORDED_TARGET = re.compile(
    r"([0-9]*\.?[0-9]+)\s*(milliseconds?|msecs?|s|secs?|seconds?|times(?: faster)?|fold)"
)
"""A number and a unit that a person may write in place of `x` or `ms`."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be reached."""

    kind: Literal["speedup", "latency"]
    """A speed-up over the dense pipeline, or a latency."""
    value: float
    """The factor of a speed-up, or milliseconds."""
    statistic: Literal["p50", "p95"] = "p50"
    """The statistic of the latency that counts."""

    def compute_target_ms(self, dense: Latency) -> float:
        """Return the milliseconds that a request may take, given the latency of the dense
        pipeline."""
        if self.kind == "latency":
            return self.value
        dense_ms: float = getattr(dense, self.statistic)
        return dense_ms / self.value

    def compute_p95_ratio(self, dense: Latency) -> float:
        """Return the statistic over the median of the dense pipeline: predictors know medians
        only."""
        dense_ms: float = getattr(dense, self.statistic)
        return dense_ms / dense.p50


def split_targets(spec: Spec) -> tuple[str, ...]:
    """Return the targets of a spec: `1.5x,2x` are two."""
    parts = [part.strip() for part in spec.target.split(",")]
    return tuple(dict.fromkeys(parts))


def require_one_target(spec: Spec) -> Spec:
    """Return the spec.

    Raises:
        SpecError: It has several targets.
    """
    if len(split_targets(spec)) > 1:
        raise SpecError(f"target: one target, please, got '{shorten(spec.target)}'")
    return spec


def _suggest_target(text: str) -> str:
    """Return how a target in words is written, as the end of an error; empty where none is meant.

    Args:
        text: What stands in place of a target, such as `300 milliseconds` or `0.3 s`.
    """
    words = WORDED_TARGET.fullmatch(text.strip().lower())
    if words is None:
        return ""
    unit = words.group(2)
    if unit.startswith("s"):
        return f": did you mean {1e3 * float(words.group(1)):g}ms?"
    return f": did you mean {words.group(1)}{'ms' if unit.startswith('m') else 'x'}?"


def parse_target(text: str, place: str = "target: ") -> Goal:
    """Read `2x`, `12ms` or `12ms p95`.

    Args:
        text: The target.
        place: What comes before the message of an error.

    Raises:
        SpecError: The text is no target.
    """
    match = TARGET.fullmatch(str(text))
    value = float(match.group(1)) if match else 0.0
    is_speedup = match is not None and match.group(2) == "x"
    if match is None or value <= 0 or (is_speedup and value < 1):
        expected = "expected a target like 2x (at least 1x), 12ms or 12ms p95"
        raise SpecError(f"{place}{expected}, got '{shorten(text)}'{_suggest_target(str(text))}")
    return Goal(
        kind="speedup" if is_speedup else "latency",
        value=value,
        statistic="p95" if match.group(4) == "p95" else "p50",
    )
