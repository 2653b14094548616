"""Runs at a storage URL: snapshots, the lease, and a run that goes on where its machine was lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_run import differences
from killed_run import run_tiny
from made_summary import make_summary
from small_s3 import serve_s3
from test_killed_run import describe

from mmcompress.cli import main
from mmcompress.errors import DataError, SpecError
from mmcompress.storage import replace_file, replace_folder, write_record
from mmcompress.workspace import lease, mirror_run
from mmcompress.workspace.clean import list_cache_parts
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import hold_folder
from mmcompress.workspace.lease import Lease
from mmcompress.workspace.mirror_run import (
    RunMirror,
    fetch_run,
    keep_run,
    locate_run_folder,
    locate_unsaved_record,
)
from mmcompress.workspace.run_storage import RunStorage

TESTS = Path(__file__).parent
BUCKET = "runs"


@pytest.fixture(scope="module")
def s3():
    """A client of a server with an empty bucket."""
    with serve_s3(BUCKET) as client:
        yield client


@pytest.fixture()
def url(s3, request):
    """A storage URL of this test alone."""
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture(autouse=True)
def quick_lease(monkeypatch):
    """Leases that are renewed, and run out, in less than a second."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)


def list_objects(s3, url):
    """List the names of what lies at a URL."""
    prefix = url.removeprefix(f"s3://{BUCKET}/") + "/"
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    return sorted(entry["Key"].removeprefix(prefix) for entry in found)


def make_mirror(folder, url):
    """Return what brings a folder to a URL, without a thread."""
    storage = RunStorage(url)
    held = Lease(storage, tell=print, on_lost=lambda: None)
    return RunMirror(folder, storage, lease=held, tell=print)


