"""What is cut so that a run ends in time (`--max-time`). A pure policy. No torch.

What every artifact needs is taken from the time first: one measured structure, a short training,
the export, two parts of measuring, the judging. What is left is shared out: trials, rounds,
short trainings, attempts, minutes of training and further parts are all cut by the same share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmcompress.errors import SpecError
from mmcompress.run.forecast import (
    Pace,
    RoundWork,
    count_base_parts,
    forecast_export,
    forecast_judging,
    forecast_next_round,
    forecast_part,
    forecast_round,
)
from mmcompress.spec.durations import format_duration

PLAN_RESERVE = 1.15
"""Factor on a forecast that has to fit: it may be wrong by so much before a run ends late."""

REFUSED_FACTOR = 3.0
"""Factor by which the least work must exceed a time for it to be refused.

A busy machine makes forecasts too long. To refuse what can be done costs a person more than to try
what can't. A run that goes on is cut to fit, and tells what it cut.
"""

MIN_TRIALS = 4
"""Proposals that every search makes, unless the spec asks for fewer."""

MIN_TRAINING_MINUTES = 0.2
"""Minutes that every training has, unless the spec asks for fewer."""

LEVELS_PER_BLOCK = 4
"""Cuts of a block whose loss is measured for the sensitivity."""

STATISTICS_PASSES = 4
"""Forward passes over the calibration pairs that moments and importance last as long as."""

MIN_SENSITIVITY_PAIRS = 8
"""Pairs that every cut is measured on, unless the spec asks for fewer."""

SENSITIVITY_SHARE = 0.3
"""Share of a time that the cuts are measured in at most. The search needs them to choose well, and
the artifact needs the rest."""

MIN_COMPARED_TRAININGS = 2
"""Short trainings below which there is nothing to compare."""

PLAN_STEPS = 64
"""Shares of the work, from nothing to all of it, that are tried."""


def plan_least_work(pace: Pace, wanted: RoundWork) -> RoundWork:
    """Return the least work that makes an artifact."""
    return RoundWork(
        trials=min(wanted.trials, MIN_TRIALS),
        level_switches=0,
        linearization_rounds=0,
        short_finetunings=0,
        attempts=1,
        minutes=min(wanted.minutes, MIN_TRAINING_MINUTES),
        parts=min(wanted.parts, count_base_parts(pace)),
    )


def plan_round(pace: Pace, wanted: RoundWork, *, share: float, seconds: float) -> RoundWork:
    """Return the most work for an artifact that is forecast to fit a time.

    Args:
        pace: The pace of this machine.
        wanted: What the spec asks for.
        share: Target / latency of the dense pipeline.
        seconds: Seconds that are left for the artifact.

    Returns:
        What is wanted where it fits; the least work where nothing does.
    """
    least = plan_least_work(pace, wanted)
    for step in range(PLAN_STEPS, 0, -1):
        work = _mix_work(least, wanted, level=step / PLAN_STEPS)
        forecast = forecast_round(pace, work, share=share)
        if PLAN_RESERVE * forecast.total <= seconds:
            return work
    return least


def _mix_work(least: RoundWork, wanted: RoundWork, *, level: float) -> RoundWork:
    """Return the work at a level between the least and what is wanted, 0 .. 1."""

    def mix_count(low: int, high: int) -> int:
        return low + int(level * (high - low))

    trainings = mix_count(least.short_finetunings, wanted.short_finetunings)
    if trainings < min(MIN_COMPARED_TRAININGS, wanted.short_finetunings):
        trainings = 0
    return RoundWork(
        trials=mix_count(least.trials, wanted.trials),
        level_switches=mix_count(least.level_switches, wanted.level_switches),
        linearization_rounds=mix_count(least.linearization_rounds, wanted.linearization_rounds),
        short_finetunings=trainings,
        attempts=mix_count(least.attempts, wanted.attempts),
        minutes=least.minutes + level * (wanted.minutes - least.minutes),
        parts=mix_count(least.parts, wanted.parts),
    )


def plan_training_minutes(
    pace: Pace, wanted: RoundWork, *, share: float, seconds: float, trained_seconds: float = 0.0
) -> float:
    """Return the minutes of a training that is due now.

    Args:
        pace: The pace of this machine.
        wanted: What the spec asks for.
        share: Target / latency of the dense pipeline.
        seconds: Seconds that are left for the artifact.
        trained_seconds: Seconds that an interrupted training has behind it; they count.
    """
    least = plan_least_work(pace, wanted)
    forecast = forecast_round(pace, least, share=share)
    # The forecast of the least training holds its refit, too.
    besides = forecast.after_training + max(forecast.training - 60 * least.minutes, 0.0)
    minutes = (seconds / PLAN_RESERVE - besides + trained_seconds) / 60
    return min(max(minutes, least.minutes), wanted.minutes)


def plan_parts(pace: Pace, wanted: RoundWork, *, share: float, seconds: float) -> int:
    """Return the parts of the measuring that is due now, for the seconds that are left."""
    left = seconds / PLAN_RESERVE - forecast_judging(pace, share=share)
    part_seconds = forecast_part(pace, share=share)
    if part_seconds <= 0:
        return wanted.parts
    base_parts = min(count_base_parts(pace), wanted.parts)
    return min(max(int(left / part_seconds), base_parts), wanted.parts)


def plan_sensitivity_pairs(pace: Pace, *, seconds: float) -> int:
    """Return the pairs that every cut is measured on in a run that has some seconds in all."""
    pair_seconds = LEVELS_PER_BLOCK * pace.blocks * pace.cut_pair_seconds
    if pair_seconds <= 0:
        return pace.sensitivity_pairs
    affordable = int(SENSITIVITY_SHARE * seconds / PLAN_RESERVE / pair_seconds)
    return min(max(affordable, MIN_SENSITIVITY_PAIRS), pace.sensitivity_pairs)


def find_search_seconds(pace: Pace, wanted: RoundWork, *, share: float, seconds: float) -> float:
    """Return the seconds after which no further trial begins, so that an artifact can be made."""
    least = plan_least_work(pace, wanted)
    forecast = forecast_round(pace, least, share=share)
    kept = forecast.fit + forecast.training + forecast.after_training
    return max(seconds - PLAN_RESERVE * kept, 0.0)


def has_time_for_another(pace: Pace, wanted: RoundWork, *, share: float, seconds: float) -> bool:
    """Return whether another artifact of the least work is forecast to fit."""
    least = plan_least_work(pace, wanted)
    return PLAN_RESERVE * forecast_next_round(pace, least, share=share).total <= seconds


@dataclass(frozen=True, kw_only=True)
class LeastTime:
    """The least that a whole run takes."""

    preparation: float
    """Seconds of the export, the measuring and the sensitivity of the dense pipeline."""
    artifacts: float
    """Seconds of the artifacts of all targets, with the least work."""

    @property
    def total(self) -> float:
        """Seconds of both."""
        return self.preparation + self.artifacts


def forecast_least_time(
    pace: Pace, wanted: RoundWork, *, shares: Sequence[float], is_measured: bool = False
) -> LeastTime:
    """Forecast the least that a whole run takes.

    Args:
        pace: The pace of this machine.
        wanted: What the spec asks for.
        shares: Target / latency of the dense pipeline, of every target.
        is_measured: Whether the dense pipeline and its cuts are on record already.
    """
    least = plan_least_work(pace, wanted)
    artifacts = sum(forecast_round(pace, least, share=share).total for share in shares)
    fewest_pairs = min(pace.sensitivity_pairs, MIN_SENSITIVITY_PAIRS)
    preparation = forecast_preparation(replace(pace, sensitivity_pairs=fewest_pairs))
    return LeastTime(preparation=0.0 if is_measured else preparation, artifacts=artifacts)


def require_enough_time(least: LeastTime, seconds_left: float, *, max_seconds: float) -> str:
    """Raise `SpecError` when a run can't end in time whatever is cut.

    Args:
        least: The least that the run takes.
        seconds_left: Seconds that it has left.
        max_seconds: Seconds that the command may take.

    Returns:
        A warning where it may end late; empty where it is expected to end in time.
    """
    if least.total <= seconds_left:
        return ""
    if least.total <= REFUSED_FACTOR * seconds_left:
        return (
            f"--max-time {format_duration(max_seconds)} may be too short: "
            f"{format_duration(seconds_left)} are left, and the least work is forecast to take "
            f"{format_duration(least.total)}. The run goes on with it, and may end late"
        )
    given_text = format_duration(max_seconds)
    left_text = format_duration(seconds_left) if seconds_left > 0 else "none"
    # Loading takes its time, too.
    spent = "" if left_text == given_text else f"{left_text} of it left: "
    raise SpecError(
        f"--max-time {given_text}: too short: {spent}measuring the dense pipeline and its cuts "
        f"takes about {format_duration(least.preparation)}, and the least artifact "
        f"{format_duration(least.artifacts)}: give at least {format_duration(least.total)}. "
        "Fewer pairs take less (data.calibration, data.validation_pairs)"
    )


def forecast_preparation(pace: Pace) -> float:
    """Return the seconds of the export, the measuring and the sensitivity of the dense pipeline.

    Blocks that the device table lacks come on top: nobody knows them before it is opened.
    """
    measuring = pace.requests * pace.dense_ms / 1e3
    cuts = LEVELS_PER_BLOCK * pace.blocks * pace.sensitivity_pairs * pace.cut_pair_seconds
    statistics = STATISTICS_PASSES * pace.calibration_pairs * pace.teacher_pair_seconds
    return forecast_export(pace, share=1.0) + measuring + cuts + statistics


def describe_lateness(seconds: float, *, seconds_left: float) -> str:
    """Return that the least work for an artifact will end after `--max-time`, in words."""
    left = format_duration(seconds_left) if seconds_left > 0 else "nothing"
    return (
        f"{left} of --max-time is left for this artifact, and the least work takes about "
        f"{format_duration(seconds)}: it will end late"
    )


def describe_cuts(wanted: RoundWork, planned: RoundWork) -> tuple[str, ...]:
    """Return what a plan has less of than was wanted, in words."""
    names = {
        "trials": ("trial", "trials"),
        "level_switches": ("level switch", "level switches"),
        "linearization_rounds": ("linearization round", "linearization rounds"),
        "short_finetunings": ("short training", "short trainings"),
        "attempts": ("measured structure at most", "measured structures at most"),
    }
    cuts = []
    for field_name, (one, several) in names.items():
        asked: int = getattr(wanted, field_name)
        count: int = getattr(planned, field_name)
        if count < asked:
            cuts.append(f"{count} {one if count == 1 else several} in place of {asked}")
    return tuple(cuts)


def describe_sensitivity_cut(wanted: int, planned: int) -> str:
    """Return on how many pairs fewer every cut is measured, in words; empty where on none."""
    if planned >= wanted:
        return ""
    return f"every cut measured on {planned} pairs in place of {wanted}"


def describe_minutes_cut(wanted: float, planned: float) -> str:
    """Return what a plan trains less than was wanted, in words; empty where it is nothing."""
    if planned >= wanted:
        return ""
    return f"{planned:.1f} minutes of training in place of {wanted:g}"


def describe_parts_cut(wanted: int, planned: int) -> str:
    """Return what is measured less than was wanted, in words; empty where it is nothing."""
    if planned >= wanted:
        return ""
    return f"at most {planned} parts of measuring in place of {wanted}"


def limit_effort(work: RoundWork, *, effort: int) -> RoundWork:
    """Return work whose trials and level switches come to no more than was searched before.

    A structure that is on record stays valid so: more trials would search another one.
    """
    switches = min(work.level_switches, effort)
    return replace(work, level_switches=switches, trials=min(work.trials, effort - switches))
