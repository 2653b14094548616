"""Looks through a run folder that nobody works on: what is damaged or was left behind.

Looking only reads. A resumed run mends all of it by itself; `repair_run` does it without one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmcompress.errors import DataError, MmcompressError
from mmcompress.registry import resolve_entry
from mmcompress.results.records import Summary
from mmcompress.run.check_records import (
    DamagedFileMover,
    check_artifact_records,
    check_shared_records,
)
from mmcompress.search.study import list_study_faults, open_study
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import WAIT, hold_folder, is_held
from mmcompress.workspace.move_artifacts import finish_interrupted_move

LIST_DATABASE_FAULTS = "mmcompress.search.database_study:list_database_faults"
"""Looks at trials in a database; it needs packages that not every install has."""


@dataclass(frozen=True, kw_only=True)
class RunFinding:
    """Something that is wrong with a run folder."""

    path: Path
    """The file or folder."""
    fault: str
    """What is wrong with it, in words."""


@dataclass(kw_only=True)
class _Finder:
    """Notes damaged files, and leaves them as they are."""

    findings: list[RunFinding] = field(default_factory=list)
    """What was found."""

    def check(self, read: Callable[[], object], paths: Sequence[Path]) -> None:
        try:
            read()
        except (MmcompressError, OSError, ValueError) as error:
            self.findings.append(RunFinding(path=paths[0], fault=str(error)))


def inspect_run(path: str | Path) -> list[RunFinding]:
    """Look through a run folder and the folders of its targets. Nothing is written.

    Args:
        path: The run folder.

    Returns:
        What is wrong; empty for a folder that is whole.

    Raises:
        DataError: It is no run folder, or a process works on it.
    """
    folder = RunFolder(path=Path(path))
    nodes = _read_nodes(folder)
    if is_held(folder):
        raise DataError(f"{folder}: a process works on this run; look again when it has ended")
    finder = _Finder()
    finder.check(folder.check_format, [folder.format])
    check_shared_records(folder, finder)
    for target in _list_target_folders(folder):
        check_artifact_records(target, finder, nodes=nodes)
        finder.findings += _inspect_journal(target)
        _check_database_study(target, finder)
        finder.findings += _find_contradictions(target)
    finder.findings += [
        RunFinding(path=leftover, fault="a run that was killed left it unfinished")
        for leftover in list_leftovers(folder)
    ]
    return finder.findings


def repair_run(path: str | Path, *, tell: Callable[[str], None]) -> None:
    """Set aside what is damaged, and remove what was left behind; a resumed run makes it again.

    Args:
        path: The run folder.
        tell: Receives what was done.

    Raises:
        DataError: It is no run folder, or a process works on it.
    """
    folder = RunFolder(path=Path(path))
    nodes = _read_nodes(folder)
    mover = DamagedFileMover(tell)
    with hold_folder(path, cure=WAIT):
        check_shared_records(folder, mover)
        for target in _list_target_folders(folder):
            finish_interrupted_move(target)
            check_artifact_records(target, mover, nodes=nodes)
            if target.study.exists() and list_study_faults(target.study):
                open_study(target.study, tell=tell)
                if not list_study_faults(target.study):
                    tell(f"{target.study}: mended; finished trials are kept")
        for leftover in list_leftovers(folder):
            _remove(leftover)
            tell(f"{leftover}: removed")


def _read_nodes(folder: RunFolder) -> list[str]:
    """Read the names of the nodes with a model; raises `DataError` where it is no run folder."""
    if not folder.spec.exists():
        raise DataError(f"{folder}: no run has begun in this folder")
    try:
        spec = json.loads(folder.spec.read_text(encoding="utf-8"))
        return [name for name, node in spec["nodes"].items() if node.get("source")]
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder.spec}: damaged: {error}; put the file back from a copy, or begin a new run"
        ) from error


def _list_target_folders(folder: RunFolder) -> list[RunFolder]:
    """List the folders of targets: the run folder itself, and those in it."""
    return [
        target
        for target in [folder, *folder.list_inner_folders()]
        if target.study.exists()
        or target.database_study.exists()
        or target.fitted.exists()
        or target.summary.exists()
        or target.has_next()
        or target.has_interrupted_move()
    ]


def _inspect_journal(target: RunFolder) -> Iterator[RunFinding]:
    """Find what is wrong with the journal of a search."""
    if target.study.exists():
        for fault in list_study_faults(target.study):
            yield RunFinding(path=target.study, fault=fault)


def _check_database_study(target: RunFolder, finder: _Finder) -> None:
    """Find what is wrong with a search whose trials are in a database."""
    path = target.database_study
    if not path.exists():
        return

    def check() -> None:
        # Only an install with the extra `postgresql` can look there.
        for fault in resolve_entry(LIST_DATABASE_FAULTS)(path):
            finder.findings.append(RunFinding(path=path, fault=fault))

    finder.check(check, [path])


def _find_contradictions(target: RunFolder) -> Iterator[RunFinding]:
    """Find records that are whole, and do not fit each other."""
    if target.has_interrupted_move():
        yield RunFinding(
            path=target.path, fault="an artifact was being moved when the run was killed"
        )
    if target.summary.exists() and not target.has_bundle():
        yield RunFinding(
            path=target.bundle, fault="the run is finished, and its bundle is not there"
        )
    if not target.summary.exists() or not target.study.exists():
        return
    try:
        summary = read_record(Summary, target.summary)
    except MmcompressError:
        # It is found damaged elsewhere.
        return
    if summary.trials and not target.study.stat().st_size:
        yield RunFinding(path=target.study, fault="it is empty, and the summary names trials")


def list_leftovers(folder: RunFolder) -> list[Path]:
    """List what a killed process left unfinished; nothing reads it again."""
    leftovers: list[Path] = []
    for target in [folder, *_list_target_folders(folder)]:
        leftovers += [path for path in (target.scratch, target.weights_room) if path.exists()]
    for path in folder.list_unfinished():
        if not any(place in path.parents for place in leftovers):
            leftovers.append(path)
    return list(dict.fromkeys(leftovers))


def _remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
