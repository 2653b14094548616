"""What an earlier run left of a target, and which of two artifacts stays in the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mmcompress.results.records import Summary
from mmcompress.results.target_met import compute_corrected_target_share
from mmcompress.run.artifact_journal import note_artifacts, note_choice
from mmcompress.run.check_records import set_damaged_artifact_aside
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.next_artifact import Artifact, ArtifactLimits, Retry, plan_artifact
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.move_artifacts import (
    begin_next,
    discard_next,
    finish_interrupted_move,
    promote_next,
    remove_artifact,
)

IsBetter = Callable[[Summary, Summary], bool]
"""Whether the first of two artifacts is kept rather than the second."""


@dataclass(frozen=True, kw_only=True)
class TargetState:
    """Where a target stands when a run begins or goes on."""

    folder: RunFolder
    """The folder with the artifact that is made, or that is finished."""
    history: tuple[Artifact, ...]
    """The best artifact so far, if another one is made."""
    fitted: FittedStructure | None
    """The fitted structure on record, if there is one."""
    finished: bool
    """The artifact on record has its summary, and no other one was being made."""
    plan: Retry
    """How the artifact is made that is due now."""

    def can_reuse(self, run: RunContext, fitted: FittedStructure) -> bool:
        """Return whether the artifact on record is the result, so that nothing is made or measured.

        The summary of a run for another device is always made anew: that device may have measured
        the artifact since.
        """
        if not self._is_unchanged(fitted) or run.device_readings or not run.folder.has_bundle():
            return False
        summary = read_record(Summary, run.folder.summary)
        judged_limit = summary.retained.limit if summary.retained else None
        if judged_limit != run.spec.limits.retained:
            return False
        # What went wrong may have been mended: a metric, a picture of a further split.
        return not summary.skipped

    def is_only_remade(self, run: RunContext, fitted: FittedStructure, *, summary: Summary) -> bool:
        """Return whether an artifact that was finished before was only written and judged again.

        No other one is made after it, unless another device has measured it since: its figures may
        miss the target.
        """
        measured_by_device = run.device_readings is not None and summary.compressed.latency_ms.n > 0
        return self._is_unchanged(fitted) and not measured_by_device

    def _is_unchanged(self, fitted: FittedStructure) -> bool:
        """Return whether the finished artifact was made of this very structure."""
        return self.finished and fitted == self.fitted


def resume_target(run: RunContext) -> TargetState:
    """Read what the run folder holds of a target, after a move that was cut off is completed.

    Damaged files are set aside first, so that they are made again. Where more trials are asked for,
    a finished artifact stays in its place until something better is made.
    """
    best = run.folder.best
    limits = ArtifactLimits.from_spec(run.spec)
    finish_interrupted_move(best)
    set_damaged_artifact_aside(run)
    if best.has_next() and not best.summary.exists():
        # The best one is damaged, so this one is the only one.
        remove_artifact(best)
        promote_next(best, goes_on=False)
    folder = best.next if best.has_next() else best
    fitted = read_record(FittedStructure, folder.fitted) if folder.fitted.exists() else None
    finished = best.is_finished()
    if finished and fitted and fitted.search_effort < limits.search_effort:
        run.on_progress(
            "search",
            f"the finished artifact was chosen among {fitted.search_effort} trials and level "
            f"switches, and {limits.search_effort} are asked for. So the search goes on, and the "
            "artifact stays until a better one is made",
            None,
        )
        best.discard_short_finetunings()
        folder = begin_next(best)
        finished = False
        fitted = None
    history: tuple[Artifact, ...] = ()
    if folder.is_next:
        best_artifact = Artifact(
            fitted=read_record(FittedStructure, best.fitted),
            summary=read_record(Summary, best.summary),
        )
        history = (best_artifact,)
    plan = plan_artifact(history, limits)
    if fitted:
        # The record on disk was made with this factor; another one would make it invalid.
        plan = replace(
            plan, final_to_fitted=fitted.final_to_fitted, writing_factor=fitted.writing_factor
        )
    return TargetState(folder=folder, history=history, fitted=fitted, finished=finished, plan=plan)


def read_valid_structure(folder: RunFolder, plan: Retry, *, effort: int) -> FittedStructure | None:
    """Return the fitted structure on record, or remove it if it is not what is due now.

    Args:
        folder: The folder of the target.
        plan: How the artifact is made that is due. Another factor makes the record invalid.
        effort: Trials and level switches that are asked for. A shorter search makes it invalid.

    Returns:
        The structure; None where there is none, or none that is valid.
    """
    if not folder.fitted.exists():
        return None
    stored = read_record(FittedStructure, folder.fitted)
    if stored.search_effort >= effort and stored.final_to_fitted == plan.final_to_fitted:
        return stored
    folder.discard_fitted_structure(search_goes_on=stored.search_effort < effort)
    return None


def keep_better(run: RunContext, summary: Summary, *, is_better: IsBetter) -> RunContext:
    """Keep the better one of the new artifact and the best so far before another one is made.

    Args:
        run: The run with one target.
        summary: The summary of the new artifact.
        is_better: Whether the first of two artifacts is kept.

    Returns:
        The run, with the folder of the artifact that is made next.
    """
    share = compute_corrected_target_share(summary)
    message = f"the finished artifact lies at {share:.1%} of its target: another one is made"
    run.on_progress("fit", message, None)
    folder = run.folder
    best = folder.best
    if not folder.is_next:
        begin_next(best)
        note_artifacts(best)
        return replace(run, folder=best.next)
    note_artifacts(best)
    best_summary = read_record(Summary, best.summary)
    if is_better(best_summary, summary):
        note_choice(best, folder, winner=best_summary, loser=summary)
        discard_next(best, goes_on=True)
    else:
        note_choice(best, best, winner=summary, loser=best_summary)
        promote_next(best, goes_on=True)
    return run


def keep_best(run: RunContext, summary: Summary | None, *, is_better: IsBetter) -> Summary:
    """Leave the best artifact in the run folder, and no other one; return its summary.

    Args:
        run: The run with one target.
        summary: The summary of the last artifact; None: there is none, so the best so far stays.
        is_better: Whether the first of two artifacts is kept.
    """
    folder = run.folder
    best = folder.best
    if summary is not None and not folder.is_next:
        return summary
    note_artifacts(best)
    best_summary = read_record(Summary, best.summary)
    if summary is not None and not is_better(best_summary, summary):
        note_choice(best, best, winner=summary, loser=best_summary)
        promote_next(best, goes_on=False)
        return summary
    if summary is not None:
        note_choice(best, folder, winner=best_summary, loser=summary)
    # All trials that were asked for have been tried: a resumed run must not search again.
    fitted = read_record(FittedStructure, best.fitted)
    effort = ArtifactLimits.from_spec(run.spec).search_effort
    write_record(best.fitted, replace(fitted, search_effort=effort))
    if best.has_next():
        discard_next(best, goes_on=False)
    return best_summary
