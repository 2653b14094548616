"""The order of the stages. Each stage is a function that leaves a record in the run folder.

`prepare_run`   checks > profile > labels > predictor > sensitivity     once for all targets
`reach_target`  search and fit > compress > evaluate > report  for each, until the policy is content
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mmcompress.errors import ProofFailed
from mmcompress.report.comparison_pages import write_front
from mmcompress.report.page import write_report
from mmcompress.results.records import Summary
from mmcompress.run.adopt_shared import adopt_shared_records
from mmcompress.run.artifact_journal import add_artifacts
from mmcompress.run.check_records import set_damaged_shared_aside
from mmcompress.run.compress.recipe import CompressedPipeline, compress_pipeline
from mmcompress.run.evaluate import evaluate_artifact
from mmcompress.run.fit_structure import fit_structure
from mmcompress.run.fitted_structure import FittedStructure, FitTolerances
from mmcompress.run.forecast import Pace
from mmcompress.run.measure_pace import measure_pace
from mmcompress.run.next_artifact import Artifact, ArtifactLimits, Done, Retry
from mmcompress.run.predictor import build_predictor
from mmcompress.run.preflight import check_machine
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.profile import profile_pipeline
from mmcompress.run.resume import keep_best, keep_better, resume_target
from mmcompress.run.run_policy import MeasuringLimits, RunPolicy
from mmcompress.run.sensitivity import measure_run_sensitivity
from mmcompress.run.teacher_labels import label_by_teacher
from mmcompress.run.unproved import exclude_unproved, set_unproved_aside
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary


def prepare_run(run: RunContext) -> PreparedRun:
    """Make, or read from the run folder, everything that does not depend on a target."""
    set_damaged_shared_aside(run)
    if not run.shared.profile.exists():
        check_machine(run)
    adopt_shared_records(run)
    dense = profile_pipeline(run)
    labelled_run = label_by_teacher(run)
    predictor = build_predictor(labelled_run, dense)
    sensitivity = measure_run_sensitivity(labelled_run)
    return PreparedRun(
        run=labelled_run,
        dense=dense,
        predictor=replace(predictor, fp32_blocks=sensitivity.fp32_blocks),
        sensitivity=sensitivity,
    )


class FitStage(Protocol):
    """Searches a structure that measures just under the target."""

    def __call__(
        self,
        run: RunContext,
        prepared: PreparedRun,
        *,
        plan: Retry | None,
        tolerances: FitTolerances | None,
    ) -> FittedStructure:
        """Return the structure on record, or search one and write it down."""
        ...


class CompressStage(Protocol):
    """Cuts, trains and exports a structure."""

    def __call__(
        self,
        run: RunContext,
        prepared: PreparedRun,
        *,
        fitted: FittedStructure,
        earlier: RunFolder | None,
    ) -> CompressedPipeline:
        """Write weights and bundle, unless the folder has them; return what is known of them."""
        ...


class EvaluateStage(Protocol):
    """Measures a finished artifact."""

    def __call__(
        self,
        run: RunContext,
        prepared: PreparedRun,
        *,
        fitted: FittedStructure,
        compressed: CompressedPipeline,
        measuring: MeasuringLimits | None,
    ) -> Summary:
        """Write the summary of an artifact and return it."""
        ...


class PaceStage(Protocol):
    """Measures the pace of this machine."""

    def __call__(
        self, run: RunContext, prepared: PreparedRun | None, *, known: Pace | None = None
    ) -> Pace:
        """Return the pace; what is known of it is not measured again."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunStages:
    """The functions of the stages. The order of the stages is tested with others than these."""

    prepare: Callable[[RunContext], PreparedRun] = prepare_run
    """Makes what the targets share."""
    fit: FitStage = fit_structure
    """Finds the structure of an artifact."""
    compress: CompressStage = compress_pipeline
    """Makes the artifact."""
    evaluate: EvaluateStage = evaluate_artifact
    """Measures it."""
    report: Callable[[Summary, Path], Path] = write_report
    """Writes the pages of the best artifact."""
    measure_pace: PaceStage = measure_pace
    """Measures what a forecast of their time needs."""
    report_front: Callable[[Mapping[str, Summary], RunFolder], object] = write_front
    """Writes the page of several targets."""


def reach_target(
    run: RunContext,
    *,
    prepared: PreparedRun,
    policy: RunPolicy | None = None,
    stages: RunStages | None = None,
) -> Summary:
    """Make artifacts for one target until the policy is content.

    Args:
        run: The run with one target, in a folder of its own where there are several.
        prepared: What the targets share.
        policy: Decides whether a finished artifact ends the run, and which of two is kept.
        stages: What each stage does; by default the stages of the package.

    Returns:
        The summary of the best artifact, which stays in the run folder.

    Raises:
        ProofFailed: The proofs of several structures failed one after the other.
    """
    policy = policy or RunPolicy()
    stages = stages or RunStages()
    measuring = policy.measuring or MeasuringLimits(max_parts=run.spec.measure.max_parts)
    state = resume_target(run)
    run = replace(run, folder=state.folder)
    summary: Summary | None
    history = list(state.history)
    plan = state.plan
    unproved_count = 0
    while True:
        plan = exclude_unproved(plan, run.folder)
        fitted = stages.fit(run, prepared, plan=plan, tolerances=policy.fit)
        if state.can_reuse(run, fitted):
            summary = load_summary(run.folder.path)
            break
        earlier = run.folder.find_earlier()
        try:
            compressed = stages.compress(run, prepared, fitted=fitted, earlier=earlier)
        except ProofFailed as error:
            unproved_count += 1
            set_unproved_aside(run, fitted, error=error, count=unproved_count)
            if earlier is None:
                continue
            # An artifact is finished and proved already.
            summary = None
            break
        summary = stages.evaluate(
            run, prepared, fitted=fitted, compressed=compressed, measuring=measuring
        )
        history.append(Artifact(fitted=fitted, summary=summary))
        if state.is_only_remade(run, fitted, summary=summary):
            break
        step = policy.next_step(history, ArtifactLimits.from_spec(run.spec))
        if isinstance(step, Done):
            break
        run = keep_better(run, summary, is_better=policy.is_better)
        plan = step
    summary = keep_best(run, summary, is_better=policy.is_better)
    run = replace(run, folder=run.folder.best)
    summary = add_artifacts(run.folder, summary)
    report_summary(run, summary, write=stages.report)
    return summary


def report_summary(
    run: RunContext, summary: Summary, *, write: Callable[[Summary, Path], Path]
) -> None:
    """Write the report. An error there costs nothing: the summary is on disk already."""
    try:
        write(summary, run.folder.path)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        run.on_progress(
            "report",
            f"the report could not be written ({message}); everything else is done, and "
            f"`mmcompress report {run.folder}` writes it",
            None,
        )
