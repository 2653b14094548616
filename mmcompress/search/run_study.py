"""Opens the study of a run, wherever the spec keeps it."""

from __future__ import annotations

from functools import partial
from typing import Any

from mmcompress.registry import resolve_entry
from mmcompress.search.study import open_study
from mmcompress.storage import name_full_disk
from mmcompress.workspace.context import RunContext

OPEN_DATABASE_STUDY = "mmcompress.search.database_study:open_database_study"
"""Opens a study in a database; it takes the database's driver."""


def open_run_study(run: RunContext) -> Any:
    """Open the study of a run: the journal of its folder, or the database of `search.storage`.

    Raises:
        DataError: The database gives no answer, or the folder can't be written.
        ClusterError: The database was away for too long.
    """
    storage = run.spec.search.storage
    if storage:
        open_database_study = resolve_entry(OPEN_DATABASE_STUDY)
        return open_database_study(
            storage, run.folder.database_study, tell=partial(_tell_outage, run)
        )
    with name_full_disk(run.folder.study):
        return open_study(run.folder.study, tell=run.tell_damage)


def _tell_outage(run: RunContext, message: str) -> None:
    """Tell a person that the database is away, or back."""
    run.on_progress("search", message, None)
