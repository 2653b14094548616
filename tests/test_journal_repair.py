"""A journal of trials that was torn or damaged: what is whole is read, the rest is put aside and told."""

from __future__ import annotations

import json

import pytest
from test_search import go

from mmcompress.search import study


@pytest.fixture(scope="module")
def whole_journal(tmp_path_factory):
    """The bytes of a journal of ten trials, and the keys of the candidates in it."""
    path = tmp_path_factory.mktemp("journal") / "study.journal"
    trials = go(path, trials=8, mutations=2)
    return path.read_bytes(), {trial.candidate.make_key() for trial in trials}


def open_damaged(tmp_path, content):
    """Write a journal, open its study, and return the path, the study and what was told."""
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    told = []
    return path, study.open_study(path, tell=told.append), told


def read_keys(book):
    return {trial.candidate.make_key() for trial in study.read_finished_trials(book)}


def test_a_whole_journal_is_left_as_it_is(tmp_path, whole_journal):
    content, keys = whole_journal
    path, book, told = open_damaged(tmp_path, content)
    assert read_keys(book) == keys and not told
    # Optuna writes down that the study was opened.
    assert (
        path.read_bytes().startswith(content) and not (tmp_path / "study.journal.damaged").exists()
    )


@pytest.mark.parametrize("cut", [1, 7, 60])
@pytest.mark.examples(1)
def test_a_line_that_a_full_disk_cut_off_is_put_aside(tmp_path, whole_journal, cut):
    content, keys = whole_journal
    path, book, told = open_damaged(tmp_path, content[:-cut])
    assert len(keys - read_keys(book)) <= 1
    assert len(told) == 1 and "study.journal.damaged" in told[0]
    assert (tmp_path / "study.journal.damaged").read_bytes() == content[:-cut]
    # The search goes on, and what it writes can be read again.
    more = {trial.candidate.make_key() for trial in go(path, trials=12, mutations=2)}
    assert read_keys(study.open_study(path)) == more and len(more) > len(keys)


DAMAGED_LINES = {
    "torn, the next one behind it": lambda line: line[: len(line) // 2],
    "garbage": lambda line: bytes(range(128, 256)) + b"\n",
    "zeros": lambda line: bytes(len(line)) + b"\n",
    "no mapping": lambda line: b"[]\n",
    "no operation": lambda line: b"{}\n",
    "unknown operation": lambda line: b'{"op_code":99,"worker_id":"a"}\n',
    "an operation without its keys": lambda line: b'{"op_code":4,"worker_id":"a"}\n',
    "of a trial that is not there": lambda line: (
        b'{"op_code":6,"worker_id":"a","trial_id":999,"state":1,"values":[1]}\n'
    ),
}


@pytest.mark.parametrize("fault", DAMAGED_LINES)
@pytest.mark.parametrize("place", [0, 1, 0.5])
def test_finished_trials_behind_a_damaged_line_are_kept(tmp_path, whole_journal, fault, place):
    content, keys = whole_journal
    lines = content.splitlines(keepends=True)
    index = int(place * len(lines)) if place < 1 else place
    lines[index] = DAMAGED_LINES[fault](lines[index])
    path, book, told = open_damaged(tmp_path, b"".join(lines))
    # Of a torn line and of the one behind it nothing is left.
    assert len(keys - read_keys(book)) <= 1
    assert len(told) == 1 or fault == "of a trial that is not there"
    again = study.open_study(path, tell=told.append)
    assert read_keys(again) == read_keys(book)
    evaluated = []

    def judge_new(context, candidate):
        evaluated.append(json.dumps(candidate, sort_keys=True))
        return {"loss": 1.0, "quality": {}, "seconds": 0.0}

    more = go(path, judge_new, trials=8, mutations=2)
    assert keys - {trial.candidate.make_key() for trial in more} == keys - read_keys(book)
    assert len(evaluated) <= 2, "what was evaluated is evaluated again"


def test_a_file_that_is_no_journal_is_put_aside(tmp_path):
    path, book, told = open_damaged(tmp_path, b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert read_keys(book) == set() and len(told) == 1
    assert len(go(path, trials=3, mutations=0)) >= 1
