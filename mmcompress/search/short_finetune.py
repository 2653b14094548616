"""Structures ranked by a short training, where their losses before training say little.

Where cutting alone collapses the quality, a few structures are trained for a share of the budget.
The worse half of them ends half-way. It is successive halving with two rungs, with training as the
resource (Jamieson and Talwalkar 2016). The final training goes on from the weights of the best one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.export.weights import save_weights
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.models.base import Model
from mmcompress.results.records import Trial
from mmcompress.runtime.progress import prefix_progress
from mmcompress.search.build_problem import build_problem
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.evaluator import has_quality_collapsed
from mmcompress.search.finetuning_pool import (
    NamedCandidate,
    grow_candidate,
    list_distinct_structures,
)
from mmcompress.search.repair import cut_to_budget
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.schema import Spec
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

GB = 1e9
"""Bytes of a gigabyte."""

FINETUNE_BUDGET_SHARE = 0.1
"""Steps and minutes of a short training / those of the final one."""

HALF_WAY = 0.5
"""Share of a short training at which the worse half of the structures ends."""

MAX_VALIDATION_PAIRS = 256
"""Validation pairs at most that a training is judged on."""


@dataclass(frozen=True, kw_only=True)
class FinetunedStructure:
    """A structure and its loss after a short training."""

    candidate: Candidate
    """The structure."""
    origin: str
    """Why it was trained, for a person."""
    loss: float
    """Loss on validation pairs after the training, or half-way where it ended there."""
    steps: int = 0
    """Steps that it was trained."""
    is_finished: bool = True
    """The training was not ended half-way."""


@dataclass(frozen=True, kw_only=True)
class FinetunedStructures:
    """Content of the record in the run folder."""

    tried: tuple[FinetunedStructure, ...]
    """The structures in the order they were trained."""

    def find_best(self) -> FinetunedStructure:
        """Return the structure with the least loss among those whose training was finished."""
        finished = [structure for structure in self.tried if structure.is_finished]
        return min(finished, key=_get_loss)


def _get_loss(structure: FinetunedStructure) -> float:
    """Return the loss of a structure after its short training."""
    return structure.loss


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

    Structures are trained once a run: when the budget is corrected, the winner is fitted to it. Its
    weights stay in the run folder.

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
    validation_loss = ValidationLoss(run)
    dense_loss = validation_loss.measure(run.models)
    if not has_quality_collapsed(best.loss, dense_loss):
        return best
    problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
    record = run.folder.short_finetunings
    if not record.exists():
        pool = list_distinct_structures(problem, sensitivity, run=run, trials=trials)
        finetuning = _ShortFinetuning(
            run=run,
            sensitivity=sensitivity,
            teacher=open_teacher(run),
            validation_loss=validation_loss,
            loss_ratio=best.loss / dense_loss if dense_loss > 0 else None,
        )
        with run.time_stage("short finetuning"):
            finetuned = finetuning.finetune_all(pool[: run.spec.search.short_finetunings])
        write_record(record, finetuned)
    winner = read_record(FinetunedStructures, record).find_best()
    smaller = cut_to_budget(
        problem, winner.candidate, loss_increase=sensitivity.estimate_loss_increase
    )
    if smaller is None:
        return best
    candidate = grow_candidate(problem, sensitivity, candidate=smaller)
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


class ValidationLoss:
    """The loss of the pipeline on validation pairs. The dense pipeline is asked once."""

    def __init__(self, run: RunContext):
        """Take the answers of the dense pipeline to compare with."""
        pair_count = min(run.spec.data.validation_pairs, MAX_VALIDATION_PAIRS)
        self._pipeline = run.pipeline
        self._batch = run.pipeline.collate(run.data.load("val", pair_count))
        self._references = run.pipeline.compute_reference_outputs(run.models, self._batch)

    def measure(self, models: Mapping[str, Model]) -> float:
        """Measure the loss of models, by node."""
        return self._pipeline.compute_loss(models, self._batch, dense=self._references)


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


@dataclass(frozen=True, kw_only=True)
class _ShortFinetuning:
    """What every short training works with."""

    run: RunContext
    """The run."""
    sensitivity: Sensitivity
    """Importance of the units."""
    teacher: Teacher
    """The dense pipeline; the trainings share what it puts out."""
    validation_loss: ValidationLoss
    """Measures the loss of trained models."""
    loss_ratio: float | None
    """Loss of the best structure before training / dense loss."""

    def finetune_all(self, pool: Sequence[NamedCandidate]) -> FinetunedStructures:
        """Train every structure half-way, and the better half to the end.

        The weights of the best one stay in the run folder.
        """
        folder = self.run.folder.short_finetuned
        shutil.rmtree(folder.path, ignore_errors=True)
        folder.path.mkdir()
        finetuned: dict[int, FinetunedStructure] = {}
        for i in range(len(pool)):
            if finetuned and self.run.is_search_over():
                break
            _, finetuned[i] = self._train(i, pool, until=HALF_WAY)
        ranked = sorted(finetuned, key=lambda i: finetuned[i].loss)
        least_loss = math.inf
        for i in ranked[: -(-len(ranked) // 2)]:
            if math.isfinite(least_loss) and self.run.is_search_over():
                break
            models, finetuned[i] = self._train(i, pool, until=1.0)
            if finetuned[i].loss < least_loss:
                least_loss = finetuned[i].loss
                save_weights(models, folder.weights)
        for i in range(len(pool)):
            folder.numbered_checkpoint(i).unlink(missing_ok=True)
        return FinetunedStructures(tried=tuple(finetuned.values()))

    def _train(
        self, number: int, pool: Sequence[NamedCandidate], *, until: float
    ) -> tuple[dict[str, Model], FinetunedStructure]:
        """Train one structure of a pool, or go on with it.

        Args:
            number: Its place in the pool.
            pool: All structures.
            until: Share of the short training at which it stops for now.

        Returns:
            The models by node, and their loss.
        """
        run = self.run
        origin, candidate = pool[number]
        progress = prefix_progress(
            partial(run.on_progress, "short finetuning"),
            f"{number + 1} of {len(pool)} ({origin}): ",
        )
        models = build_pruned_models(
            run, self.sensitivity, candidate=candidate, refit=run.spec.prune.refit
        )
        checkpoint = run.folder.short_finetuned.numbered_checkpoint(number)
        settings = replace(
            run.spec.distill,
            schedule="cosine",
            validations=0,
            patience=0,
            find_learning_rate=False,
        )
        curve = distill_models_(
            models,
            TrainingInputs(pipeline=run.pipeline, teacher=self.teacher, data=run.data),
            options=TrainingOptions(
                settings=settings,
                budget_share=FINETUNE_BUDGET_SHARE,
                loss_ratio=self.loss_ratio,
                stop_share=until,
                seed=run.spec.seed,
                progress=progress,
                checkpoint=Checkpoint(path=checkpoint, interval_seconds=math.inf),
                clock=run.clock,
            ),
        )
        loss = self.validation_loss.measure(models)
        is_finished = until == 1
        progress(f"loss {loss:.3f} {'after training' if is_finished else 'half-way'}", None)
        return models, FinetunedStructure(
            candidate=candidate,
            origin=origin,
            loss=loss,
            steps=max((int(row["step"]) for row in curve), default=0),
            is_finished=is_finished,
        )
