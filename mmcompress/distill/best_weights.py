"""The best weights of a training: little data can do harm, so the loss is taken on the way."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcompress.distill.training import TrainingInputs
from mmcompress.kinds.base import Models, Outputs
from mmcompress.runtime.timing import Clock, SystemClock

HARMFUL_LOSS_RATIO = 1.05
"""Last loss on validation pairs / least one. Above it the training did harm, below it the rise
may be chance."""


class BestWeights:
    """The weights with the least loss on validation pairs so far."""

    def __init__(
        self, student: Models, inputs: TrainingInputs, *, count: int, clock: Clock | None = None
    ):
        """Take the loss of the dense pipeline, to compare with.

        Args:
            student: The models in training.
            inputs: The pipeline, the teacher and the validation pairs.
            count: Validations during the training; 0 for none.
            clock: Tells how long a validation takes; by default the clock of this machine.
        """
        self.clock = clock or SystemClock()
        self.seconds = 0.0
        self.student = student
        self.pipeline = inputs.pipeline
        self.batch = inputs.validation if count else None
        self.count = count
        self.reference: Outputs = {}
        self.dense_loss = 0.0
        self.validations: list[dict[str, float]] = []
        self.unimproved_validations = 0
        self.weights: list[Tensor] = []
        if self.batch is not None:
            teacher = inputs.teacher.models
            self.reference = self.pipeline.compute_reference_outputs(teacher, self.batch)
            self.dense_loss = self.pipeline.compute_loss(teacher, self.batch, dense=self.reference)

    def validate(self, share: float, step: int) -> None:
        """Take the loss on validation pairs when it is due; keep the weights if it is the least.

        Args:
            share: Share of the budget that is used up, 0 .. 1; validations are spread over it
                evenly.
            step: Steps that are done.
        """
        if self.batch is None:
            return
        due_at = len(self.validations) / self.count
        if share >= due_at:
            self.measure_loss(step)

    def measure_loss(self, step: int) -> None:
        """Take the loss on validation pairs; keep the weights if it is the least.

        Args:
            step: Steps that are done.
        """
        assert self.batch is not None
        start = self.clock.read_seconds()
        loss = self.pipeline.compute_loss(self.student, self.batch, dense=self.reference)
        self.seconds = self.clock.read_seconds() - start
        earlier_losses = [_read_loss(row) for row in self.validations]
        if not earlier_losses or loss < min(earlier_losses):
            self.unimproved_validations = 0
            self.weights = [parameter.detach().clone() for parameter in self._list_parameters()]
        else:
            self.unimproved_validations += 1
        self.validations.append({"step": step, "validation_loss": loss, "dense": self.dense_loss})

    def estimate_seconds_left(self) -> float:
        """Return the seconds that the validations take that are still to come."""
        return self.seconds * max(self.count - len(self.validations), 0)

    def restore_(self) -> None:
        """Go back to the best weights, when the last ones are clearly worse."""
        if not self.validations:
            return
        last = self.validations[-1]
        best = min(self.validations, key=_read_loss)
        bearable_loss = HARMFUL_LOSS_RATIO * _read_loss(best)
        if _read_loss(last) <= bearable_loss:
            return
        self.validations.append({**best, "step": last["step"], "restored": best["step"]})
        with torch.no_grad():
            for parameter, value in zip(self._list_parameters(), self.weights, strict=True):
                parameter.copy_(value)

    def _list_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all models, frozen ones as well."""
        parameters: list[nn.Parameter] = []
        for model in self.student.values():
            parameters += model.parameters()
        return parameters


def _read_loss(row: dict[str, float]) -> float:
    """Return the loss of a row of the history; its key is older than the word validation."""
    return row["validation_loss"]
