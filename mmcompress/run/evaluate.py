"""Stage: measure and judge both bundles, and put everything in one record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mmcompress.errors import DiskFull
from mmcompress.graph.structure import Candidate, KeptUnits, measure_removed_share
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.latency.memory import read_peak_memory_mb
from mmcompress.results.records import (
    LONG_INPUTS,
    RETAINED_LIMIT,
    SearchResult,
    Side,
    Summary,
    Trial,
)
from mmcompress.run.adopt_artifacts import restore_measurements
from mmcompress.run.answers import (
    SplitAnswers,
    answer_split,
    count_kept_answers,
    estimate_on_long_inputs,
    estimate_qualities,
    list_bundles,
    list_failed_metrics,
)
from mmcompress.run.assemble import (
    NodeSize,
    PredictedReach,
    RemovedShares,
    assemble_side,
    build_target,
    summarize_search,
)
from mmcompress.run.compress.recipe import CompressedPipeline
from mmcompress.run.final_latency import FinalLatency
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.profile import Profile
from mmcompress.run.retained_quality import check_retained_quality
from mmcompress.run.run_policy import MeasuringLimits
from mmcompress.run.select_samples import select_samples
from mmcompress.run.tell_fallbacks import tell_fallbacks
from mmcompress.run.training_history import read_training_result, read_validation_losses
from mmcompress.run.warnings import list_warnings
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import describe_cpu, list_package_versions, read_git_commit
from mmcompress.runtime.sample_requests import write_requests
from mmcompress.search.linearize import load_interaction_factors
from mmcompress.search.run_study import open_run_study
from mmcompress.search.study import count_failures, read_finished_trials
from mmcompress.stats import Quality, compute_quality_retained
from mmcompress.storage import to_plain, write_record
from mmcompress.workspace.command_line import read_command_line
from mmcompress.workspace.context import RunContext

BUNDLE_REQUESTS = 8
"""Requests that a finished bundle carries with their answers."""


def evaluate_artifact(
    run: RunContext,
    prepared: PreparedRun,
    *,
    fitted: FittedStructure,
    compressed: CompressedPipeline,
    measuring: MeasuringLimits | None = None,
) -> Summary:
    """Measure both bundles in turn, judge both on the full test split, and write the summary.

    Args:
        run: The run with one target.
        prepared: The profile and the predictor that the targets share.
        fitted: The structure of the artifact.
        compressed: Sizes and proofs of its bundle.
        measuring: How long both bundles are measured beyond the parts around the evaluation;
            None: no longer.
    """
    latency = FinalLatency(run, dense=prepared.dense, candidate=fitted.candidate)
    latency.measure_part()
    tell_fallbacks(run, run.folder.bundle, stage="evaluate")
    answers: dict[str, dict[str, SplitAnswers]] = {}
    skipped: dict[str, str] = {}
    with run.seal.open_for_judging():
        with run.time_stage("evaluate"):
            answers["test"] = answer_split(run, "test")
        latency.measure_part()
        for split in run.spec.data.report:
            skip = skip_failed_step(run, f"split {split}", skipped=skipped)
            with run.time_stage("evaluate"), skip:
                answers[split] = answer_split(run, split)
            latency.measure_part()
        samples = select_samples(run, answers["test"], split="test")
    retained = None
    limit = run.spec.limits.retained
    if limit is not None:
        skip = skip_failed_step(run, RETAINED_LIMIT, skipped=skipped)
        with run.time_stage("evaluate"), skip:
            retained = check_retained_quality(run, limit=limit, test=answers["test"])
    if run.spec.report.samples != "none":
        with skip_failed_step(run, "requests in the bundle", skipped=skipped):
            pipeline = load_bundle(run.folder.bundle)
            requests = run.load_whole_requests("val", BUNDLE_REQUESTS, seed=1)
            write_requests(pipeline, requests, machine=describe_cpu()["name"])
    if measuring:
        latency.measure_until_certain(measuring)
    summary = _build_summary(
        run,
        prepared,
        fitted=fitted,
        compressed=compressed,
        answers=answers,
        latency=latency,
        skipped=skipped,
    )
    summary = replace(summary, samples=samples, retained=retained)
    outcomes = {side: split_answers.scores for side, split_answers in answers["test"].items()}
    write_record(run.folder.outcomes, outcomes, indent=None)
    summary = replace(summary, warnings=list_warnings(summary))
    summary = restore_measurements(summary, run.folder)
    write_record(run.folder.summary, summary)
    return summary


@contextmanager
def skip_failed_step(run: RunContext, name: str, *, skipped: dict[str, str]) -> Iterator[None]:
    """Go on where the block fails: nothing that is trained or measured depends on it.

    Args:
        run: The run; its listener receives messages.
        name: What is skipped, for a person.
        skipped: Receives the reason.

    Raises:
        DiskFull: The disk is full. Nothing after it could be written either.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        skipped[name] = f"{type(error).__name__}: {error}"
        run.on_progress("evaluate", f"{name} is skipped: {skipped[name]}", None)


