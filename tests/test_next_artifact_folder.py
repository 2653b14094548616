"""Where a further artifact is made, and how it takes the place of the best one, wherever that is cut
off."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest

from mmcompress.workspace import move_artifacts
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.move_artifacts import (
    begin_next,
    discard_next,
    finish_interrupted_move,
    promote_next,
)

OLD_FILES = ("bundle/graph", "weights/a", "fitted.json", "distill-0.json", "summary.json")
NEW_FILES = ("bundle/graph", "weights/b", "fitted.json", "distill.json", "summary.json")
SHARED_FILES = ("study.journal", "profile.json")


def write_artifact(place: Path, names, content: str) -> None:
    for name in names:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def read_artifact(place: Path) -> dict[str, str]:
    files = {}
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if path.is_file() and name not in SHARED_FILES:
            files[name] = path.read_text()
    return files


@pytest.fixture()
def folder(tmp_path) -> RunFolder:
    """A finished run behind which a further artifact is made."""
    write_artifact(tmp_path, SHARED_FILES, "shared")
    write_artifact(tmp_path, OLD_FILES, "old")
    folder = RunFolder(path=tmp_path)
    write_artifact(begin_next(folder).artifact_path, NEW_FILES, "new")
    return folder


def test_everything_but_the_artifact_is_the_same(folder):
    assert folder.next.study == folder.study and folder.next.unproved == folder.unproved
    assert folder.next.summary.read_text() == "new" and folder.summary.read_text() == "old"
    assert folder.next.best == folder and folder.next.find_earlier() == folder
    assert folder.find_earlier() is None and not folder.is_finished()
    assert folder.list_finished_subfolders() == []


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_better_artifact_takes_the_place_of_the_best_one(folder, goes_on):
    promote_next(folder, goes_on=goes_on)
    assert read_artifact(folder.path) == dict.fromkeys(NEW_FILES, "new")
    assert folder.has_next() is goes_on and folder.study.read_text() == "shared"


def test_a_worse_artifact_is_removed(folder):
    discard_next(folder, goes_on=False)
    assert read_artifact(folder.path) == dict.fromkeys(OLD_FILES, "old") and folder.is_finished()


def test_a_worse_artifact_is_removed_for_a_further_one(folder):
    discard_next(folder, goes_on=True)
    assert read_artifact(folder.path) == dict.fromkeys(OLD_FILES, "old")
    assert folder.has_next() and not list(folder.next.artifact_path.iterdir())


class KilledError(Exception):
    """The process is killed."""


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("steps", range(1, 14))
@pytest.mark.examples(6)
def test_wherever_the_change_is_cut_off_it_is_completed(folder, monkeypatch, steps, goes_on):
    counter = itertools.count(1)
    remove_path, rename = move_artifacts.remove_path, Path.rename

    def count_step():
        if next(counter) > steps:
            raise KilledError

    def remove(path):
        count_step()
        remove_path(path)

    def move(path, target):
        count_step()
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(move_artifacts, "remove_path", remove)
        patch.setattr(Path, "rename", move)
        with contextlib.suppress(KilledError):
            promote_next(folder, goes_on=goes_on)
    finish_interrupted_move(folder)
    assert read_artifact(folder.path) == dict.fromkeys(NEW_FILES, "new")
    assert folder.has_next() is goes_on and not folder.has_interrupted_move()


def test_a_folder_of_an_earlier_version_is_put_right(tmp_path):
    """It kept the best artifact in `earlier/` and made the other one in its place."""
    write_artifact(tmp_path / "earlier", OLD_FILES, "old")
    making = ("fitted.json", "training.safetensors", "weights/b")
    write_artifact(tmp_path, making, "new")
    folder = RunFolder(path=tmp_path)
    assert folder.has_interrupted_move()
    finish_interrupted_move(folder)
    assert read_artifact(folder.next.artifact_path) == dict.fromkeys(making, "new")
    assert folder.summary.read_text() == "old" and folder.has_bundle() is False
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle", "distill-0.json", "fitted.json", "next", "summary.json", "weights"
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["earlier.new", "earlier.back"])
def test_a_move_that_an_earlier_version_began_is_completed(tmp_path, place):
    write_artifact(tmp_path / place, ("weights/a", "summary.json"), "old")
    write_artifact(tmp_path, ("fitted.json", "bundle/graph"), "old")
    folder = RunFolder(path=tmp_path)
    assert folder.list_unfinished() == []
    finish_interrupted_move(folder)
    files = ("weights/a", "summary.json", "fitted.json", "bundle/graph")
    assert read_artifact(tmp_path) == dict.fromkeys(files, "old")
    assert folder.has_next() is (place == "earlier.new")
