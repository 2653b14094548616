"""How finished runs differ from one of them, in relative latency and in quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmcompress.errors import DataError
from mmcompress.results.records import Summary
from mmcompress.stats import SplitScores, estimate_paired_difference

MIN_EQUAL_SCORES = 0.9
"""Share of the inputs that the dense pipeline scores alike in two runs over the same inputs: on
another processor, rounding changes a few answers."""


@dataclass(frozen=True, kw_only=True)
class AllowedDifferences:
    """By how much a run may be behind the reference."""

    latency: float | None = None
    """Share by which its latency may be longer, as a ratio to its dense pipeline; None: any."""
    drop: float | None = None
    """Share of the test inputs by which any metric may be lower, 0..1; None: any."""


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """How a run differs from the reference."""

    latency: float
    """Share by which its latency is longer; negative: shorter. Each latency is a ratio to the dense
    pipeline that answered in turn."""
    latency_margin: float
    """Share that `latency` may be off by: what both measurements may be, 95 %."""
    drops: dict[str, float]
    """Share of the test inputs by which each metric is lower; negative: higher."""
    drop_margins: dict[str, float]
    """Share of the test inputs that each of `drops` may be off by, 95 %."""
    is_paired: bool = False
    """Whether these margins are of differences input by input."""
    problems: tuple[str, ...]
    """What is not allowed, in words."""

    @property
    def worst_metric(self) -> str:
        """The metric with the largest drop; empty without metrics."""
        return max(self.drops, key=self.drops.__getitem__, default="")

    @property
    def worst_drop(self) -> float:
        """The largest drop of a metric; 0 without metrics."""
        return self.drops.get(self.worst_metric, 0.0)

    @property
    def worst_drop_margin(self) -> float:
        """Share of the test inputs that the largest drop may be off by."""
        return self.drop_margins.get(self.worst_metric, 0.0)


def check_comparable(runs: Mapping[str, Summary]) -> None:
    """Check that runs are of one pipeline and are judged alike.

    Args:
        runs: The summaries by name; at least one.

    Raises:
        DataError: Two of them can't be compared.
    """
    names = list(runs)
    first = runs[names[0]]
    for name in names[1:]:
        other = runs[name]
        if other.pipeline != first.pipeline:
            raise DataError(
                f"{name}: it is of the pipeline '{other.pipeline}', and {names[0]} of "
                f"'{first.pipeline}': they can't be compared"
            )
        if set(other.compressed.quality) != set(first.compressed.quality):
            raise DataError(
                f"{name}: it is judged by {', '.join(other.compressed.quality) or 'nothing'}, and "
                f"{names[0]} by {', '.join(first.compressed.quality) or 'nothing'}: they can't be "
                "compared"
            )


def list_unlike_settings(run: Summary, reference: Summary) -> list[str]:
    """List in words what else than the models may make two runs differ.

    A folder of data may lie elsewhere, so its path is no difference. Targets and seeds are told in
    other places.
    """
    unlike: list[str] = []
    if _select_data(run) != _select_data(reference):
        unlike.append("its data are of another kind, or have other options")
    if _list_input_counts(run) != _list_input_counts(reference):
        unlike.append("it was judged on another number of inputs")
    effort = run.settings.get("effort")
    if effort != reference.settings.get("effort"):
        unlike.append(f"its effort is {effort}, not {reference.settings.get('effort')}")
    version = run.versions.get("onnxruntime")
    if version != reference.versions.get("onnxruntime"):
        unlike.append(f"it has ONNX Runtime {version}, not {reference.versions.get('onnxruntime')}")
    return unlike


def _list_input_counts(run: Summary) -> list[int]:
    """List the numbers of inputs that a run was judged on, by metric."""
    return [run.compressed.quality[name].n for name in sorted(run.compressed.quality)]


def _select_data(run: Summary) -> dict[str, object]:
    """Return what the spec of a run says of its data, without where they lie."""
    data = run.settings.get("data", {})
    options = {key: value for key, value in data.get("options", {}).items() if key != "path"}
    return {"kind": data.get("kind"), "options": options, "labels": data.get("labels")}


def are_same_inputs(one: SplitScores, other: SplitScores) -> bool:
    """Return whether two runs were judged on the same inputs, in the same order.

    The dense pipeline then has the same score for nearly every one of them.

    Args:
        one: Scores of a run, input by input.
        other: Scores of another run.
    """
    if set(one.baseline) != set(other.baseline):
        return False
    for name, scores in one.baseline.items():
        others = other.baseline[name]
        count = len(scores.numerators)
        if count != len(others.numerators) or scores.denominators != others.denominators:
            return False
        pairs = zip(scores.numerators, others.numerators, strict=True)
        if sum(first == second for first, second in pairs) < MIN_EQUAL_SCORES * count:
            return False
    return True


def find_difference(
    run: Summary,
    reference: Summary,
    *,
    allowed: AllowedDifferences,
    scores: tuple[SplitScores, SplitScores] | None = None,
) -> RunDifference:
    """Find how a run differs from the reference.

    The difference itself decides what is not allowed. Its margin is told, so that nobody takes
    chance for a regression.

    Args:
        run: The run.
        reference: The run that it is compared with.
        allowed: By how much it may be behind.
        scores: Scores of the run and of the reference over the same inputs. The margins of quality
            are then paired, and so far narrower. None: the inputs are others, or not known.
    """
    latency = reference.speedup / run.speedup - 1
    latency_margin = math.hypot(run.latency_margin, reference.latency_margin)
    drops: dict[str, float] = {}
    drop_margins: dict[str, float] = {}
    problems: list[str] = []
    if allowed.latency is not None and latency > allowed.latency:
        problems.append(
            f"its latency is {latency:+.1%}, relative to the dense pipeline; at most "
            f"{allowed.latency:+.1%} is allowed"
            + _describe_chance(latency - allowed.latency, latency_margin, unit="%")
        )
    for name, quality in run.compressed.quality.items():
        before = reference.compressed.quality[name]
        drops[name] = before.share_right - quality.share_right
        drop_margins[name] = math.hypot(quality.margin, before.margin)
        if scores is not None:
            drop_margins[name] = _estimate_paired_margin(*scores, metric=name)
        if allowed.drop is not None and drops[name] > allowed.drop:
            problems.append(
                f"{name} is {100 * drops[name]:.1f} points lower; at most "
                f"{100 * allowed.drop:.1f} are allowed"
                + _describe_chance(drops[name] - allowed.drop, drop_margins[name], unit="points")
            )
    return RunDifference(
        latency=latency,
        latency_margin=latency_margin,
        drops=drops,
        drop_margins=drop_margins,
        is_paired=scores is not None,
        problems=tuple(problems),
    )


def _estimate_paired_margin(run: SplitScores, reference: SplitScores, *, metric: str) -> float:
    """Estimate what the difference of a metric may be off by, input by input."""
    _, margin = estimate_paired_difference(
        [{metric: reference.compressed[metric]}], [{metric: run.compressed[metric]}]
    )
    return margin


def name_devices(runs: Mapping[str, Summary]) -> dict[str, str]:
    """Name every device that runs were measured on, by its fingerprint.

    Milliseconds of two devices never stand in one column.
    """
    names: dict[str, str] = {}
    for summary in runs.values():
        if summary.device not in names:
            name = str(summary.cpu.get("name", "?"))
            is_taken = name in names.values()
            names[summary.device] = f"{name} ({len(names) + 1})" if is_taken else name
    return names


def _describe_chance(excess: float, margin: float, *, unit: str) -> str:
    """Tell that chance may have made an excess; empty where it did not."""
    if excess > margin:
        return ""
    return f" (may be chance: give or take {100 * margin:.1f} {unit})"