def _build_summary(
    run: RunContext,
    prepared: PreparedRun,
    *,
    fitted: FittedStructure,
    compressed: CompressedPipeline,
    answers: Mapping[str, dict[str, SplitAnswers]],
    latency: FinalLatency,
    skipped: dict[str, str],
) -> Summary:
    """Put everything that is known of an artifact in one record, without warnings."""
    candidate = fitted.candidate
    predictor = replace(
        prepared.predictor.correct_nodes(fitted.node_corrections),
        correction=fitted.correction,
        p95_ratio=run.goal.compute_p95_ratio(prepared.dense.latency_ms),
    )
    measured = latency.summarize(predictor)
    dense_latency = measured["baseline"].latency
    quality = estimate_qualities(answers["test"])
    extra_splits = {
        split: estimate_qualities(answers[split]) for split in answers if split != "test"
    }
    long_inputs = estimate_on_long_inputs(answers["test"])
    if long_inputs:
        extra_splits[LONG_INPUTS] = long_inputs
    sides = _assemble_sides(
        run,
        candidate,
        dense=prepared.dense,
        compressed=compressed,
        measured=measured,
        quality=quality,
        skipped=skipped,
    )
    target_ms = run.goal.compute_target_ms(dense_latency)
    # The machine may be slower or faster now than when the dense pipeline was profiled.
    pace = target_ms / fitted.target_ms
    trials = _list_trials(run, predictor, pace=pace)
    reach = PredictedReach(
        floor_ms=fitted.floor_ms,
        fixed_ms=fitted.fixed_ms,
        fixed_ms_by_node=fitted.fixed_ms_by_node,
        lowest_reachable=fitted.lowest_reachable,
    )
    target = build_target(
        run.spec,
        goal=run.goal,
        dense=dense_latency,
        compressed=sides["compressed"],
        reach=reach,
        pace=pace,
    )
    run.timings["total"] = sum(
        seconds for stage, seconds in run.timings.items() if stage != "total"
    )
    return Summary(
        pipeline=run.spec.name,
        target=target,
        baseline=sides["baseline"],
        compressed=sides["compressed"],
        speedup=dense_latency.p50 / measured["compressed"].latency.p50,
        quality_retained=compute_quality_retained(quality["baseline"], quality["compressed"]),
        predicted_latency_ms_p50=pace * fitted.predicted_ms,
        unimodal_ratio=_measure_removed(run, candidate.kept_units, cross_modal=False) or 0.0,
        cross_modal_ratio=_measure_removed(run, candidate.kept_units, cross_modal=True),
        kept_units=candidate.kept_units,
        blocks=run.blocks,
        cross_modal_reasons=run.cross_modal,
        proofs=tuple(compressed.proofs),
        search=_describe_search(run, trials, target_ms=target_ms),
        trials=trials,
        warnings=(),
        timings=dict(run.timings),
        settings=to_plain(run.spec),
        versions=list_package_versions(),
        cpu=run.device_readings.cpu if run.device_readings else run.bench.describe_cpu(),
        seed=run.spec.seed,
        commit=read_git_commit(),
        command=read_command_line(),
        device=run.device,
        peak_memory_mb=read_peak_memory_mb(),
        touched_bounds=fitted.touched_bounds,
        training=read_training_result(run.folder),
        validation_losses=read_validation_losses(run.folder),
        extra_splits=extra_splits,
        attempts=fitted.attempts,
        bench_repeats=latency.repeats,
        latency_margin=latency.estimate_margin(),
        machine_speed_factor=latency.estimate_speed_factor(),
        writing=latency.estimate_writing(fitted),
        aimed_share=fitted.aimed_share,
        choice_reason=fitted.choice_reason,
        dense_answers=count_kept_answers(run, answers["test"]["baseline"]),
        compressed_answers=count_kept_answers(run, answers["test"]["compressed"]),
        skipped={**list_failed_metrics(answers), **skipped},
    )


