"""Where the state of a training lies while it is under way, and how it is removed."""

from __future__ import annotations

from mmcompress.workspace.context import RunContext
from mmcompress.workspace.run_storage import STATE_FOLDER, RunStorage, hash_bytes

STORED_TRAINING = f"{STATE_FOLDER}/training"
"""Folder of a run's storage with the state of a training that several workers share."""


def locate_stored_training(run: RunContext) -> str:
    """Return the path, in the storage of a run, of the state of the training that is under way.

    It is named after the structure: what is left of another one is never gone on with.
    """
    return f"{STORED_TRAINING}/{hash_bytes(run.folder.fitted.read_bytes())}"


def discard_training_state(run: RunContext) -> None:
    """Remove the state of a training: its weights are on disk."""
    run.folder.discard_training_state()
    if run.storage_url and run.spec.resources.distill.workers > 1:
        RunStorage(run.storage_url).remove_folder(STORED_TRAINING)
