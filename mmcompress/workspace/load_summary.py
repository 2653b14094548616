"""Loads the record of a finished run. No torch, and nothing that draws."""

from __future__ import annotations

from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.results.records import SUMMARY_FORMAT, Summary
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RESUME_CURE, RunFolder


def load_summary(folder: str | Path) -> Summary:
    """Load the summary of a finished run.

    Args:
        folder: The run folder of one target.

    Returns:
        The record in `summary.json`: both sides, the target, trials, proofs and warnings.

    Raises:
        DataError: The run is not finished, the folder holds several runs, or another version wrote
            it.
    """
    run_folder = RunFolder(path=Path(folder))
    if run_folder.summary.is_file():
        summary = read_record(Summary, run_folder.summary, cure=RESUME_CURE)
        if summary.format > SUMMARY_FORMAT:
            raise DataError(
                f"{run_folder.summary}: format {summary.format}; this version of mmcompress reads "
                f"formats up to {SUMMARY_FORMAT}: install the one that wrote it, or a later one"
            )
        return summary
    if run_folder.path.is_file():
        raise DataError(f"{folder}: a file; name the folder that it lies in")
    if not run_folder.path.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    reason = ": not a finished run"
    if run_folder.spec.exists():
        reason = f": the run is not finished; `mmcompress watch {folder}` tells where it is"
    finished = run_folder.list_finished_subfolders()
    if finished:
        reason = f"; it has several runs in it: {', '.join(finished)}"
    raise DataError(f"{folder}: no {run_folder.summary.name} in it{reason}")
