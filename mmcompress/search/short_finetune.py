"""Structures ranked by a short training, where their losses before training say little.

Where cutting alone collapses the quality, a few structures are trained for a share of the budget:
those of least loss, those of least added loss, and plain splits. It is successive halving with one
rung, with training as the resource (Jamieson and Talwalkar 2016).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.models.base import Model
from mmcompress.results.records import Trial
from mmcompress.runtime.progress import prefix_progress
from mmcompress.search.build_problem import build_problem
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.evaluator import has_quality_collapsed
from mmcompress.search.problem import SearchProblem, complete_candidate, scale_to_budget
from mmcompress.search.repair import cut_to_budget, grow_to_budget
from mmcompress.search.run_search import FULL_BUDGET_SHARE, list_plain_starts
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.schema import Spec
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

GB = 1e9
"""Bytes of a gigabyte."""

FINETUNE_BUDGET_SHARE = 0.1
"""Steps and minutes of a short training / those of the final one."""

MIN_WEIGHT_DIFFERENCE = 0.03
"""Share of the weights: of structures that differ by no more, one is trained."""

MAX_VALIDATION_PAIRS = 256
"""Validation pairs at most that a training is judged on."""

MAX_LEAST_ADDED_LOSS = 2
"""Structures of least added loss that may be trained."""


@dataclass(frozen=True, kw_only=True)
class FinetunedStructure:
    """A structure and its loss after a short training."""

    candidate: Candidate
    """The structure."""
    origin: str
    """Why it was trained, for a person."""
    loss: float
    """Loss on validation pairs after the training."""


@dataclass(frozen=True, kw_only=True)
class FinetunedStructures:
    """Content of the record in the run folder."""

    tried: tuple[FinetunedStructure, ...]
    """The structures in the order they were trained."""


def rank_by_short_finetuning(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    predictor: Predictor,
    budget_ms: float,
    trials: Sequence[Trial],
    best: Trial | None,
) -> Trial | None:
    """Choose the structure that a short training serves best, if the best trial has collapsed.

    Structures are trained once a run: when the budget is corrected, the winner is fitted to it.

    Args:
        run: Says how many structures are trained; its folder keeps their losses.
        sensitivity: Loss increases of cuts and roundings.
        predictor: Latency of a structure.
        budget_ms: Milliseconds a structure may take.
        trials: All trials of the search.
        best: The trial that the search would choose.

    Returns:
        `best` where its loss before training can be trusted, or where nothing else fits.
    """
    if best is None or best.latency_ms > budget_ms or not _has_finetunings(run.spec):
        return best
    if not has_quality_collapsed(best.loss, measure_validation_loss(run, run.models)):
        return best
    problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
    record = run.folder.short_finetunings
    if not record.exists():
        pool = _list_distinct_structures(problem, sensitivity, run=run, trials=trials)
        with run.time_stage("short finetuning"):
            finetuned = _finetune_all(
                run, sensitivity, pool=pool[: run.spec.search.short_finetunings]
            )
        write_record(record, FinetunedStructures(tried=tuple(finetuned)))
    tried = read_record(FinetunedStructures, record).tried
    winner = min(tried, key=lambda structure: structure.loss)
    smaller = cut_to_budget(problem, winner.candidate, loss_increase=sensitivity.loss_increase)
    if smaller is None:
        return best
    candidate = _grow_candidate(problem, sensitivity, candidate=smaller)
    return Trial(
        number=best.number,
        origin=winner.origin,
        overrides={},
        candidate=candidate,
        latency_ms=problem.predict(candidate),
        loss=winner.loss,
        quality={},
        evaluation_seconds=0.0,
    )


def measure_validation_loss(run: RunContext, models: Mapping[str, Model]) -> float:
    """Measure the pipeline's own loss on validation pairs.

    Args:
        run: Pipeline, dense models and data.
        models: Models by node.
    """
    pair_count = min(run.spec.data.validation_pairs, MAX_VALIDATION_PAIRS)
    batch = run.pipeline.collate(run.data.load("val", pair_count))
    references = run.pipeline.reference_outputs(run.models, batch)
    return run.pipeline.loss_of_models(models, batch, dense=references)


def open_teacher(run: RunContext) -> Teacher:
    """Return the dense pipeline as a teacher; all trainings of a run share what it puts out."""
    max_bytes = int(run.spec.distill.store_gb * GB)
    store = None
    if max_bytes:
        store = TeacherStore(folder=run.shared.teacher_outputs, max_bytes=max_bytes)
    return Teacher(run.pipeline, run.models, store=store)


def _has_finetunings(spec: Spec) -> bool:
    """Return whether a spec has structures trained for a short while."""
    if spec.search.evaluator == "estimated" or not spec.search.short_finetunings:
        return False
    return bool(spec.distill.steps and spec.distill.minutes)


def _list_distinct_structures(
    problem: SearchProblem,
    sensitivity: Sensitivity,
    *,
    run: RunContext,
    trials: Sequence[Trial],
) -> list[tuple[str, Candidate]]:
    """List (origin, structure) worth a training: in the budget, different, the best ones first."""
    in_budget = [trial for trial in trials if trial.latency_ms <= problem.budget_ms]
    full_ms = FULL_BUDGET_SHARE * problem.budget_ms
    filling = [trial for trial in in_budget if trial.latency_ms >= full_ms]
    trials = filling or in_budget

    by_loss = [
        (f"{trial.origin}, least loss", trial.candidate)
        for trial in sorted(trials, key=lambda trial: trial.loss)
    ]
    by_added_loss = [
        (f"{trial.origin}, least added loss", trial.candidate)
        for trial in sorted(trials, key=lambda trial: sensitivity.added_loss(trial.candidate))
    ][:MAX_LEAST_ADDED_LOSS]
    plain = []
    for point in list_plain_starts(problem, run.spec):
        _, candidate = scale_to_budget(problem, point)
        if problem.predict(candidate) <= problem.budget_ms:
            grown = _grow_candidate(problem, sensitivity, candidate=candidate)
            plain.append(("plain split", grown))

    ranked = [*by_loss[:1], *by_added_loss[:1], *plain, *by_loss[1:], *by_added_loss[1:]]
    distinct: list[tuple[str, Candidate]] = []
    for origin, candidate in ranked:
        differences = [
            _measure_difference(problem, candidate, other=other) for _, other in distinct
        ]
        if all(difference > MIN_WEIGHT_DIFFERENCE for difference in differences):
            distinct.append((origin, candidate))
    return distinct


def _grow_candidate(
    problem: SearchProblem, sensitivity: Sensitivity, *, candidate: Candidate
) -> Candidate:
    """Grow a candidate up to the budget."""
    return grow_to_budget(
        problem,
        candidate,
        loss_increase=sensitivity.loss_increase,
        rounding=sensitivity.rounding,
    )


def _measure_difference(problem: SearchProblem, candidate: Candidate, *, other: Candidate) -> float:
    """Return the share of weights in blocks that one structure has and the other has not.

    Shares of positions are added. Structures of other precisions differ infinitely.
    """
    if candidate.precision != other.precision:
        return math.inf
    candidate = complete_candidate(problem, candidate)
    other = complete_candidate(problem, other)
    all_weights = 0.0
    different_weights = 0.0
    different_positions = 0.0
    for node_name, blocks in problem.blocks.items():
        for block in blocks:
            units = candidate.kept_units[node_name][block.name]
            other_units = other.kept_units[node_name][block.name]
            different_units = abs(units - other_units)
            if block.group == "tokens":
                different_positions += different_units / block.units
            else:
                different_weights += block.rows_and_columns_per_unit * different_units
                all_weights += block.rows_and_columns_per_unit * block.units
    return different_weights / max(all_weights, 1.0) + different_positions


def _finetune_all(
    run: RunContext, sensitivity: Sensitivity, *, pool: Sequence[tuple[str, Candidate]]
) -> list[FinetunedStructure]:
    """Train every structure of a pool for a short while; they share what the teacher answers."""
    teacher = open_teacher(run)
    finetuned: list[FinetunedStructure] = []
    for i, (origin, candidate) in enumerate(pool):
        if finetuned and run.is_search_over():
            break
        name = f"{i + 1} of {len(pool)} ({origin})"
        loss = _finetune_candidate(
            run, sensitivity, candidate=candidate, teacher=teacher, name=name
        )
        finetuned.append(FinetunedStructure(candidate=candidate, origin=origin, loss=loss))
    return finetuned


def _finetune_candidate(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate, teacher: Teacher, name: str
) -> float:
    """Train one structure for a short while; returns its loss on validation pairs."""
    settings = replace(
        run.spec.distill,
        steps=max(1, round(FINETUNE_BUDGET_SHARE * run.spec.distill.steps)),
        minutes=FINETUNE_BUDGET_SHARE * run.spec.distill.minutes,
        validations=0,
        patience=0,
        find_learning_rate=False,
    )

    progress = prefix_progress(partial(run.on_progress, "short finetuning"), f"{name}: ")
    models = build_pruned_models(run, sensitivity, candidate=candidate, refit=run.spec.prune.refit)
    distill_models_(
        models,
        TrainingInputs(pipeline=run.pipeline, teacher=teacher, data=run.data),
        options=TrainingOptions(
            settings=settings,
            seed=run.spec.seed,
            progress=progress,
            clock=run.clock,
        ),
    )
    loss = measure_validation_loss(run, models)
    progress(f"loss {loss:.3f} after training", None)
    return loss
