"""Weights and data at storage URLs, read from a server of S3 at 127.0.0.1."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_s3 import serve_s3

from mmcompress.data import remote_files
from mmcompress.data.open_dataset import open_dataset
from mmcompress.data.remote_files import fetch_remote, trim_remote_cache
from mmcompress.errors import DataError, MissingPackage, ModelError
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.sources import load_models
from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.spec.storage_urls import REMOTE_PACKAGES, is_remote
from mmcompress.workspace.context import open_run

BUCKET = "models"


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """`storage(folder, name)`: put a folder into the bucket; returns its URL."""
    with serve_s3(BUCKET) as client:

        def put(folder: Path, name: str) -> str:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    key = f"{name}/{path.relative_to(folder).as_posix()}"
                    client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
            return f"s3://{BUCKET}/{name}"

        yield put


@pytest.fixture()
def downloads(monkeypatch):
    """The files that were fetched."""
    fetched = []
    opened = remote_files.open_filesystem

    def open_noting(url):
        filesystem = opened(url)
        get_file = filesystem.get_file

        def get_noting(remote, local):
            fetched.append(remote)
            return get_file(remote, local)

        filesystem.get_file = get_noting
        return filesystem

    monkeypatch.setattr(remote_files, "open_filesystem", open_noting)
    return fetched


def write_folder(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "remote"),
    [
        ("s3://b/a", True),
        ("gs://b", True),
        ("abfs://c@x/y", True),
        ("./a", False),
        ("https://a/b", False),
        ("transformers:a/b", False),
    ],
)
def test_urls_of_storages_are_told_from_paths_and_sources(text, remote):
    assert is_remote(text) is remote


def test_a_folder_is_fetched_once_and_again_when_it_changes(storage, downloads, tmp_path):
    folder = write_folder(tmp_path / "a", x="1", inner__y="2")
    url = storage(folder, "once")
    fetched = fetch_remote(url)
    assert (fetched / "x").read_text() == "1" and (fetched / "inner/y").read_text() == "2"
    assert len(downloads) == 2
    assert fetch_remote(f"{url}/") == fetched and len(downloads) == 2
    (folder / "x").write_text("3")
    storage(folder, "once")
    changed = fetch_remote(url)
    assert changed != fetched and (changed / "x").read_text() == "3"
    # What a run reads still is there.
    assert (fetched / "x").read_text() == "1"
    assert fetch_remote(f"{url}/x").read_text() == "3"


def test_a_fetch_that_was_cut_off_leaves_nothing_that_counts(storage, tmp_path, monkeypatch):
    url = storage(write_folder(tmp_path / "a", x="1", y="2"), "cut")
    opened = remote_files.open_filesystem

    def open_broken(url):
        filesystem = opened(url)
        get_file = filesystem.get_file

        def get_first(remote, local):
            if remote.endswith("y"):
                raise ConnectionError("the line went dead")
            return get_file(remote, local)

        filesystem.get_file = get_first
        return filesystem

    with monkeypatch.context() as patch:
        patch.setattr(remote_files, "open_filesystem", open_broken)
        with pytest.raises(DataError, match="s3://models/cut: can't be read: the line went dead"):
            fetch_remote(url)
    assert (fetch_remote(url) / "y").read_text() == "2"


def test_a_pipeline_at_urls_is_loaded_as_from_folders(storage, tiny, tmp_path):
    captioner = storage(tiny / "captioner", "captioner")
    clip = storage(tiny / "clip", "clip")
    text = (tiny / "spec.yaml").read_text()
    spec_path = tmp_path / "spec.yaml"
    spec_path.write_text(text.replace("./captioner", captioner).replace("./clip", clip))
    spec = load_spec(spec_path)
    assert spec.nodes["vision"].source == clip
    here = load_models(load_spec(tiny / "spec.yaml"))
    for name, model in load_models(spec).items():
        for key, value in model.state_dict().items():
            assert value.equal(here[name].state_dict()[key])
    missing = text.replace("./captioner", f"s3://{BUCKET}/nowhere").replace("./clip", clip)
    spec_path.write_text(missing)
    with pytest.raises(
        ModelError, match=r"nodes\.captioner: source 's3://models/nowhere'.*nothing"
    ):
        open_run(spec_path, tmp_path / "r")


def test_data_at_a_url_are_read_as_from_a_folder(storage, tiny, tmp_path):
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "texts.txt").write_text("".join(f"line number {i}\n" for i in range(60)))
    url = storage(lines, "texts")
    overrides = {"data": {"kind": "text_lines", "options": {"path": f"{url}/texts.txt"}}}
    spec = load_spec(tiny / "spec.yaml", {f"data.{key}": v for key, v in overrides["data"].items()})
    assert spec.data.options["path"] == f"{url}/texts.txt"
    here = {**spec.data.options, "path": str(lines / "texts.txt")}
    found = open_dataset(spec.data).load("val", 4)
    assert found.texts == open_dataset(replace(spec.data, options=here)).load("val", 4).texts


def test_what_was_not_used_for_longest_goes_first(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "cache"))
    folders = []
    for i in range(3):
        url = storage(write_folder(tmp_path / f"f{i}", x=str(i) * 4_000_000), f"trim{i}")
        folders.append(fetch_remote(url))
    assert trim_remote_cache(0.005) == []  # all were used today
    long_ago = 2 * remote_files.KEPT_SECONDS
    for i, folder in enumerate(folders[:2]):
        used = folder.stat().st_mtime - long_ago - 1000 * (1 - i)
        os.utime(folder, (used, used))
    assert trim_remote_cache(0.01) == [folders[0]]
    assert trim_remote_cache(0.001) == [folders[1]]
    assert sorted(locate_cache_folder().glob("remote/*")) == [folders[2]]


def test_a_storage_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(REMOTE_PACKAGES, "gs", "gcsfs")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingPackage, match=r"\[gcs\]"):
        fetch_remote("gs://bucket/folder")


def test_a_name_that_leads_out_of_the_cache_is_refused(monkeypatch):
    class Storage:
        def _strip_protocol(self, url):
            return "mm/a"

        def find(self, root, detail):
            return {"mm/a/../../x": {"size": 1, "ETag": "1"}}

    monkeypatch.setattr(remote_files, "open_filesystem", lambda url: Storage())
    with pytest.raises(DataError, match=r"a name with '\.\.' is not fetched"):
        fetch_remote("s3://models/a")
