"""The work that a spec asks for, and how long it takes at the pace of this machine."""

from __future__ import annotations

from dataclasses import replace

from mmcompress.run.forecast import (
    Pace,
    RoundForecast,
    RoundWork,
    forecast_next_round,
    forecast_round,
)
from mmcompress.run.run_policy import RunPolicy
from mmcompress.run.time_plan import (
    describe_cuts,
    describe_minutes_cut,
    describe_parts_cut,
    describe_sensitivity_cut,
    forecast_least_time,
    forecast_preparation,
    plan_round,
    plan_sensitivity_pairs,
    require_enough_time,
)
from mmcompress.spec.durations import format_duration
from mmcompress.spec.schema import Spec
from mmcompress.spec.target import parse_target, split_targets

UNTIMED_BLOCKS = "Blocks of sizes that this machine has not timed yet take some minutes more"
"""Told with every forecast made before the device table is opened: it can't know them."""

MIN_TARGET_SHARE_OF_DENSE = 0.01
"""Target / dense latency that forecasts go down to."""


def list_wanted_work(spec: Spec, policy: RunPolicy) -> RoundWork:
    """List the work that a spec and a policy ask for."""
    max_parts = policy.measuring.max_parts if policy.measuring else spec.measure.max_parts
    trials = spec.search.trials
    level_switches = spec.search.level_switches
    if spec.search.max_trials:
        trials = min(trials, spec.search.max_trials)
        level_switches = min(level_switches, spec.search.max_trials - trials)
    return RoundWork(
        trials=trials,
        level_switches=level_switches,
        linearization_rounds=spec.search.linearization_rounds,
        short_finetunings=spec.search.short_finetunings,
        attempts=policy.fit.max_attempts,
        minutes=spec.distill.minutes,
        parts=max(max_parts, 2 + len(spec.data.report)),
    )


def compute_dense_share(target: str, pace: Pace) -> float:
    """Return target / dense latency."""
    goal = parse_target(target)
    share = 1 / goal.value if goal.kind == "speedup" else goal.value / max(pace.dense_ms, 1e-9)
    return min(max(share, MIN_TARGET_SHARE_OF_DENSE), 1.0)


def describe_rounds(spec: Spec, pace: Pace, *, policy: RunPolicy) -> list[str]:
    """Describe how long an artifact for every target takes, and what another one adds."""
    wanted = list_wanted_work(spec, policy)
    sentences: list[str] = []
    for target in split_targets(spec):
        share = compute_dense_share(target, pace)
        first = forecast_round(pace, wanted, share=share)
        another = forecast_next_round(pace, wanted, share=share)
        sentences.append(
            f"{target}: an artifact takes about {format_duration(first.total)} "
            f"({_describe_stages(first)}); another one adds {format_duration(another.total)}"
        )
    return sentences


def describe_preparation(pace: Pace) -> str:
    """Describe how long a run takes before the search of its first target."""
    return (
        f"Before that, measuring the dense pipeline and its cuts takes about "
        f"{format_duration(forecast_preparation(pace))}. {UNTIMED_BLOCKS}"
    )


def describe_cut_run(spec: Spec, pace: Pace, *, policy: RunPolicy, max_seconds: float) -> list[str]:
    """Describe what a run cuts to end in a time, before it begins.

    Args:
        spec: The spec.
        pace: The pace of this machine.
        policy: What the run decides by.
        max_seconds: Seconds that the whole run may take.

    Raises:
        SpecError: The time is too short whatever is cut.
    """
    pairs = plan_sensitivity_pairs(pace, seconds=max_seconds)
    preparation = forecast_preparation(replace(pace, sensitivity_pairs=pairs))
    wanted = list_wanted_work(spec, policy)
    targets = split_targets(spec)
    shares = [compute_dense_share(target, pace) for target in targets]
    warning = require_enough_time(
        forecast_least_time(pace, wanted, shares=shares), max_seconds, max_seconds=max_seconds
    )
    cut = describe_sensitivity_cut(pace.sensitivity_pairs, pairs)
    sentences = [sentence for sentence in (warning, cut) if sentence]
    seconds = max(max_seconds - preparation, 0.0) / len(targets)
    for target, share in zip(targets, shares, strict=True):
        work = plan_round(pace, wanted, share=share, seconds=seconds)
        cuts = [*describe_cuts(wanted, work), describe_minutes_cut(wanted.minutes, work.minutes)]
        cuts.append(describe_parts_cut(wanted.parts, work.parts))
        told = "; ".join(cut for cut in cuts if cut) or "nothing is cut"
        sentences.append(f"{target}, within {format_duration(max_seconds)}: {told}")
    return sentences


def describe_whole_run(spec: Spec, pace: Pace, *, policy: RunPolicy) -> str:
    """Describe how long a run takes until every target has an artifact, before it begins."""
    wanted = list_wanted_work(spec, policy)
    preparation = forecast_preparation(pace)
    artifacts = 0.0
    for target in split_targets(spec):
        share = compute_dense_share(target, pace)
        artifacts += forecast_round(pace, wanted, share=share).total
    return (
        f"about {format_duration(preparation + artifacts)} until {spec.target} is made: "
        f"{format_duration(preparation)} to measure the dense pipeline and its cuts, then "
        f"{format_duration(artifacts)}. {UNTIMED_BLOCKS}"
    )


def _describe_stages(forecast: RoundForecast) -> str:
    """Return the stages of a forecast in words."""
    stages = {
        "search": forecast.search,
        "short trainings": forecast.short_trainings,
        "fit": forecast.fit,
        "training": forecast.training,
        "export": forecast.export,
        "measuring": forecast.measuring,
        "judging": forecast.judging,
    }
    return ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in stages.items())
