"""What the other processes of a training do: they help the leader with every step."""

from __future__ import annotations

from collections.abc import Callable

from mmcompress.distill.training import Training, TrainingInputs, TrainingOptions
from mmcompress.kinds.base import Models


def help_leader(
    student: Models,
    inputs: TrainingInputs,
    *,
    options: TrainingOptions,
    report: Callable[[], None],
) -> None:
    """Run this process's share of every step until the leader ends the training.

    Args:
        student: The models to train, by node. The leader overwrites their weights.
        inputs: The pipeline, the teacher and the data.
        options: The settings of the spec, and the group.
        report: Called when all processes of the group have to report.
    """
    group = options.group
    assert group is not None, "a process alone has no leader"
    for model in student.values():
        # What is trained is what is deployed: no dropout, batch norms keep their statistics.
        model.eval()
    training = Training(student, inputs, options=options)
    while True:
        request = group.receive()
        if request.is_end:
            return
        if request.is_report:
            report()
        else:
            training.help_with_step(request)
