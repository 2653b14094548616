"""TODO."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mmcompress.errors import SpecError
from mmcompress.spec.schema import Spec
from mmcompress.stats import Latency


def split_targets(spec: Spec) -> tuple[str, ...]:
    """The targets of a spec: `1.5x,2x` are two."""
    return tuple(dict.fromkeys(part.strip() for part in str(spec.target).split(",")))


def require_one_target(spec: Spec) -> Spec:
    """The spec, if it has one target. Raises `SpecError`."""
    if len(split_targets(spec)) > 1:
        raise SpecError(f"target: one target, please, got '{spec.target}'")
    return spec


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be reached: a `speedup` over the dense pipeline or a `latency` in ms, of the p50 or the p95."""

    kind: str
    value: float
    statistic: str = "p50"

    def target_ms(self, dense: Latency) -> float:
        """The budget, given what the dense pipeline takes."""
        return getattr(dense, self.statistic) / self.value if self.kind == "speedup" else self.value

    def p95_ratio(self, dense: Latency) -> float:
        """How far the statistic lies from the median: of the dense pipeline, for predictors know medians alone."""
        return getattr(dense, self.statistic) / dense.p50


def parse_target(text: str, error: Exception | None = None) -> Goal:
    """`2x`, `12ms`, `12ms p95`. Raises `SpecError`."""
    m = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(x|ms)(\s+(p50|p95))?\s*", str(text))
    if not m or float(m.group(1)) <= 0 or (m.group(2) == "x" and float(m.group(1)) < 1):
        raise SpecError(
            f"{error or 'target: '}expected a target like 2x (at least 1x), 12ms or 12ms p95, got '{text}'"
        )
    return Goal(
        kind="speedup" if m.group(2) == "x" else "latency",
        value=float(m.group(1)),
        statistic=m.group(4) or "p50",
    )
