"""Makes the artifact of one method: structure, training and judgement, in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.experiments.baselines import Baseline
from mmcompress.graph.losses import TEACHER_LOSSES, list_task_losses, resolve_loss_weights
from mmcompress.graph.ports import get_kind
from mmcompress.graph.structure import Candidate
from mmcompress.measure.latency.bench import MAX_REQUESTS_FACTOR, MIN_REQUESTS
from mmcompress.prune.importance.inputs import ImportanceInputs, score_units
from mmcompress.prune.refit import measure_grams
from mmcompress.registry import IMPORTANCE
from mmcompress.results.records import Summary
from mmcompress.run.check_records import set_damaged_artifact_aside
from mmcompress.run.compress.recipe import compress_pipeline
from mmcompress.run.evaluate import evaluate_artifact
from mmcompress.run.fit_structure import fit_structure
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.structure_benchmark import measure_structure
from mmcompress.run.training_history import count_trained_steps
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.schema import Distill, Spec
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RESUME_CURE, RunFolder

MakeNamedCell = Callable[[str, int], None]
"""Makes the cell of a name with a number of training steps; 0: as long as the spec says."""

CheckCell = Callable[[RunFolder], None]
"""Raises an error when the finished cell in a folder can't be kept."""

UNLIMITED_MINUTES = 1e5
"""Minutes, about ten weeks: training that is limited by its steps never reaches them."""


def accept_cell(folder: RunFolder) -> None:
    """Accept every finished cell."""


def make_cell(
    run: RunContext, name: str, *, method: Baseline, prepared: PreparedRun, steps: int = 0
) -> None:
    """Choose, train and judge the structure of one method; the folder `name` gets a summary.

    Args:
        run: The run of the comparison.
        name: The folder in the run's folder.
        method: How the structure is chosen and trained.
        prepared: What all cells share.
        steps: Training steps, however long they take. 0: as long as the spec says.
    """
    folder = run.folder.get_subfolder(name)
    timings = folder.read_timings(run.tell_damage)
    spec = _shorten_measurement(run.spec, is_latency_known=bool(method.structure_of))
    spec = replace(spec, distill=plan_training(spec, method, steps=steps))
    if method.importance:
        scored = replace_scores(run, prepared.sensitivity, importance=method.importance)
        prepared = replace(prepared, sensitivity=scored)
        spec = replace(spec, prune=replace(spec.prune, importance=method.importance))
    cell_run = replace(run, folder=folder, spec=spec, timings=timings)
    if method.make_candidate is not None:
        fitted = _measure_fixed(cell_run, prepared, candidate=method.make_candidate(cell_run))
    elif method.structure_of:
        fitted = _copy_structure(cell_run, run.folder.get_subfolder(method.structure_of).fitted)
    else:
        assert method.open_proposals is not None
        fitted = fit_structure(cell_run, prepared, open_proposals=method.open_proposals)
    compressed = compress_pipeline(
        cell_run, prepared, fitted=fitted, from_scratch=method.from_scratch
    )
    evaluate_artifact(cell_run, prepared, fitted=fitted, compressed=compressed)


def make_missing_cells(
    run: RunContext, names: Sequence[str], *, make: MakeNamedCell, check: CheckCell = accept_cell
) -> Iterator[dict[str, Summary]]:
    """Make the cells that are not finished, one after the other.

    Args:
        run: The run of the comparison.
        names: Folders of the cells in the run's folder.
        make: Makes one cell; receives its name and the training steps, 0 for the first one that
            trains.
        check: Refuses a finished cell that can't be kept.

    Yields:
        The summaries so far, by name, after every cell.
    """
    summaries: dict[str, Summary] = {}
    steps = 0
    for name in names:
        folder = run.folder.get_subfolder(name)
        set_damaged_artifact_aside(replace(run, folder=folder))
        if folder.summary.exists():
            check(folder)
        else:
            make(name, steps)
        summaries[name] = read_record(Summary, folder.summary, cure=RESUME_CURE)
        # Every cell trains for as many steps as the first one that trained.
        steps = steps or count_trained_steps(folder)
        yield summaries


def list_weights_without_teacher(spec: Spec) -> dict[str, float]:
    """Return the weights of losses for a training by the task alone.

    A model needs a loss of its own when its teacher's are gone, even where the spec turns it off.
    """
    weights = dict.fromkeys(TEACHER_LOSSES, 0.0)
    for node in spec.list_model_nodes().values():
        for name, default in get_kind(node.kind).losses.items():
            weights[name] = spec.distill.losses.get(name, default) or default
    return weights


