"""Tells how long a run will take, and ends it in time: the stages, with their time around them.

The stages know only two things of it. One is the spec, which a plan may have cut. The other is the
second after which no further trial begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmcompress.distill.checkpoint import read_trained_seconds
from mmcompress.results.records import Summary
from mmcompress.run.compress.recipe import CompressedPipeline
from mmcompress.run.fitted_structure import FittedStructure, FitTolerances
from mmcompress.run.forecast import (
    Pace,
    RoundWork,
    forecast_round,
)
from mmcompress.run.known_records import describe_known_records
from mmcompress.run.next_artifact import Artifact, ArtifactLimits, Done, Retry
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.run_policy import MeasuringLimits, RunPolicy
from mmcompress.run.stages import RunStages
from mmcompress.run.time_plan import (
    describe_cuts,
    describe_lateness,
    describe_minutes_cut,
    describe_parts_cut,
    describe_sensitivity_cut,
    find_search_seconds,
    forecast_least_time,
    has_time_for_another,
    limit_effort,
    plan_parts,
    plan_round,
    plan_sensitivity_pairs,
    plan_training_minutes,
    require_enough_time,
)
from mmcompress.run.wanted_work import (
    compute_dense_share,
    describe_rounds,
    describe_whole_run,
    list_wanted_work,
)
from mmcompress.run.warnings import warn_of_time_cuts
from mmcompress.runtime.timing import Clock
from mmcompress.search.sensitivity.store import is_sensitivity_stored
from mmcompress.spec.durations import format_duration
from mmcompress.spec.schema import Spec
from mmcompress.spec.target import split_targets
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

MIN_TOLD_LATENESS = 0.05
"""Share of `--max-time` by which a run may end late without a word."""


@dataclass(kw_only=True)
class PacedRun:
    """The stages and the policy of one command, with a forecast and, if asked for, an end."""

    stages: RunStages
    """What the stages do."""
    policy: RunPolicy
    """What they decide by."""
    clock: Clock
    """The clock of the run."""
    start: float
    """Seconds on the clock at which the command began."""
    max_seconds: float = math.inf
    """Seconds that the command may take."""
    pace: Pace | None = None
    """The pace of this machine; None before it is measured, or where nothing is left to do."""
    targets_left: int = 1
    """Targets that are not finished, the one under way among them."""
    share: float = 1.0
    """Target / dense latency of the target under way."""
    wanted: RoundWork | None = None
    """What the spec asks for."""
    work: RoundWork | None = None
    """What is planned for the target under way."""
    ends_at: float = math.inf
    """Seconds on the clock at which the target under way is to be finished."""
    cuts: dict[str, str] = field(default_factory=dict)
    """What was cut of the target under way, in words, by stage."""
    shared_cut: str = ""
    """What was cut of the work that the targets share, in words."""
    is_evaluated: bool = False
    """Whether this command has evaluated an artifact of the target under way."""

    @property
    def is_bounded(self) -> bool:
        """Whether the command has to end in time."""
        return math.isfinite(self.max_seconds)

    @property
    def paced_stages(self) -> RunStages:
        """The stages with their time around them."""
        return replace(
            self.stages,
            prepare=self.prepare,
            fit=self.fit,
            compress=self.compress,
            evaluate=self.evaluate,
            report=self.report,
        )

    @property
    def paced_policy(self) -> RunPolicy:
        """The policy, which makes no further artifact that does not fit the time."""
        return replace(self.policy, next_step=self.next_step)

    def prepare(self, run: RunContext) -> PreparedRun:
        """Make what the targets share, and tell how long an artifact will take.

        Raises:
            SpecError: The time is too short whatever is cut.
        """
        folders = _list_target_folders(run)
        self.targets_left = len(folders)
        if all(folder.is_finished() for folder in folders):
            return self.stages.prepare(run)
        known = describe_known_records(run.shared, folders)
        if known:
            run.on_progress("resume", f"goes on with what the folder holds: {known}", None)
        spec = run.spec
        is_new = not run.shared.profile.exists() and run.reused_folder is None
        pace: Pace | None = None
        if not any(folder.fitted.exists() for folder in folders) and (self.is_bounded or is_new):
            pace = self.stages.measure_pace(run, None)
            if is_new:
                told = describe_whole_run(spec, pace, policy=self.policy)
                run.on_progress("forecast", told, None)
            if self.is_bounded:
                self._require_enough_time(run, pace)
                run = self._cut_sensitivity(run, pace)
        prepared = self.stages.prepare(run)
        # What comes after it goes by the spec as it was written.
        prepared = replace(prepared, run=replace(prepared.run, spec=spec))
        # A plan needs the pace of now: another program may have ended meanwhile.
        known_pace = None if self.is_bounded else pace
        self.pace = self.stages.measure_pace(prepared.run, prepared, known=known_pace)
        self._tell_forecast(prepared.run)
        return prepared

    def _cut_sensitivity(self, run: RunContext, pace: Pace) -> RunContext:
        """Return a run whose cuts are measured on as many pairs as its time allows."""
        if is_sensitivity_stored(run.shared):
            return run
        seconds = max(self._count_seconds_left(), 0.0)
        pairs = plan_sensitivity_pairs(pace, seconds=seconds)
        self.shared_cut = describe_sensitivity_cut(pace.sensitivity_pairs, pairs)
        if not self.shared_cut:
            return run
        run.on_progress("time", f"to end in time: {self.shared_cut}", None)
        data = replace(run.spec.data, sensitivity_pairs=pairs)
        return replace(run, spec=replace(run.spec, data=data))

    def _require_enough_time(self, run: RunContext, pace: Pace) -> None:
        """Raise `SpecError` when the time is too short even for the least work."""
        wanted = list_wanted_work(run.spec, self.policy)
        shares = [compute_dense_share(target, pace) for target in split_targets(run.spec)]
        is_measured = run.shared.profile.exists() or run.reused_folder is not None
        least = forecast_least_time(pace, wanted, shares=shares, is_measured=is_measured)
        warning = require_enough_time(
            least, self._count_seconds_left(), max_seconds=self.max_seconds
        )
        if warning:
            run.on_progress("time", warning, None)

    def _count_seconds_left(self) -> float:
        """Return the seconds that the command has left."""
        return self.start + self.max_seconds - self.clock.read_seconds()

    def _tell_forecast(self, run: RunContext) -> None:
        """Tell how long an artifact for every target takes, and what another one adds."""
        pace = self.pace
        if pace is None:
            return
        for sentence in describe_rounds(run.spec, pace, policy=self.policy):
            run.on_progress("forecast", sentence, None)

    def reach(self, run: RunContext, *, reach: Callable[[RunContext], Summary]) -> Summary:
        """Reach one target in its part of the time.

        Args:
            run: The run with one target.
            reach: Makes artifacts for it by the paced stages and policy.
        """
        planned_run = self._plan_target(run)
        try:
            return self._add_cuts(reach(planned_run))
        finally:
            self.targets_left -= 1
            late_seconds = -self._count_seconds_left()
            if not self.targets_left and late_seconds > MIN_TOLD_LATENESS * self.max_seconds:
                took = format_duration(self.max_seconds + late_seconds)
                given = format_duration(self.max_seconds)
                run.on_progress("time", f"the run took {took}, --max-time was {given}", None)

    def _plan_target(self, run: RunContext) -> RunContext:
        """Return the run with the work that fits its part of the time."""
        self.cuts = {}
        self.is_evaluated = False
        if self.pace is None:
            return run
        wanted = list_wanted_work(run.spec, self.policy)
        self.wanted = wanted
        self.work = wanted
        self.share = compute_dense_share(run.spec.target, self.pace)
        self.ends_at = math.inf
        if not self.is_bounded:
            return run
        seconds = max(self._count_seconds_left(), 0.0) / max(self.targets_left, 1)
        self.ends_at = self.clock.read_seconds() + seconds
        work = plan_round(self.pace, wanted, share=self.share, seconds=seconds)
        folder = run.folder.next if run.folder.has_next() else run.folder
        if folder.fitted.exists() and not folder.summary.exists():
            # This structure is made, not another one.
            stored = read_record(FittedStructure, folder.fitted)
            work = limit_effort(work, effort=stored.search_effort)
        self.work = work
        cuts = describe_cuts(wanted, work)
        if cuts:
            self.cuts["search"] = "; ".join(cuts)
            run.on_progress("time", f"to end in time: {self.cuts['search']}", None)
        planned_seconds = forecast_round(self.pace, work, share=self.share).total
        if planned_seconds > seconds:
            told = describe_lateness(planned_seconds, seconds_left=seconds)
            run.on_progress("time", told, None)
        return replace(run, spec=_cut_spec(run.spec, work))

    def fit(
        self,
        run: RunContext,
        prepared: PreparedRun,
        *,
        plan: Retry | None,
        tolerances: FitTolerances | None,
    ) -> FittedStructure:
        """Search and measure a structure until the time of the search is over."""
        if self.pace and self.work and self.is_bounded:
            seconds = find_search_seconds(
                self.pace,
                self.work,
                share=self.share,
                seconds=self.ends_at - self.clock.read_seconds(),
            )
            run = replace(run, search_ends_at=self.clock.read_seconds() + seconds)
            tolerances = replace(tolerances or self.policy.fit, max_attempts=self.work.attempts)
        fitted = self.stages.fit(run, prepared, plan=plan, tolerances=tolerances)
        self._tell_rest(run, after="fit")
        return fitted

    def compress(
        self,
        run: RunContext,
        prepared: PreparedRun,
        *,
        fitted: FittedStructure,
        earlier: RunFolder | None,
    ) -> CompressedPipeline:
        """Make the artifact; the minutes of its training are known before it begins."""
        if self.pace and self.wanted and self.is_bounded and not run.folder.units.exists():
            minutes = plan_training_minutes(
                self.pace,
                self.wanted,
                share=self.share,
                seconds=self.ends_at - self.clock.read_seconds(),
                trained_seconds=read_trained_seconds(run.folder.training_checkpoint),
            )
            self._note_cut(run, "training", cut=describe_minutes_cut(self.wanted.minutes, minutes))
            run = replace(run, spec=_cut_minutes(run.spec, minutes))
        compressed = self.stages.compress(run, prepared, fitted=fitted, earlier=earlier)
        self._tell_rest(run, after="training")
        return compressed

    def evaluate(
        self,
        run: RunContext,
        prepared: PreparedRun,
        *,
        fitted: FittedStructure,
        compressed: CompressedPipeline,
        measuring: MeasuringLimits | None,
    ) -> Summary:
        """Measure and judge the artifact, in as many parts as there is time for."""
        if self.pace and self.wanted and measuring and self.is_bounded:
            parts = plan_parts(
                self.pace,
                self.wanted,
                share=self.share,
                seconds=self.ends_at - self.clock.read_seconds(),
            )
            self._note_cut(run, "measuring", cut=describe_parts_cut(self.wanted.parts, parts))
            measuring = replace(measuring, max_parts=parts)
        summary = self.stages.evaluate(
            run, prepared, fitted=fitted, compressed=compressed, measuring=measuring
        )
        self.is_evaluated = True
        return summary

    def next_step(self, history: Sequence[Artifact], limits: ArtifactLimits) -> Retry | Done:
        """Decide whether another artifact is made: not if it does not fit the time."""
        step = self.policy.next_step(history, limits)
        if isinstance(step, Done) or self.pace is None or self.wanted is None:
            return step
        seconds = self.ends_at - self.clock.read_seconds()
        if has_time_for_another(self.pace, self.wanted, share=self.share, seconds=seconds):
            return step
        self.cuts["another"] = "no further artifact, which would lie nearer to the target"
        return Done(reason="another artifact would not be finished in time (--max-time)")

    def report(self, summary: Summary, folder: Path) -> Path:
        """Write the report, with what was cut."""
        whole_summary = self._add_cuts(summary)
        if whole_summary != summary:
            write_record(RunFolder(path=folder).summary, whole_summary)
        return self.stages.report(whole_summary, folder)

    def _add_cuts(self, summary: Summary) -> Summary:
        """Return a summary with what this command cut of its work."""
        cuts = [cut for cut in (self.shared_cut, *self.cuts.values()) if cut]
        if not cuts or not self.is_evaluated:
            return summary
        cut_summary = replace(summary, time_cuts=tuple(cuts))
        earlier = warn_of_time_cuts(summary)
        others = [warning for warning in summary.warnings if warning not in earlier]
        return replace(cut_summary, warnings=(*warn_of_time_cuts(cut_summary), *others))

    def _note_cut(self, run: RunContext, stage: str, *, cut: str) -> None:
        """Keep what is cut of a stage, and tell it; nothing where it is empty."""
        self.cuts.pop(stage, None)
        if cut:
            self.cuts[stage] = cut
            run.on_progress("time", f"to end in time: {cut}", None)

    def _tell_rest(self, run: RunContext, *, after: str) -> None:
        """Tell how long the rest will take after a stage."""
        if self.pace is None or self.work is None:
            return
        forecast = forecast_round(self.pace, self.work, share=self.share)
        rest = forecast.after_training
        if after == "fit":
            rest += forecast.training
        else:
            rest -= forecast.export
        text = f"about {format_duration(rest)} left for this artifact"
        if rest > self.ends_at - self.clock.read_seconds():
            text += ": it will end after --max-time"
        if self.targets_left > 1:
            others = (self.targets_left - 1) * forecast.total
            text += f", and {format_duration(others)} for the targets after it"
        run.on_progress("time", text, None)


def _list_target_folders(run: RunContext) -> list[RunFolder]:
    """Return the folder of every target."""
    targets = split_targets(run.spec)
    if len(targets) == 1:
        return [run.folder]
    return [run.folder.get_target_folder(target) for target in targets]


def _cut_spec(spec: Spec, work: RoundWork) -> Spec:
    """Return a spec that asks for some work."""
    search = replace(
        spec.search,
        trials=work.trials,
        level_switches=work.level_switches,
        linearization_rounds=work.linearization_rounds,
        short_finetunings=work.short_finetunings,
    )
    return _cut_minutes(replace(spec, search=search), work.minutes)


def _cut_minutes(spec: Spec, minutes: float) -> Spec:
    """Return a spec that asks for some minutes of training."""
    return replace(spec, distill=replace(spec.distill, minutes=minutes))
