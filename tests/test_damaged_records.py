"""Damaged files of a run folder: what can be made again is set aside, the rest is refused with a cure."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from mmcompress.distill.checkpoint import Checkpoint, TrainingState
from mmcompress.errors import DataError
from mmcompress.results.records import Summary
from mmcompress.run import run_targets as workflow
from mmcompress.run.check_records import set_damaged_artifact_aside, set_damaged_shared_aside
from mmcompress.storage import read_record, replace_file, replace_folder, write_record
from mmcompress.workspace.context import open_run
from mmcompress.workspace.folder import RunFolder

DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "list": lambda content: b"[]",
    "mapping": lambda content: b"{}",
    "garbage": lambda content: bytes(range(256)) * 8,
}
"""What becomes of the content of a file."""

REMADE = (
    "profile",
    "predictor",
    "footprint",
    "sensitivity",
    "sensitivity_tensors",
    "sensitivity_curves",
    "reference_runs",
    "node_corrections",
    "teacher_texts",
    "interaction_factors",
    "short_finetunings",
    "fitted",
    "units",
    "training_checkpoint",
    "training_history",
    "validation_quality",
    "outcomes",
    "summary",
    "device_check",
    "timings",
    "artifacts",
)
"""Records that are made again, by the name of their path."""

GIVEN = ("spec", "format", "space")
"""Records that say what was asked for."""

HARMLESS = {
    ("reference_runs", "mapping"),
    ("sensitivity_curves", "mapping"),
    ("node_corrections", "mapping"),
    ("teacher_texts", "mapping"),
    ("interaction_factors", "mapping"),
    ("training_history", "list"),
    ("timings", "mapping"),
}
"""Damages that leave a valid file: one that holds nothing yet."""


@pytest.fixture(scope="module")
def whole_folder(run_folder, tmp_path_factory):
    """A finished run with every record that a run can have."""
    folder = RunFolder(path=tmp_path_factory.mktemp("whole") / "r")
    shutil.copytree(run_folder, folder.path)
    write_record(folder.teacher_texts, {"a.png": "a cat"})
    write_record(folder.interaction_factors, {"evaluations": 1})
    write_record(folder.sensitivity_curves, {"curves": {}})
    write_record(folder.short_finetunings, {"tried": []})
    footprint = {"dense_params": {}, "params_per_unit": {}, "size_fits": {}}
    write_record(folder.footprint, footprint)
    weight = torch.nn.Parameter(torch.ones(2))
    Checkpoint(path=folder.training_checkpoint, interval_seconds=1.0).save(
        TrainingState(rate=0.1, asked_steps=9),
        [weight],
        optimizer=torch.optim.AdamW([weight]),
        best_weights=[],
    )
    return folder


@pytest.fixture()
def folder(whole_folder, tmp_path):
    """A copy of it."""
    copy = RunFolder(path=tmp_path / "r")
    shutil.copytree(whole_folder.path, copy.path)
    return copy


@pytest.fixture(scope="module")
def opened(tiny, run_folder, tmp_path_factory):
    """`opened(folder)`: the tiny run, its models loaded once, in another folder; and what it tells."""
    from dataclasses import replace

    run = open_run(tiny / "spec.yaml", run_folder, resume=True)

    def open_in(folder):
        told = []
        listener = lambda stage, message, share: told.append(message)
        return replace(run, folder=folder, shared=folder, on_progress=listener), told

    return open_in


def look_through(run):
    """Do what a resumed run does first."""
    run.folder.read_timings(run.tell_damage)
    set_damaged_shared_aside(run)
    set_damaged_artifact_aside(run)


@pytest.mark.parametrize("fault", DAMAGES)
@pytest.mark.parametrize("name", REMADE)
@pytest.mark.examples(5)
def test_what_can_be_made_again_is_set_aside_and_told(whole_folder, tmp_path, opened, name, fault):
    folder = RunFolder(path=tmp_path / "r")
    shutil.copytree(whole_folder.path, folder.path, copy_function=os.link)
    run, told = opened(folder)
    path = getattr(folder, name)
    damaged = DAMAGES[fault](path.read_bytes() if path.exists() else b"{")
    path.unlink(missing_ok=True)
    path.write_bytes(damaged)
    look_through(run)
    if (name, fault) in HARMLESS:
        assert not told and path.read_bytes() == damaged
        return
    aside = path.with_name(path.name + ".damaged")
    if name == "units":
        aside = folder.path / "weights.damaged" / path.name
    assert aside.read_bytes() == damaged and not path.exists()
    assert any(str(path) in message and "set aside as" in message for message in told), told
    told.clear()
    look_through(run)
    assert not told


@pytest.mark.parametrize("fault", DAMAGES)
@pytest.mark.parametrize("name", GIVEN)
def test_what_was_asked_for_is_refused_with_file_and_cure(tiny, tmp_path, name, fault):
    out = tmp_path / "r"
    open_run(tiny / "spec.yaml", out)
    path = getattr(RunFolder(path=out), name)
    path.write_bytes(DAMAGES[fault](path.read_bytes()))
    if (name, fault) == ("format", "mapping"):
        cure = "use a new --out"  # a folder of 0.1.0 states nothing
    else:
        cure = "put the file back from a copy, or begin a new run with another --out"
    with pytest.raises(DataError, match=cure) as error:
        open_run(tiny / "spec.yaml", out, resume=True)
    assert str(path) in str(error.value) or name == "format"


def break_file(path):
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("fault", ["altered", "manifest"])
@pytest.mark.slow
def test_a_finished_run_whose_bundle_is_damaged_exports_it_again(
    tiny, folder, machine, one_artifact, fault
):
    before = json.loads((folder.bundle / "manifest.json").read_text())
    # These of the fixture belong to no real run.
    for path in (folder.footprint, folder.short_finetunings, folder.training_checkpoint):
        path.unlink()
    broken = folder.bundle / "captioner" / "step.onnx"
    if fault == "altered":
        break_file(broken)
    else:
        (folder.bundle / "manifest.json").write_text("{")
    told = []
    summary = workflow.run(
        tiny / "spec.yaml",
        folder.path,
        resume=True,
        policy=one_artifact,
        on_progress=lambda stage, message, share: told.append(message),
        **machine,
    )
    after = json.loads((folder.bundle / "manifest.json").read_text())
    assert after["files"] == before["files"] and all(proof.passed for proof in summary.proofs)
    assert not any("step" in message and "loss" in message for message in told), "trained again"
    assert any("bundle.damaged" in message for message in told)


@pytest.mark.slow
def test_a_run_of_damaged_records_goes_on_to_the_same_structure(
    tiny, run_folder, folder, machine, one_artifact
):
    for path in (folder.short_finetunings, folder.training_checkpoint, folder.teacher_texts):
        path.unlink()
    names = ("interaction_factors", "training_history", "summary", "outcomes", "timings")
    for name in names:
        getattr(folder, name).write_text("[")
    (folder.path / "dense-test.json").write_bytes(b"")
    summary = workflow.run(
        tiny / "spec.yaml", folder.path, resume=True, policy=one_artifact, **machine
    )
    earlier = json.loads((run_folder / "summary.json").read_text())
    assert summary.kept_units == earlier["kept_units"]
    assert all(json.loads(getattr(folder, name).read_text()) for name in names[2:])


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_written_files_have_the_usual_permissions(tmp_path, umask):
    earlier = os.umask(umask)
    try:
        with replace_file(tmp_path / "a.safetensors") as path:
            save_file({"a": torch.ones(1)}, path)
        with replace_folder(tmp_path / "folder") as unfinished:
            save_file({"a": torch.ones(1)}, unfinished / "b.safetensors")
        write_record(tmp_path / "c.json", {})
    finally:
        os.umask(earlier)
    for path in (
        tmp_path / "a.safetensors",
        tmp_path / "folder/b.safetensors",
        tmp_path / "c.json",
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_no_file_of_a_run_is_for_its_owner_alone(whole_folder):
    for path in whole_folder.path.rglob("*"):
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == 0o644, path


def test_a_record_of_another_version_is_refused_in_a_few_lines(tmp_path):
    record = tmp_path / "summary.json"
    record.write_text(json.dumps({f"old_{i}": i for i in range(200)}))
    with pytest.raises(DataError, match=r"written by another version.*; and \d+ more$") as error:
        read_record(Summary, record)
    assert len(str(error.value)) < 4000


def test_damaged_weights_of_a_short_training_are_set_aside(folder, opened):
    weights = folder.short_finetuned.locate_node_weights("vision")
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"torn")
    run, messages = opened(folder)
    look_through(run)
    assert not weights.exists()
    assert any(str(weights) in message for message in messages)


def test_what_a_killed_run_was_writing_is_removed_before_it_goes_on(folder, opened):
    run, told = opened(folder)
    rounded = folder.quantized / "int8.new"
    shutil.copytree(folder.bundle, rounded)
    next(rounded.rglob("*.onnx")).write_bytes(b"torn")
    (folder.weights / "captioner.safetensors.new").write_bytes(b"torn")
    (folder.path / "earlier.new").mkdir()
    (folder.path / "distill.json").rename(folder.path / "earlier.new" / "distill.json")
    set_damaged_shared_aside(run)
    assert not rounded.exists() and not list(folder.weights.glob("*.new"))
    # An artifact that was being moved is no leftover.
    assert (folder.path / "earlier.new" / "distill.json").exists()
    look_through(run)
    assert not told and not list(folder.path.rglob("*.damaged*"))


def test_a_folder_that_is_replaced_is_never_seen_without_its_files(tmp_path):
    folder = tmp_path / "folder"
    is_over = threading.Event()
    seen = []

    def look():
        while not is_over.is_set():
            # Between two names it is not there for a moment.
            with suppress(FileNotFoundError):
                before = os.stat(folder)
                names = tuple(sorted(os.listdir(folder)))
                after = os.stat(folder)
                # Otherwise it was moved away while it was listed. A new folder may have its inode.
                if (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns):
                    seen.append(names)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(200):
            with replace_folder(folder) as unfinished:
                for name in ("a", "b", "c"):
                    (unfinished / name).write_text(str(number))
    finally:
        is_over.set()
        watcher.join()
    assert set(seen) == {("a", "b", "c")}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