def read_tree(folder):
    """Return the content of every file, and None for every empty folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


def test_a_snapshot_is_the_folder_as_it_was(s3, url, tmp_path):
    folder = tmp_path / "run"
    (folder / "next").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "weights/a.safetensors").write_bytes(os.urandom(3000))
    (folder / "spec.json").write_text("{}")
    (folder / "study.journal").write_text("one\n")
    expected = read_tree(folder)
    (folder / "run.lock").write_text("1")
    (folder / "scratch").mkdir()
    (folder / "bundle.new").mkdir()
    assert make_mirror(folder, url).save()
    fetch_run(url, tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == expected


def test_what_is_new_of_the_trials_goes_alone(s3, url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.json").write_text("")
    journal = folder / "study.journal"
    mirror = make_mirror(folder, url)
    for text in ("a" * 1000, "b" * 10, "c" * 10):
        with journal.open("a") as file:
            file.write(text)
        assert mirror.save()
    sizes = [
        s3.head_object(Bucket=BUCKET, Key=f"{url.partition(BUCKET + '/')[2]}/{name}")[
            "ContentLength"
        ]
        for name in list_objects(s3, url)
        if name.startswith("state/pieces/")
    ]
    assert sorted(sizes) == [0, 10, 10, 1000]
    # A journal that was repaired is another file.
    journal.write_text("repaired")
    assert mirror.save()
    fetch_run(url, tmp_path / "copy")
    assert (tmp_path / "copy/study.journal").read_text() == "repaired"


def test_what_is_of_no_use_any_more_is_removed(s3, url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    mirror = make_mirror(folder, url)
    for number in range(3):
        with replace_file(folder / "training.safetensors") as unfinished:
            unfinished.write_text(f"checkpoint {number}")
        assert mirror.save()
    pieces = [name for name in list_objects(s3, url) if name.startswith("state/pieces/")]
    assert len(pieces) == 1


@contextmanager
def working(work):
    """Call `work` again and again in a thread, with the number of the call, until the block ends."""
    is_over = threading.Event()

    def go_on():
        number = 0
        while not is_over.is_set():
            number += 1
            work(number)

    worker = threading.Thread(target=go_on)
    worker.start()
    try:
        yield
    finally:
        is_over.set()
        worker.join()


def test_every_snapshot_is_one_moment_of_a_folder_that_changes(s3, url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.json").write_text("{}")

    def write_round(number):
        """Write a round into one folder, then into another one: never the other way round."""
        for name in ("first", "second"):
            with replace_folder(folder / name) as unfinished:
                (unfinished / "round").write_text(str(number))
            time.sleep(0.002)

    mirror = make_mirror(folder, url)
    saved = 0
    with working(write_round):
        give_up_at = time.monotonic() + 20
        while saved < 8 and time.monotonic() < give_up_at:
            if not mirror.save():
                continue
            saved += 1
            fetch_run(url, tmp_path / "copy")
            rounds = {
                name: int((tmp_path / "copy" / name / "round").read_text())
                for name in ("first", "second")
                if (tmp_path / "copy" / name).exists()
            }
            if len(rounds) == 2:
                assert rounds["first"] - rounds["second"] in (0, 1), rounds
    assert saved == 8


def test_what_is_written_of_a_file_in_place_has_its_own_hash(s3, url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.json").write_text("{}")
    mirror = make_mirror(folder, url)
    with (folder / "weights.bin").open("wb", buffering=0) as file:

        def write_in_place(number):
            """Write other bytes of the same length into the same file."""
            file.seek(0)
            file.write(bytes([number % 256]) * 200_000)

        with working(write_in_place):
            for _ in range(20):
                mirror.save()
    assert mirror.save()
    # A piece that is not what its name says is refused.
    fetch_run(url, tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == read_tree(folder)


def test_a_change_within_a_tick_of_the_file_system_is_seen(s3, url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    record = folder / "spec.json"
    record.write_text("before")
    status = record.stat()
    mirror = make_mirror(folder, url)
    assert mirror.save()
    record.write_text("behind")
    os.utime(record, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert mirror.save()
    fetch_run(url, tmp_path / "copy")
    assert (tmp_path / "copy/spec.json").read_text() == "behind"


def test_a_run_that_another_process_renews_is_refused(s3, url):
    storage = RunStorage(url)
    first = Lease(storage, tell=print, on_lost=lambda: None)
    first.take()
    try:
        with pytest.raises(DataError, match="is working on this run"):
            Lease(storage, tell=print, on_lost=lambda: None).take()
    finally:
        first.release()
    assert list_objects(s3, url) == []


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ({"owner": "x", "renewals": 4, "pid": 1, "host": "lost-node"}, "process 1 on lost-node"),
        ({"owner": "x", "renewals": 4, "pid": 2**22 + 1, "host": os.uname().nodename}, ""),
    ],
)
def test_a_lease_that_was_left_behind_is_taken(s3, url, left, told):
    storage = RunStorage(url)
    storage.write_json("lease.json", left)
    messages = []
    taken = Lease(storage, tell=messages.append, on_lost=lambda: None)
    taken.take()
    taken.release()
    assert told in " ".join(messages)


def test_a_process_whose_lease_was_taken_stops_and_writes_no_more(s3, url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.json").write_text("mine")
    lost = threading.Event()
    storage = RunStorage(url)
    held = Lease(storage, tell=print, on_lost=lost.set)
    mirror = RunMirror(folder, storage, lease=held, tell=print)
    held.take()
    assert mirror.save()
    storage.write_json("lease.json", {"owner": "another"})
    assert lost.wait(60)
    (folder / "spec.json").write_text("changed after that")
    mirror.save()
    held.release()
    fetch_run(url, tmp_path / "copy")
    assert (tmp_path / "copy/spec.json").read_text() == "mine"
    assert storage.read_json("lease.json") == {"owner": "another"}


def test_a_storage_that_is_away_for_a_while_costs_nothing(s3, url, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror_run, "SAVE_SECONDS", 0.05)
    messages = []
    with keep_run(url, resume=True, tell=messages.append) as folder:
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("before")
        written = RunStorage.write_json
        monkeypatch.setattr(RunStorage, "write_json", refuse_to_write)
        (folder / "spec.json").write_text("meanwhile")
        give_up_at = time.monotonic() + 5
        while not messages and time.monotonic() < give_up_at:
            time.sleep(0.02)
        monkeypatch.setattr(RunStorage, "write_json", written)
    assert "the storage is away; the run goes on" in messages[0]
    fetch_run(url, tmp_path / "copy")
    assert (tmp_path / "copy/spec.json").read_text() == "meanwhile"


def refuse_to_write(storage, path, content):
    """Stand in for a storage that gives no answer."""
    raise DataError("the storage is away")


def test_people_find_the_result_as_plain_files(s3, url, tmp_path):
    with keep_run(url, resume=True, tell=print) as folder:
        (folder / "bundle").mkdir(parents=True)
        (folder / "bundle/manifest.json").write_text("{}")
        (folder / "report.html").write_text("<p>")
        (folder / "fitted.json").write_text("{}")
    plain = [name for name in list_objects(s3, url) if not name.startswith("state/")]
    assert plain == ["bundle/manifest.json", "report.html"]
    with keep_run(url, resume=True, tell=print) as folder:
        (folder / "report.html").unlink()
    plain = [name for name in list_objects(s3, url) if not name.startswith("state/")]
    assert plain == ["bundle/manifest.json"]


def test_a_copy_that_was_saved_from_here_keeps_what_it_has_on_top(s3, url, tmp_path):
    with keep_run(url, resume=True, tell=print) as folder:
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("saved")
    (folder / "fitted.json").write_text("made after the last snapshot")
    with keep_run(url, resume=True, tell=print) as again:
        assert again == folder and (folder / "fitted.json").exists()


def test_a_damaged_piece_is_told(s3, url, tmp_path):
    with keep_run(url, resume=True, tell=print) as folder:
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("content")
    (piece,) = [name for name in list_objects(s3, url) if "/pieces/" in name]
    key = f"{url.partition(BUCKET + '/')[2]}/{piece}"
    s3.put_object(Bucket=BUCKET, Key=key, Body=b"other")
    with pytest.raises(DataError, match=f"{piece} is damaged"):
        fetch_run(url, tmp_path / "copy")
    s3.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(DataError, match="pieces of the run are missing"):
        fetch_run(url, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_bucket_that_is_not_there_is_told_before_the_work(s3, tiny):
    place = "s3://no-such-bucket/run"
    done = CliRunner().invoke(main, ["run", str(tiny / "spec.yaml"), "--out", place])
    assert done.exit_code == 2 and place in done.stderr, done.stderr


def test_commands_that_keep_no_run_refuse_a_url():
    with pytest.raises(SpecError, match="storage URL"), hold_folder("s3://bucket/compare"):
        pytest.fail("it was taken for a folder")


@pytest.mark.parametrize(
    "command", ["show", "explain", "report", "doctor", "verify", "compare-runs"]
)
def test_a_command_that_reads_a_folder_says_how_a_run_is_copied(command):
    done = CliRunner().invoke(main, [command, "s3://bucket/run"])
    assert done.exit_code == 2
    assert "mmcompress fetch s3://bucket/run --out FOLDER" in done.stderr


def test_a_local_copy_that_was_removed_replaces_no_snapshot(s3, url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "spec.json").write_text("{}")
    (folder / "study.journal").write_text("hours of trials")
    mirror = make_mirror(folder, url)
    assert mirror.save()
    shutil.rmtree(folder)
    assert not mirror.save()
    folder.mkdir()
    (folder / "timings.json").write_text("{}")
    with pytest.raises(DataError, match="the local copy of the run was removed"):
        mirror.save()
    # It is no outage: the end of the run does not wait for it.
    mirror.start()
    with pytest.raises(DataError, match="the local copy of the run was removed"):
        mirror.stop(is_failing=False)
    fetch_run(url, tmp_path / "copy")
    assert (tmp_path / "copy/study.journal").read_text() == "hours of trials"


def test_the_cache_is_cleaned_of_copies_that_nobody_works_on(s3, url, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "cache"))
    with keep_run(url, resume=False, tell=print) as folder:
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("{}")
        with hold_folder(folder):
            (part,) = list_cache_parts()
            assert not part.can_go and "a process works on it" in part.about
    (part,) = list_cache_parts()
    locate_unsaved_record(folder).touch()
    (cut_off,) = list_cache_parts()
    assert not cut_off.can_go and "was cut off" in cut_off.about
    assert part.can_go and part.path == folder and f"copy of the run at {url}" in part.about


def test_a_run_that_is_there_is_refused_before_it_is_fetched(s3, url, tmp_path, monkeypatch):
    with keep_run(url, resume=False, tell=print) as folder:
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("{}")
        (folder / "profile.json").write_text("{}")
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "elsewhere"))
    with (
        pytest.raises(DataError, match=f"{url}: not empty; add --resume"),
        keep_run(url, resume=False, tell=print),
    ):
        pytest.fail("it was begun anew")
    assert not locate_run_folder(url).exists()


def test_credentials_in_a_url_are_refused_and_not_shown():
    with pytest.raises(DataError, match="holds no credentials") as refused:
        RunStorage("s3://key:secret@bucket/run")
    assert "secret" not in str(refused.value)


def test_a_run_that_has_not_begun_is_none(s3, url, tmp_path):
    with keep_run(url, resume=False, tell=print) as folder:
        folder.mkdir(parents=True)
        (folder / "timings.json").write_text("{}")
    with pytest.raises(DataError, match="nothing was made in it yet"):
        fetch_run(url, tmp_path / "copy")


def test_a_run_is_fetched_by_its_url(s3, url, tmp_path):
    with keep_run(url, resume=True, tell=print) as folder:
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("{}")
    done = CliRunner().invoke(main, ["fetch", url, "--out", str(tmp_path / "here")])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "here/spec.json").exists()
    again = CliRunner().invoke(main, ["fetch", url, "--out", str(tmp_path / "here")])
    assert again.exit_code == 2 and "exists already" in again.stderr
    nothing = CliRunner().invoke(main, ["fetch", f"{url}-no", "--out", str(tmp_path / "there")])
    assert nothing.exit_code == 2 and "there is no run" in nothing.stderr


def watch(place, *options):
    done = CliRunner().invoke(main, ["watch", place, *options])
    return done.exit_code, " ".join(done.output.split())


def test_a_run_is_watched_by_its_url(s3, url, tmp_path, monkeypatch):
    """From a machine that has nothing of it, while it is made, when its machine is lost, after it."""
    from mmcompress.workspace.progress_log import ProgressLog

    monkeypatch.setattr("mmcompress.workspace.watched_run.LEASE_SECONDS", 1.0)
    monkeypatch.setattr("mmcompress.workspace.watched_run.SECONDS_BETWEEN_REMOTE_LOOKS", 0.2)
    code, said = watch(url, "--once")
    assert code == 2 and "there is no run" in said
    with keep_run(url, resume=False, tell=print) as folder:
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text("{}")
        (folder / "weights.bin").write_bytes(bytes(1_000_000))
        log = ProgressLog(RunFolder(path=folder), lambda *told: None)
        log.begin()
        log("search", "trial 1 of 9", 0.1)
        for _ in range(100):
            if "trial 1 of 9" in watch(url, "--once")[1]:
                break
            time.sleep(0.1)
        code, said = watch(url, "--once")
        assert code == 0 and "the run goes on" in said
        log("search", "trial 9 of 9", 1.0)
        log("distill", "step 1", 0.1)
        lease = RunStorage(url).read_json("lease.json")
    code, said = watch(url)
    assert code == 0 and "step 1" in said
    assert "the run was cut off; the same command with --resume goes on" in said
    # The lease of a machine that is lost stays as it was.
    RunStorage(url).write_json("lease.json", lease)
    code, said = watch(url)
    assert code == 0 and "the run was cut off" in said
    with keep_run(url, resume=True, tell=print) as folder:
        write_record(folder / "summary.json", make_summary())
    code, said = watch(url)
    assert "the run is finished: 2.08x" in said, said
    assert f"mmcompress fetch {url} --out FOLDER copies it" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_goes_on_where_its_machine_was_lost(s3, url, tiny, tmp_path, monkeypatch):
    run_tiny(tiny / "spec.yaml", tmp_path / "whole")
    whole = describe(tmp_path / "whole")
    for number, lines in enumerate((4, 12)):
        # Another machine: it has nothing of the first one.
        environment = {**os.environ, "MMCOMPRESS_CACHE": str(tmp_path / f"machine-{number}")}
        monkeypatch.setenv("MMCOMPRESS_CACHE", environment["MMCOMPRESS_CACHE"])
        progress = locate_run_folder(url) / "progress.jsonl"
        with subprocess.Popen(
            [sys.executable, "killed_run.py", tiny / "spec.yaml", url],
            cwd=TESTS,
            env=environment,
            stdout=subprocess.DEVNULL,
        ) as process:
            while count_lines(progress) < lines and process.poll() is None:
                time.sleep(0.02)
            time.sleep(0.5)
            process.kill()
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "last-machine"))
    run_tiny(tiny / "spec.yaml", url)
    fetch_run(url, tmp_path / "result")
    assert list(differences(whole, describe(tmp_path / "result"), tolerance=1e-6)) == []
    assert CliRunner().invoke(main, ["doctor", str(tmp_path / "result")]).exit_code == 0


def count_lines(file):
    """Count the lines of a file that need not be there."""
    return len(file.read_bytes().splitlines()) if file.exists() else 0
