"""What ends or begins a run for reasons of the machine: locks, folders, sockets, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from mmcompress.cli import main
from mmcompress.errors import ClusterError, DataError
from mmcompress.run import run_targets as workflow
from mmcompress.runtime.cache import find_cache_fault, locate_cache_folder
from mmcompress.search.ray_folder import MAX_SOCKET_PATH, RAY_SOCKET_PATH, choose_ray_folder
from mmcompress.workspace.context import open_run
from mmcompress.workspace.hold_folder import hold_folder

HOLD = """
import sys, time
from mmcompress.workspace.hold_folder import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture()
def holder(tmp_path):
    """A process that holds a folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "r")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_two_drivers_of_one_folder_are_refused_by_process_and_host(tiny, tmp_path, holder):
    owner = f"process {holder.pid} on {os.uname().nodename} is working on this run"
    with pytest.raises(DataError, match=owner):
        workflow.run(tiny / "spec.yaml", tmp_path / "r")
    # The lock is still that of the other process.
    assert json.loads((tmp_path / "r/run.lock").read_text())["pid"] == holder.pid


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "r/run.lock").exists()
    with hold_folder(tmp_path / "r"):
        assert json.loads((tmp_path / "r/run.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "r/run.lock").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 4194304, "host": "HERE"}'])
def test_a_torn_or_stale_lock_is_taken_over(tmp_path, content):
    (tmp_path / "run.lock").write_text(content.replace("HERE", os.uname().nodename))
    with hold_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_host_is_refused_with_its_cure(tmp_path):
    lock = tmp_path / "run.lock"
    lock.write_text('{"pid": 12, "host": "elsewhere"}')
    cure = f"process 12 on elsewhere .* or remove {lock} if it is gone"
    with pytest.raises(DataError, match=cure), hold_folder(tmp_path):
        pass
    assert lock.exists()


def test_a_folder_is_held_once_in_one_process_and_free_after_an_error(tmp_path):
    same = tmp_path / "r"
    with (
        pytest.raises(DataError, match=f"process {os.getpid()} on"),
        hold_folder(same),
        hold_folder(same),
    ):
        pass
    assert not (tmp_path / "r").exists(), "an empty folder stays"
    with hold_folder(tmp_path / "r"):
        (tmp_path / "r/a").touch()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["a"]


def test_an_out_folder_that_cannot_be_written_is_told_before_anything_else(tiny, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "r", Path("/proc/none/r")):
        with pytest.raises(DataError, match=r"can't be written: .*; choose another --out"):
            workflow.run(tiny / "spec.yaml", out, overrides={"nodes.vision.source": "./none"})


def test_a_cache_is_found_without_a_home_where_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("~").expanduser())
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without an entry
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path))
    assert locate_cache_folder() == tmp_path / "mmcompress" and not find_cache_fault()
    monkeypatch.delenv("MMCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert locate_cache_folder() == tmp_path / "x/mmcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(DataError, match="set MMCOMPRESS_CACHE"):
        locate_cache_folder()
    assert "set MMCOMPRESS_CACHE" in find_cache_fault()


def test_a_cache_that_cannot_be_written_is_told_with_its_cure(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "file"))
    fault = find_cache_fault()
    assert str(tmp_path / "file") in fault and "set MMCOMPRESS_CACHE" in fault


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_ray_gets_a_folder_short_enough_for_its_sockets(tmp_path, monkeypatch, variable):
    import tempfile

    def use_folder(folder):
        monkeypatch.setattr(tempfile, "tempdir", None)  # it keeps what it found first
        monkeypatch.setenv(variable, str(folder))

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("x" * 60)
    long.mkdir()
    use_folder(long)
    assert len(os.fsencode(choose_ray_folder() + RAY_SOCKET_PATH)) <= MAX_SOCKET_PATH
    use_folder("/tmp")
    assert choose_ray_folder() == "/tmp/ray"
    use_folder(long)
    with pytest.raises(ClusterError, match="Set RAY_TMPDIR to a short one"):
        choose_ray_folder(short_folders=())


@pytest.mark.parametrize("given", [(), ("--resume",)])
def test_ctrl_c_is_exit_130_with_the_line_that_goes_on(tiny, tmp_path, monkeypatch, given):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmcompress.run.run_targets.run_targets", interrupt)
    spec, out = str(tiny / "spec.yaml"), str(tmp_path / "my run")
    arguments = ["run", spec, "--out", out, *given]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 130
    assert f"go on with: mmcompress run {spec} --out '{out}' --resume\n" in result.output
    monkeypatch.setattr("mmcompress.cli.validate.load_spec", interrupt)
    result = CliRunner().invoke(main, ["validate", spec])
    assert result.exit_code == 130 and result.output == "interrupted\n"


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there_is_told_in_seconds(tiny, tmp_path, scheme):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{scheme}127.0.0.1:{port}"
    overrides = {"search.executor": "ray", "search.ray_address": address}
    start = time.monotonic()
    with pytest.raises(ClusterError, match=f"no Ray cluster at {address}: nobody answers there"):
        workflow.run(tiny / "spec.yaml", tmp_path / "r", overrides=overrides)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "r" / "profile.json").exists()


@pytest.mark.parametrize("failures", [2, 3])
def test_a_local_ray_that_is_slow_to_start_is_started_again(monkeypatch, failures):
    from mmcompress.search import ray_executor

    calls = []

    def start(**options):
        calls.append(options["_node_ip_address"])
        if len(calls) <= failures:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray_executor.ray, "init", start)
    if failures < ray_executor.MAX_LOCAL_STARTS:
        ray_executor._start_local_ray(1)
        assert len(calls) == failures + 1
    else:
        with pytest.raises(ClusterError, match=r"no Ray cluster at this machine: .* timed out"):
            ray_executor.RayExecutor(None, 1)
    assert set(calls) == {"127.0.0.1"}


def test_sigterm_is_exit_143_with_the_line_that_goes_on(tiny, tmp_path, monkeypatch):
    def terminate(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("mmcompress.run.run_targets.run_targets", terminate)
    handler = signal.getsignal(signal.SIGTERM)
    arguments = ["run", str(tiny / "spec.yaml"), "--out", str(tmp_path / "r")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 143
    assert f"terminated; go on with: mmcompress {' '.join(arguments)} --resume\n" in result.output
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_run_without_a_cache_ends_in_the_first_second(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMCOMPRESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set MMCOMPRESS_CACHE"):
        workflow.run(tiny / "spec.yaml", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_an_option_of_another_name_is_refused(tiny, tmp_path):
    with pytest.raises(TypeError, match="unknown option 'resum'; did you mean 'resume'"):
        open_run(tiny / "spec.yaml", tmp_path / "r", resum=True)
    assert not (tmp_path / "r" / "spec.json").exists()


def test_a_folder_in_which_nothing_was_made_is_taken_for_another_spec(tiny, tmp_path):
    out = tmp_path / "r"
    open_run(tiny / "spec.yaml", out, overrides={"target": "3x"})
    (out / "progress.jsonl").write_text("")
    run = open_run(tiny / "spec.yaml", out, overrides={"target": "1.5x", "distill.batch": 8})
    assert run.spec.target == "1.5x"
    (out / "profile.json").write_text("{}")
    with pytest.raises(DataError, match="not empty; add --resume"):
        open_run(tiny / "spec.yaml", out)
    with pytest.raises(DataError, match=r"begun with another .* \(of distill.batch, target\)"):
        open_run(tiny / "spec.yaml", out, resume=True)