def plan_training(spec: Spec, method: Baseline, *, steps: int) -> Distill:
    """Return how a method is trained: by its own losses, for as many steps as the others.

    Args:
        spec: The pipeline, with training as the others have it.
        method: The method.
        steps: Training steps. 0: as long as the spec says.
    """
    distill = spec.distill
    if not method.is_trained or not distill.steps:
        return replace(distill, steps=0)
    weights = resolve_loss_weights(distill)
    if method.task_loss_only and any(weights[name] for name in list_task_losses(spec)):
        losses = {**distill.losses, **list_weights_without_teacher(spec)}
        distill = replace(distill, losses=losses)
    if not steps:
        return distill
    # A schedule without an end of its own would go on behind these steps.
    return replace(distill, steps=steps, minutes=UNLIMITED_MINUTES, schedule="cosine")


def replace_scores(run: RunContext, sensitivity: Sensitivity, *, importance: str) -> Sensitivity:
    """Score all units by another criterion.

    Args:
        run: The run; its calibration pairs are what the criterion looks at.
        sensitivity: The scores to replace, with the loss increases that stay.
        importance: Name of the criterion.

    Returns:
        The sensitivity with new scores, and with input products where they were missing.
    """
    batch = run.pipeline.collate(run.data.load("train", run.spec.data.calibration))
    # The search does not need the input products, so it may have left them out.
    if not all(sensitivity.grams.values()):
        grams = measure_grams(run.pipeline, run.models, batch=batch)
        sensitivity = replace(sensitivity, grams=grams)
    inputs = ImportanceInputs(
        pipeline=run.pipeline,
        models=run.models,
        batch=batch,
        grams=sensitivity.grams,
        seed=run.spec.seed,
    )
    return replace(sensitivity, scores=score_units(IMPORTANCE.get(importance), inputs))


def require_same_effort(run: RunContext) -> None:
    """Refuse to go on with another search effort: rows of one table must have had the same.

    Raises:
        DataError: The comparison was begun with other numbers of trials or level switches.
    """
    first = read_record(Spec, run.folder.spec).search
    search = run.spec.search
    if (search.trials, search.level_switches) != (first.trials, first.level_switches):
        raise DataError(
            f"{run.folder}: begun with {first.trials} trials and {first.level_switches} level "
            "switches; with other numbers the rows could not be compared"
        )


def _shorten_measurement(spec: Spec, *, is_latency_known: bool) -> Spec:
    """Drop what a comparison does not show; measure a structure of known latency more briefly."""
    measure = spec.measure
    requests = measure.requests
    if is_latency_known:
        shortened = max(MIN_REQUESTS, measure.requests // MAX_REQUESTS_FACTOR)
        requests = min(shortened, measure.requests)
    return replace(
        spec,
        data=replace(spec.data, report=()),
        measure=replace(measure, memory=False, requests=requests),
    )


def _measure_fixed(
    run: RunContext, prepared: PreparedRun, *, candidate: Candidate
) -> FittedStructure:
    """Measure a structure that is not fitted; on another device, take its prediction."""
    dense = prepared.dense
    predictor = prepared.predictor
    predicted_ms = predictor(candidate)
    measured_ms = predicted_ms
    if not run.device_readings:
        benchmark = measure_structure(run, prepared.sensitivity, candidate=candidate, dense=dense)
        measured_ms = benchmark.estimate_long_run_ms(run.shared.reference_runs)
    fitted = FittedStructure(
        candidate=candidate,
        predicted_ms=predicted_ms,
        measured_ms=measured_ms,
        target_ms=run.goal.compute_target_ms(dense.latency_ms),
        search_effort=0,
        correction=predictor.correction,
    )
    write_record(run.folder.fitted, fitted)
    return fitted


def _copy_structure(run: RunContext, path: Path) -> FittedStructure:
    """Take the fitted structure of another cell, in the precisions that this spec fixes."""
    fitted = read_record(FittedStructure, path)
    precisions = dict(fitted.candidate.precision)
    for node_name, node in run.spec.list_model_nodes().items():
        if node.precision != "auto":
            precisions[node_name] = node.precision
    fitted = replace(fitted, candidate=replace(fitted.candidate, precision=precisions))
    write_record(run.folder.fitted, fitted)
    return fitted
