"""Weights, data and runs at storages other than S3: what is tested there holds at these, too."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest
from small_azure import PROGRAM, serve_azure
from small_gcs import serve_gcs

from mmcompress.data.remote_files import fetch_remote
from mmcompress.errors import DataError
from mmcompress.workspace import lease
from mmcompress.workspace.lease import Lease
from mmcompress.workspace.mirror_run import RunMirror, fetch_run
from mmcompress.workspace.run_storage import RunStorage


def list_missing(scheme):
    """List what a storage needs here and is not installed."""
    modules = {"gs": ("gcsfs", "gcp_storage_emulator"), "abfs": ("adlfs", "azure.storage.blob")}
    missing = []
    for name in modules[scheme]:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            missing.append(name)
    if scheme == "abfs" and shutil.which(PROGRAM) is None:
        missing.append(PROGRAM)
    return missing


@pytest.fixture(scope="module", params=["gs", "abfs"])
def bucket(request):
    """The URL of an empty bucket."""
    missing = list_missing(request.param)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    serve = {"gs": serve_gcs, "abfs": serve_azure}[request.param]
    with serve("runs") as url:
        yield url


@pytest.fixture()
def url(bucket, request):
    """A storage URL of this test alone."""
    return f"{bucket}/{request.function.__name__}"


@pytest.fixture(autouse=True)
def quick_lease(monkeypatch):
    """Leases that are renewed, and run out, in less than a second."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)


def test_a_folder_is_fetched_once_and_again_when_it_changes(url, tmp_path):
    storage = RunStorage(url)
    storage.filesystem.pipe_file(storage.locate("config.json"), b"{}")
    storage.filesystem.pipe_file(storage.locate("deep/weights.bin"), b"one")
    first = fetch_remote(url)
    assert (first / "config.json").read_text() == "{}"
    assert (first / "deep/weights.bin").read_bytes() == b"one"
    assert fetch_remote(url) == first
    storage.filesystem.pipe_file(storage.locate("deep/weights.bin"), b"two")
    changed = fetch_remote(url)
    assert changed != first and (changed / "deep/weights.bin").read_bytes() == b"two"
    with pytest.raises(DataError, match="there is nothing"):
        fetch_remote(f"{url}/missing")


def test_a_run_is_kept_and_fetched(url, tmp_path):
    folder = tmp_path / "run"
    (folder / "bundle").mkdir(parents=True)
    (folder / "next").mkdir()
    (folder / "spec.json").write_text("{}")
    (folder / "bundle/manifest.json").write_text("{}")
    (folder / "weights.bin").write_bytes(os.urandom(100_000))
    (folder / "study.journal").write_text("one\n")
    storage = RunStorage(url)
    assert storage.read_snapshot() is None
    held = Lease(storage, tell=print, on_lost=lambda: None)
    mirror = RunMirror(folder, storage, lease=held, tell=print)
    assert mirror.save()
    with (folder / "study.journal").open("a") as journal:
        journal.write("two\n")
    (folder / "weights.bin").unlink()
    assert mirror.save()
    fetch_run(url, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert (copy / "study.journal").read_text() == "one\ntwo\n"
    assert (copy / "next").is_dir() and not (copy / "weights.bin").exists()
    storage.publish({"bundle/manifest.json": folder / "bundle/manifest.json"})
    assert storage.filesystem.cat_file(storage.locate("bundle/manifest.json")) == b"{}"
    storage.publish({})
    assert storage.read_json("bundle/manifest.json") is None
    storage.remove_folder("state")
    assert storage.read_snapshot() is None


def test_one_process_works_on_a_run(url):
    first = Lease(RunStorage(url), tell=print, on_lost=lambda: None)
    first.take()
    with pytest.raises(DataError, match="is working on this run"):
        Lease(RunStorage(url), tell=print, on_lost=lambda: None).take()
    first.release()
    second = Lease(RunStorage(url), tell=print, on_lost=lambda: None)
    second.take()
    second.release()
