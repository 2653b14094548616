"""How many steps a training takes, and where in its schedule a step is.

The schedule is laid over whole steps: a share of minutes would end differently on every machine.
After the first few steps, the measured pace says how many the minutes afford. The plan is laid once
more after a tenth of them: something else may have run on the machine in those first seconds. Then
the number stays, so a training is never cut off in mid-course.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from mmcompress.spec.schema import Distill

PACE_STEPS = 20
"""Steps after which the pace of a training is known. Short trainings take a tenth of theirs."""

PACE_SHARE = 0.1
"""The same as a share of the steps, for short trainings."""

CHECK_SHARE = 0.1
"""Share of the planned steps after which the plan is laid once more. The learning rate has hardly
begun to fall there."""

AUTO_STEPS_BY_LOSS_RATIO = ((1.02, 100), (1.1, 250), (1.5, 500), (8.0, 1000), (math.inf, 3000))
"""(loss before training / dense loss below which it holds, steps) of `distill.steps: auto`: what
lost little has little to learn again. (clip_captioner at 2x, from .083: .0805 after 224 steps,
.0807 after 260.)"""

AUTO_STEPS_WITHOUT_LOSS = 1000
"""Steps of `distill.steps: auto` where the loss before training is not measured."""

EXCESS_LOSS_EXPONENT = 0.7
"""The loss above that of the dense pipeline falls about as steps^-0.7 (clip_captioner at 3x and
4x, 250 to 4,000 steps)."""


def choose_step_count(settings: Distill, *, loss_ratio: float | None, share: float) -> int:
    """Return the steps that a training is asked for.

    Args:
        settings: The `distill` section of a spec.
        loss_ratio: Loss before training / dense loss; None where it was not measured. Only
            `steps: auto` looks at it.
        share: Share of the steps that this training has.
    """
    if settings.steps != "auto":
        return round(settings.steps * share)
    steps = AUTO_STEPS_WITHOUT_LOSS
    if loss_ratio is not None:
        steps = next(count for ratio, count in AUTO_STEPS_BY_LOSS_RATIO if loss_ratio < ratio)
    return max(1, round(steps * settings.auto_steps_factor * share))


def predict_loss_of_twice_the_steps(loss: float, *, dense_loss: float) -> float:
    """Predict the loss on validation pairs after twice the steps.

    Args:
        loss: The loss after the training.
        dense_loss: The loss of the dense pipeline on the same pairs.
    """
    return dense_loss + (loss - dense_loss) * 2**-EXCESS_LOSS_EXPONENT


def _count_none(steps: int) -> int:
    """Return 0: the teacher meets nothing new."""
    return 0


@dataclass(frozen=True, kw_only=True)
class TrainingPace:
    """What the steps of a training cost."""

    step_seconds: float
    """Seconds of a step on pairs that the teacher knows."""
    teacher_seconds: float = 0.0
    """Seconds more of a step on pairs that are new to the teacher."""
    count_new_draws: Callable[[int], int] = _count_none
    """Takes the steps of a whole training. Returns how many draws of the steps that are not done
    yet are new to the teacher."""

    def estimate_seconds(self, step: int, *, planned_steps: int) -> float:
        """Estimate the seconds until a training of some steps ends.

        Args:
            step: Steps that are done.
            planned_steps: Steps of the whole training.
        """
        new_draws = self.count_new_draws(planned_steps)
        return (planned_steps - step) * self.step_seconds + new_draws * self.teacher_seconds


@dataclass(kw_only=True)
class StepPlan:
    """The steps of one training, and how many of them its time affords."""

    asked_steps: int
    """Steps that are asked for; the training never has more."""
    max_seconds: float
    """Seconds that it may take."""
    planned_steps: int = 0
    """Steps that it will have, once the pace is known; 0 before."""
    is_checked: bool = False
    """Whether the plan was laid for the second time, and stays."""

    @property
    def pace_steps(self) -> int:
        """The steps after which the pace counts as known."""
        return min(PACE_STEPS, math.ceil(PACE_SHARE * self.asked_steps))

    def compute_share(self, step: int, *, elapsed: float) -> float:
        """Return the share of the schedule that is done, 0 .. 1 or a little more.

        Args:
            step: Steps that are done.
            elapsed: Seconds since the training began.
        """
        if self.planned_steps:
            return step / self.planned_steps
        return max(step / self.asked_steps, elapsed / self.max_seconds)

    def is_due(self, step: int) -> bool:
        """Return whether the plan is to be laid after some steps."""
        if self.planned_steps:
            return not self.is_checked and step >= CHECK_SHARE * self.planned_steps
        return step >= self.pace_steps

    def lay_out(self, step: int, *, elapsed: float, pace: TrainingPace, reserved: float) -> None:
        """Lay the plan over the steps that the time affords.

        Args:
            step: Steps that are done.
            elapsed: Seconds since the training began.
            pace: What the steps cost.
            reserved: Seconds of the time that is left for something else than steps.
        """
        self.is_checked = self.planned_steps > 0
        seconds_left = max(self.max_seconds - elapsed - reserved, 0.0)

        def estimate_seconds(planned_steps: int) -> float:
            return pace.estimate_seconds(step, planned_steps=planned_steps)

        counts = range(step, self.asked_steps + 1)
        affordable = bisect_right(counts, seconds_left, key=estimate_seconds)
        self.planned_steps = max(step, counts[affordable - 1] if affordable else step)