def _measure_removed(
    run: RunContext, kept: Mapping[str, KeptUnits], *, cross_modal: bool
) -> float | None:
    """Return the share of unit features that is removed, of cross-modal blocks or of all others."""
    return measure_removed_share(kept, run.blocks, cross=run.cross_modal, crossing=cross_modal)


def _assemble_sides(
    run: RunContext,
    candidate: Candidate,
    *,
    dense: Profile,
    compressed: CompressedPipeline,
    measured: Mapping[str, PipelineMeasurement],
    quality: Mapping[str, dict[str, Quality]],
    skipped: dict[str, str],
) -> dict[str, Side]:
    """Return each bundle with its latency, quality, sizes and memory."""
    dense_sizes = {
        node_name: NodeSize(params=dense.params[node_name], macs=dense.macs[node_name])
        for node_name in dense.params
    }
    sizes: dict[str, Mapping[str, NodeSize]] = {
        "baseline": dense_sizes,
        "compressed": compressed.sizes,
    }
    whole: dict[str, KeptUnits] = {node_name: {} for node_name in run.models}
    kept = {"baseline": whole, "compressed": candidate.kept_units}
    needs_memory = run.spec.measure.memory or run.spec.limits.memory_mb is not None
    sides = {}
    for side, bundle in list_bundles(run).items():
        removed = {}
        for node_name in run.models:
            node_kept = {node_name: kept[side][node_name]}
            removed[node_name] = RemovedShares(
                unimodal=_measure_removed(run, node_kept, cross_modal=False),
                cross_modal=_measure_removed(run, node_kept, cross_modal=True),
            )
        sides[side] = assemble_side(
            run.spec,
            bundle,
            measured=measured[side],
            quality=quality[side],
            sizes=sizes[side],
            removed=removed,
            memory_mb=_measure_memory(run, bundle, skipped=skipped) if needs_memory else 0.0,
        )
    return sides


def _measure_memory(run: RunContext, bundle: Path, *, skipped: dict[str, str]) -> float:
    """Measure the peak memory of a bundle; 0 where that fails."""
    with skip_failed_step(run, f"memory of {bundle.name}", skipped=skipped):
        return run.bench.measure_memory_mb(bundle)
    return 0.0


def _list_trials(run: RunContext, predictor: Predictor, *, pace: float) -> tuple[Trial, ...]:
    """Return every architecture that was tried, once, with its last predicted latency."""
    study = open_run_study(run)
    by_candidate: dict[str, Trial] = {}
    for trial in reversed(read_finished_trials(study)):
        by_candidate[trial.candidate.make_key()] = trial
    trials = []
    for trial in reversed(by_candidate.values()):
        trials.append(replace(trial, latency_ms=pace * predictor(trial.candidate)))
    return tuple(trials)


def _describe_search(
    run: RunContext, trials: tuple[Trial, ...], *, target_ms: float
) -> SearchResult:
    """Return the counts of the search, and the losses of its splits of the budget."""
    failed = count_failures(open_run_study(run))
    seconds = run.timings.get("search", 0.0)
    result = summarize_search(trials, failed, target_ms=target_ms, seconds=seconds)
    factors = load_interaction_factors(run.folder)
    return replace(
        result,
        split_losses=factors.losses,
        linearization_evaluations=factors.evaluations,
    )
