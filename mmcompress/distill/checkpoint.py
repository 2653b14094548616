"""Checkpoints of a training: one that was cut off goes on from the last one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmcompress.errors import DataError
from mmcompress.models.device import CPU
from mmcompress.storage import InvalidValue, build_record, replace_file, to_plain

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The running means that AdamW keeps for each weight, under torch's names."""


@dataclass(kw_only=True)
class TrainingState:
    """How far a training is, but for its tensors."""

    rate: float
    """The highest learning rate of the schedule."""
    asked_steps: int
    """Steps that the training was asked for."""
    planned_steps: int = 0
    """Steps that it will have; 0 until its pace is known."""
    first_draw: int = 0
    """Step whose pairs were the first of the present round: a round takes fresh ones
    (`until_converged`)."""
    run_down_start: int = -1
    """The step that the run-down of the rate began with; -1 before it (`until_converged`)."""
    run_down_losses: list[float] = field(default_factory=list)
    """Losses on validation pairs after each run-down."""
    has_converged: bool = False
    """More steps no longer help."""
    step_seconds: float = 0.0
    """Seconds of a step: the mean of those behind the first one, which allocates memory."""
    step: int = 0
    """Steps that are done."""
    is_plan_checked: bool = False
    """Whether the number of planned steps stays."""
    share: float = 0.0
    """Share of the budget that is used up: of the steps or of the minutes, whichever is more."""
    elapsed: float = 0.0
    """Seconds of training so far, without interruptions."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Training losses so far, a row every few steps."""
    validations: list[dict[str, float]] = field(default_factory=list)
    """Losses on the validation pairs so far, a row each."""
    unimproved_validations: int = 0
    """Validations since the one with the least loss."""

    def note_step_seconds(self, seconds: float) -> None:
        """Take the seconds of the step that was just done into their mean."""
        if self.step <= 2:
            self.step_seconds = seconds
        else:
            self.step_seconds += (seconds - self.step_seconds) / (self.step - 1)


@dataclass(kw_only=True)
class Checkpoint:
    """A file with the state of one training. Every save replaces the whole file."""

    path: Path
    """The file. Who trains removes it once the trained weights are on disk."""
    interval_seconds: float
    """Seconds of training between two saves: what an interruption costs at most."""
    last_saved_at: float = 0.0
    """Seconds of training at the last save."""

    def is_due(self, elapsed: float) -> bool:
        """Return whether it is time to save, after some seconds of training."""
        return elapsed - self.last_saved_at >= self.interval_seconds

    def save(
        self,
        state: TrainingState,
        weights: Sequence[Tensor],
        *,
        optimizer: torch.optim.Optimizer,
        best_weights: Sequence[Tensor],
    ) -> None:
        """Write the state of a training.

        Args:
            state: How far the training is.
            weights: The trained weights, always in the same order.
            optimizer: The AdamW that trains them.
            best_weights: The weights with the least loss on validation pairs; empty without any.
        """
        tensors: dict[str, Tensor] = {}
        for i, weight in enumerate(weights):
            tensors[f"weight/{i}"] = weight.detach()
        for i, weight in enumerate(best_weights):
            tensors[f"best/{i}"] = weight
        for i, weight in enumerate(weights):
            moments = optimizer.state.get(weight, {})
            for name in MOMENTS:
                if name in moments:
                    tensors[f"{name}/{i}"] = moments[name]
        # Tied weights share memory, which safetensors refuses to write.
        copies = {name: tensor.to(CPU, copy=True).contiguous() for name, tensor in tensors.items()}
        with replace_file(self.path) as unfinished:
            save_file(copies, unfinished, metadata={"state": _format_state(state)})
        self.last_saved_at = state.elapsed

    def load_(
        self, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[TrainingState, list[Tensor]] | None:
        """Put saved weights and moments back in place.

        Args:
            weights: The weights to overwrite, in the order in which they were saved.
            optimizer: The AdamW that trains them; it gets their moments.

        Returns:
            The state and the best weights at that time, or None when nothing was saved.
        """
        if not self.path.exists():
            return None
        best_weights: list[Tensor] = []
        with safe_open(self.path, "pt") as file, torch.no_grad():
            names = set(file.keys())
            state = _parse_state(file.metadata()["state"])
            for i, weight in enumerate(weights):
                weight.copy_(file.get_tensor(f"weight/{i}"))
                if f"{MOMENTS[0]}/{i}" in names:
                    moments = {
                        name: file.get_tensor(f"{name}/{i}").to(weight.device) for name in MOMENTS
                    }
                    step = torch.tensor(float(state.step), device=weight.device)
                    optimizer.state[weight] = {"step": step, **moments}
            best_count = sum(name.startswith("best/") for name in names)
            for i in range(best_count):
                best_weights.append(file.get_tensor(f"best/{i}"))
        self.last_saved_at = state.elapsed
        return state, best_weights


def read_trained_seconds(path: Path) -> float:
    """Return the seconds that an interrupted training has behind it; 0 where there is none."""
    if not path.exists():
        return 0.0
    with safe_open(path, "pt") as file:
        return _parse_state(file.metadata()["state"]).elapsed


def check_checkpoint(path: Path) -> None:
    """Check that a file holds the state of a training.

    Raises:
        DataError: The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            _parse_state((file.metadata() or {})["state"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, InvalidValue) as error:
        raise DataError(f"{path}: the state of the training can't be read: {error!r}") from error


def _format_state(state: TrainingState) -> str:
    """Return a state as the JSON text of the file's metadata."""
    return json.dumps(to_plain(state))


def _parse_state(text: str) -> TrainingState:
    """Return the state behind the JSON text of a file's metadata."""
    return build_record(TrainingState, json.loads(text))
