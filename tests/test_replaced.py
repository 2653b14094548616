"""The table of replaced tests leads to tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent


def list_test_names():
    """Return the names of all test functions."""
    names = set()
    for file in TESTS.glob("test_*.py"):
        names |= set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.M))
    return names


def list_successors():
    """Return (row, name) of every test that a row names in place of another one."""
    successors = []
    for line in (TESTS / "replaced.md").read_text().splitlines():
        cells = line.strip("|").split(" | ")
        if len(cells) < 2 or not cells[0].strip().startswith(("`", "the same")):
            continue
        for code in re.findall(r"`([^`]+)`", cells[-1]):
            for name in re.findall(r"\b(test_\w+)(?!\w*\.py)\b", code.rpartition("::")[2]):
                successors.append((cells[0], name))
    return successors


def test_what_replaces_a_test_exists():
    successors = list_successors()
    assert len(successors) > 20
    names = list_test_names()
    assert [row for row in successors if row[1] not in names] == []
