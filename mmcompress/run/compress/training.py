"""One training of pruned models by distillation, within a share of the budget of the spec."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.models.base import Model
from mmcompress.prune.sparsity import zero_weights_
from mmcompress.registry import resolve_entry
from mmcompress.run.compress.training_state import discard_training_state
from mmcompress.run.compress.validation_quality import (
    begin_validation_quality,
    end_validation_quality,
)
from mmcompress.run.training_history import find_last_step
from mmcompress.search.short_finetune import MAX_VALIDATION_PAIRS, open_teacher
from mmcompress.workspace.context import RunContext

SINGLE_TRAINING_SCHEDULES = ("one_shot", "late")
"""Prune schedules that train once."""

SHARING_EXECUTOR = "ray"
"""The executor whose cluster can share a training."""

DISTILL_ON_WORKERS = "mmcompress.run.compress.train_on_ray:distill_on_workers_"
"""Trains on several workers; it takes Ray Train."""

CHECKPOINT_SECONDS = 300.0
"""Seconds of training between two checkpoints: what an interruption costs at most."""


def train_pruned_models_(
    run: RunContext,
    models: dict[str, Model],
    *,
    budget_share: float,
    history: Path,
    steps_before: int = 0,
    learning_rate: float | None = None,
    find_learning_rate: bool = True,
) -> int:
    """Train pruned models in place; single weights are set to zero first if the spec asks for it.

    Args:
        run: The run; its dense models are the teacher.
        models: The models to train, by node.
        budget_share: The share of the spec's steps and minutes.
        history: The file that the losses are written to.
        steps_before: Steps of earlier trainings; their pairs are not drawn again.
        learning_rate: The highest rate; by default that of the spec, and a lower one where it does
            harm.
        find_learning_rate: Whether a lower rate is looked for, if the spec asks for it.

    Returns:
        The number of steps that were trained.
    """
    prune = run.spec.prune
    hold_zeros_ = None
    if prune.sparsity:
        hold_zeros_ = zero_weights_(models, prune.pattern, share=prune.sparsity)
    settings = run.spec.distill
    if not find_learning_rate:
        settings = replace(settings, find_learning_rate=False)
    if learning_rate is not None:
        settings = replace(
            settings, schedule="cosine", learning_rate=learning_rate, find_learning_rate=False
        )
    checkpoint = None
    # To go on with training in rounds, the models of all rounds before would have to be kept as
    # well.
    if prune.schedule in SINGLE_TRAINING_SCHEDULES:
        checkpoint = Checkpoint(
            path=run.folder.training_checkpoint, interval_seconds=CHECKPOINT_SECONDS
        )

    with run.time_stage("distill"):
        count = min(run.spec.data.validation_pairs, MAX_VALIDATION_PAIRS)
        validation = run.pipeline.collate(run.data.load("val", count))
        inputs = TrainingInputs(
            pipeline=run.pipeline,
            teacher=open_teacher(run),
            data=run.data,
            validation=validation,
        )
        options = TrainingOptions(
            settings=settings,
            budget_share=budget_share,
            seed=run.spec.seed,
            first_step=steps_before,
            hold_weights_=hold_zeros_,
            progress=partial(run.on_progress, "distill"),
            history=history,
            checkpoint=checkpoint,
            clock=run.clock,
        )
        figures = begin_validation_quality(run, models, validation=validation)
        if run.spec.resources.distill.workers > 1 and run.spec.search.executor == SHARING_EXECUTOR:
            if checkpoint is None:
                # It is of an earlier round, or of a run that was cut off in another one.
                discard_training_state(run)
            curve = resolve_entry(DISTILL_ON_WORKERS)(run, models, inputs=inputs, options=options)
        else:
            curve = distill_models_(models, inputs, options=options)
        end_validation_quality(run, models, validation=validation, begun=figures)
    return find_last_step(curve)
