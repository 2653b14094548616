"""Repairs the journal of a study: what a full disk or a lost power supply tore is put aside.

Optuna refuses a journal with one line that it can't read. A line is torn where the disk was full,
and the next one is then written behind it. A line names a trial by the number of trials before it,
so lines after a lost one may name the wrong trial. Only the lines before it stay. Of those after
it, the finished trials are read: each is one whole record of ours. No torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.results.records import Trial
from mmcompress.storage import DAMAGED_SUFFIX, InvalidValue, build_record, replace_file

PlainRecord = dict[str, Any]
"""A record, or an operation of Optuna, as JSON gives it."""

OPERATION_START = b'{"op_code":'
"""How Optuna begins a line."""

MAX_OPERATION = 10
"""The largest code of an operation in a journal of Optuna 5."""


@dataclass(frozen=True, kw_only=True)
class JournalRepair:
    """What a repair found."""

    kept_lines: int
    """Lines that stay: all before the first damaged one."""
    lines_aside: int
    """Lines from the first damaged one on. 0: the journal is whole, and nothing was written."""
    trials: tuple[PlainRecord, ...]
    """Finished trials of all whole lines, as plain data, oldest first."""
    copy: Path
    """The file that holds the whole journal as it was."""

    def describe(self, journal: Path) -> str:
        """Tell a person what was done."""
        return (
            f"{journal}: line {self.kept_lines + 1} is damaged; it and what follows "
            f"({self.lines_aside} lines) are left out. {len(self.trials)} finished trials are "
            f"kept; the file as it was lies in {self.copy.name}"
        )


def repair_journal(journal: Path, *, keep_lines: bool = True) -> JournalRepair:
    """Cut a journal off before its first damaged line, after a copy of it was put aside.

    Args:
        journal: The file; it need not exist.
        keep_lines: Whether the lines before the damage stay. Without, only finished trials do:
            for a journal whose lines can be read and make no sense.
    """
    content = journal.read_bytes() if journal.exists() else b""
    lines = content.split(b"\n")
    # Behind the last line break there is nothing, or a line that was cut off.
    torn_end = lines.pop()
    kept_lines: list[bytes] = []
    for line in lines:
        if not keep_lines or _parse_operation(line) is None:
            break
        kept_lines.append(line)
    cut_lines = lines[len(kept_lines) :]
    if torn_end:
        cut_lines.append(torn_end)
    aside_file = journal.with_name(journal.name + DAMAGED_SUFFIX)
    if cut_lines:
        shutil.copyfile(journal, aside_file)
        with replace_file(journal) as unfinished:
            unfinished.write_bytes(b"".join(line + b"\n" for line in kept_lines))
    return JournalRepair(
        kept_lines=len(kept_lines),
        lines_aside=len(cut_lines),
        trials=tuple(_list_finished_trials([*kept_lines, *cut_lines])),
        copy=aside_file,
    )


def find_damaged_line(journal: Path) -> int | None:
    """Return the number of the first damaged line of a journal, from 1 on; None where it is whole.

    Nothing is written.
    """
    lines = journal.read_bytes().split(b"\n")
    torn_end = lines.pop()
    for number, line in enumerate(lines, 1):
        if _parse_operation(line) is None:
            return number
    return len(lines) + 1 if torn_end else None


def _parse_operation(line: bytes) -> PlainRecord | None:
    """Return the operation that a line holds; None where it holds none."""
    try:
        operation = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(operation, dict) or not isinstance(operation.get("worker_id"), str):
        return None
    code = operation.get("op_code")
    is_known = isinstance(code, int) and 0 <= code <= MAX_OPERATION
    return operation if is_known else None


def _find_last_operation(line: bytes) -> bytes:
    """Return the last operation that begins in a line."""
    return OPERATION_START + line.rpartition(OPERATION_START)[2]


def _list_finished_trials(lines: Iterable[bytes]) -> list[PlainRecord]:
    """List the finished trials that whole lines hold, each once."""
    trials: dict[tuple[int, str], PlainRecord] = {}
    for line in lines:
        # Behind a line that a full disk tore, the next one stands whole.
        operation = _parse_operation(line) or _parse_operation(_find_last_operation(line)) or {}
        for key in ("user_attr", "user_attrs"):
            attributes = operation.get(key)
            if not isinstance(attributes, dict) or "trial" not in attributes:
                continue
            try:
                trial = build_record(Trial, attributes["trial"])
            except InvalidValue:
                continue
            trials[(trial.number, trial.candidate.make_key())] = attributes["trial"]
    return list(trials.values())
