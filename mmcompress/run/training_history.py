"""What the trainings of an artifact left behind: their lengths and their losses."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmcompress.distill.step_plan import predict_loss_of_twice_the_steps
from mmcompress.results.records import (
    TrainingEnd,
    TrainingResult,
    ValidationFigure,
    ValidationQuality,
)
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder

HistoryRows = Sequence[Mapping[str, float]]
"""Rows of a training history: settings first, then training losses, then validations."""

EARLIER_ARTIFACT_ROUND = 0
"""Round under which the history of an earlier artifact is kept."""


def read_histories(folder: RunFolder) -> dict[int, HistoryRows]:
    """Return the histories of an artifact by round, in the order of the trainings.

    Round 0 is the training of the artifact whose weights this one began with.
    """
    histories: dict[int, HistoryRows] = {}
    for path in sorted(folder.list_training_histories(), key=_get_round_number):
        histories[_get_round_number(path)] = json.loads(path.read_text(encoding="utf-8"))
    return histories


def count_trained_steps(folder: RunFolder) -> int:
    """Return the steps of all trainings that left a history in a folder."""
    return sum(find_last_step(rows) for rows in read_histories(folder).values())


def read_validation_losses(folder: RunFolder) -> tuple[float, ...]:
    """Return the losses on validation pairs that training recorded, the dense pipeline's first."""
    losses: list[float] = []
    for history in read_histories(folder).values():
        rows = [row for row in history if "validation_loss" in row]
        if rows and not losses:
            losses.append(rows[0]["dense"])
        losses += [row["validation_loss"] for row in rows]
    return tuple(losses)


def read_training_result(folder: RunFolder) -> TrainingResult | None:
    """Return how long the artifact of a folder was trained; None where it was not.

    Rounds of pruning and training count together. What an earlier artifact was trained does not.
    """
    by_round = read_histories(folder)
    by_round.pop(EARLIER_ARTIFACT_ROUND, None)
    # Runs of older versions did not write down what was asked for.
    histories = [rows for rows in by_round.values() if rows and "asked_steps" in rows[0]]
    if not histories:
        return None
    last = histories[-1]
    loss: float | None = None
    dense_loss: float | None = None
    expected_loss: float | None = None
    validations = [row for row in last if "validation_loss" in row]
    if validations:
        loss = validations[-1]["validation_loss"]
        dense_loss = validations[-1]["dense"]
        expected_loss = predict_loss_of_twice_the_steps(loss, dense_loss=dense_loss)
    asked_steps = 0
    steps = 0
    seconds = 0.0
    for rows in histories:
        asked_steps += int(rows[0]["asked_steps"])
        steps += find_last_step(rows)
        seconds += rows[0]["seconds"]
    return TrainingResult(
        asked_steps=asked_steps,
        steps=steps,
        seconds=seconds,
        learning_rate=last[0]["rate"],
        ended_by=_find_end(last),
        loss=loss,
        dense_loss=dense_loss,
        loss_of_twice_the_steps=expected_loss,
        quality=_read_validation_quality(folder),
    )


def _read_validation_quality(folder: RunFolder) -> tuple[ValidationFigure, ...]:
    """Return quality on validation pairs before and after a training.

    It is empty where the run was begun by a version that did not write it down.
    """
    if not folder.validation_quality.exists():
        return ()
    return read_record(ValidationQuality, folder.validation_quality).figures


def find_last_step(rows: HistoryRows) -> int:
    """Return the last step of a training history or a loss curve; 0 where nothing was trained."""
    return max((int(row["step"]) for row in rows), default=0)


def _find_end(rows: HistoryRows) -> TrainingEnd:
    """Return what ended a training."""
    settings = rows[0]
    if settings.get("is_open_ended"):
        return "convergence" if settings["has_converged"] else "minutes"
    if find_last_step(rows) < settings["planned_steps"]:
        # Runs of older versions did not write the patience down.
        return "patience" if settings.get("patience", 1) else "minutes"
    if settings["planned_steps"] < settings["asked_steps"]:
        return "minutes"
    return "steps"


def _get_round_number(history: Path) -> int:
    """Return the round of a training history: `distill-1.json` is 1, `distill.json` comes last."""
    number = history.stem.partition("-")[2]
    return int(number) if number else sys.maxsize
