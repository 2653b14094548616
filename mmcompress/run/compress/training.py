"""One training of pruned models by distillation, within a share of the budget of the spec."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.trainer import distill_
from mmcompress.models.base import Model
from mmcompress.prune.sparsity import zero_weights_
from mmcompress.search.short_finetune import MAX_VALIDATION_PAIRS
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

SINGLE_TRAINING_SCHEDULES = ("one_shot", "late")
"""Prune schedules that train once."""

CHECKPOINT_SECONDS = 300.0
"""Seconds of training between two checkpoints: what an interruption costs at most."""


def train_pruned_models_(
    run: RunContext,
    models: dict[str, Model],
    *,
    budget_share: float,
    history: Path,
    steps_before: int = 0,
) -> int:
    """Train pruned models in place; single weights are set to zero first if the spec asks for it.

    Args:
        run: The run; its dense models are the teacher.
        models: The models to train, by node.
        budget_share: The share of the spec's steps and minutes.
        history: The file that the losses are written to.
        steps_before: Steps of earlier trainings; their pairs are not drawn again.

    Returns:
        The number of steps that were trained.
    """
    prune = run.spec.prune
    hold_zeros_ = _hold_nothing
    if prune.sparsity:
        hold_zeros_ = zero_weights_(models, prune.pattern, share=prune.sparsity)
    distill = run.spec.distill
    options = replace(
        distill,
        steps=round(distill.steps * budget_share),
        minutes=distill.minutes * budget_share,
    )
    checkpoint = None
    # To go on with training in rounds, the models of all rounds before would have to be kept as
    # well.
    if prune.schedule in SINGLE_TRAINING_SCHEDULES:
        checkpoint = Checkpoint(
            path=run.folder.training_checkpoint, interval_seconds=CHECKPOINT_SECONDS
        )

    def report_progress(message: str, share: float) -> None:
        run.on_progress("distill", message, share)

    with run.time_stage("distill"):
        count = min(run.spec.data.validation_pairs, MAX_VALIDATION_PAIRS)
        validation = run.pipeline.collate(run.data.load("val", count))
        curve = distill_(
            run.pipeline,
            models,
            teacher=run.models,
            data=run.data,
            options=options,
            seed=run.spec.seed,
            progress=report_progress,
            history=history,
            choosing=validation,
            hold_=hold_zeros_,
            checkpoint=checkpoint,
            first=steps_before,
            clock=run.clock,
        )
    return _find_last_step(curve)


def count_trained_steps(folder: RunFolder) -> int:
    """Return the steps of all trainings that left a history in a folder."""
    steps = 0
    for history in folder.list_training_histories():
        steps += _find_last_step(json.loads(history.read_text()))
    return steps


def _find_last_step(curve: Sequence[Mapping[str, float]]) -> int:
    """Return the last step of a loss curve; 0 where nothing was trained."""
    return max((int(row["step"]) for row in curve), default=0)


def _hold_nothing() -> None:
    """Leave all weights as the training step made them."""
