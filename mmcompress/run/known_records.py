"""What a run folder holds already. It is told when a run goes on: nothing of it is made again."""

from __future__ import annotations

from collections.abc import Sequence

from mmcompress.search.sensitivity.store import is_sensitivity_stored
from mmcompress.workspace.folder import RunFolder


def describe_known_records(shared: RunFolder, targets: Sequence[RunFolder]) -> str:
    """Describe what a run will not make again, in words; empty where it begins from nothing.

    Args:
        shared: The folder with what the targets share.
        targets: The folder of every target.
    """
    known: list[str] = []
    if shared.profile.exists():
        known.append("the measured dense pipeline")
    if shared.predictor.exists():
        known.append("the latency predictor")
    if is_sensitivity_stored(shared):
        known.append("the sensitivity")
    elif shared.sensitivity_curves.exists():
        known.append("the cuts measured so far")
    for folder in targets:
        stage = _describe_stage(folder)
        if stage and len(targets) > 1:
            stage = f"{folder.path.name}: {stage}"
        if stage:
            known.append(stage)
    return ", ".join(known)


def _describe_stage(folder: RunFolder) -> str:
    """Describe how far the work for a target came, in words; empty where it did not begin."""
    if folder.summary.exists():
        finished = "a finished artifact"
        return f"{finished}, and a part of another one" if folder.has_next() else finished
    if folder.units.exists():
        return "a trained structure"
    if folder.training_checkpoint.exists():
        return "a training that has begun"
    if folder.fitted.exists():
        return "a fitted structure"
    if folder.study.exists():
        return "the trials so far"
    return ""
