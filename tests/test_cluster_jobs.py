"""Runs as jobs of a real Ray cluster of one node on this machine: sent, followed, stopped, fetched."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
from click.testing import CliRunner

from mmcompress.cli import main

ANSWER_SECONDS = 90


@pytest.fixture(scope="module")
def server():
    """The address of a job server whose cluster ends with the tests."""
    from ray._common.network_utils import find_free_port
    from ray.cluster_utils import Cluster

    port = find_free_port()
    # Else Ray's agent looks for the cluster at the address of the network, where it is not.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "include_dashboard": True,
            "node_ip_address": "127.0.0.1",
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            "dashboard_agent_listen_port": find_free_port(),
        },
    )
    yield f"http://127.0.0.1:{port}"
    cluster.shutdown()
    del os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]


def call(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.very_slow
@pytest.mark.timeout(400)
def test_a_job_is_followed_stopped_and_fetched(server, tiny, tmp_path):
    folder = tmp_path / "shared" / "run"
    submit = ["submit", tiny / "spec.yaml", "--address", server, "--out", folder]
    sent = subprocess.Popen(
        [sys.executable, "-m", "mmcompress.cli", *map(str, submit)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        job_id = sent.stdout.readline().split()[1]
        status = call("job", "status", job_id, "--address", server)
        assert status.exit_code == 0 and job_id in status.stdout, status.stderr
        stopped = call("job", "stop", job_id, "--address", server)
        assert "goes on" in stopped.stdout or "ended already" in stopped.stdout, stopped.stderr
        sent.communicate(timeout=ANSWER_SECONDS)
    finally:
        sent.kill()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("a result")
    fetched = call("job", "fetch", job_id, "--address", server, "--out", tmp_path / "here")
    assert fetched.exit_code == 0, fetched.stderr
    assert (tmp_path / "here" / "report.md").read_text() == "a result"
    again = call("job", "fetch", job_id, "--address", server, "--out", tmp_path / "here")
    assert again.exit_code == 2 and "exists already" in again.stderr
    folder.rename(tmp_path / "elsewhere")
    lost = call("job", "fetch", job_id, "--address", server, "--out", tmp_path / "other")
    assert lost.exit_code == 2 and f"{folder}: there is no such folder" in lost.stderr
    folder.parent.rename(tmp_path / "unmounted")
    unseen = call("job", "fetch", job_id, "--address", server, "--out", tmp_path / "other")
    assert unseen.exit_code == 2 and str(folder) in unseen.stderr and "not see" in unseen.stderr


@pytest.mark.very_slow
def test_an_unknown_job_is_named_with_what_there_is(server):
    for command in ("status", "logs", "stop"):
        done = call("job", command, "raysubmit_nothing", "--address", server)
        assert done.exit_code == 2 and "no job 'raysubmit_nothing'" in done.stderr, done.stderr


@pytest.fixture()
def guarded_server(tmp_path):
    """The address of a job server that wants a token, and the file of the token.

    It runs in processes of its own: Ray reads once in a process whether there are tokens.
    """
    from ray._common.network_utils import find_free_port

    token_file = tmp_path / "token"
    token_file.write_text(secrets.token_hex(32))
    port = find_free_port()
    options = {
        "--port": find_free_port(),
        "--node-ip-address": "127.0.0.1",
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": port,
        "--dashboard-agent-listen-port": find_free_port(),
        "--num-cpus": 0,
        "--temp-dir": tempfile.mkdtemp(prefix="ray-"),  # a path of a test is too long for a socket
    }
    words = [f"{name}={value}" for name, value in options.items()]
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *words],
        env=with_token(token_file) | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    yield f"http://127.0.0.1:{port}", token_file
    started = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    head.wait(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=10)
    for process in alive:
        process.kill()
    shutil.rmtree(options["--temp-dir"], ignore_errors=True)


def with_token(token_file):
    """Return an environment that shows a token to Ray."""
    return {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


@pytest.mark.very_slow
@pytest.mark.timeout(300)
def test_a_server_that_wants_a_token_lets_in_who_has_it(guarded_server, tmp_path):
    address, token_file = guarded_server
    words = [sys.executable, "-m", "mmcompress.cli", "job", "status", "raysubmit_x"]

    def ask(environment):
        return subprocess.run(
            [*words, "--address", address],
            env=environment,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )

    give_up_at = time.monotonic() + ANSWER_SECONDS
    while "no job 'raysubmit_x'" not in (answer := ask(with_token(token_file))).stderr:
        assert time.monotonic() < give_up_at, answer.stderr
    wrong_file = tmp_path / "wrong"
    wrong_file.write_text(secrets.token_hex(32))
    for environment in (dict(os.environ), with_token(wrong_file)):
        refused = ask(environment)
        assert refused.returncode == 2, refused.stderr
        assert "does not let this machine in" in refused.stderr
        assert "RAY_AUTH_TOKEN_PATH" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.very_slow
@pytest.mark.timeout(300)
# Ray asks aiohttp for a web socket in the old way.
@pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
def test_the_same_folder_follows_the_job_that_runs_in_it(server, tmp_path):
    import io

    from mmcompress.search.jobs import FOLDER_KEY, connect_to_server, submit_run

    client = connect_to_server(server)
    folder = (tmp_path / "run").resolve()
    give_up_at = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            job_id = client.submit_job(
                entrypoint="sleep 4; echo from the job that runs; exit 3",
                metadata={FOLDER_KEY: str(folder)},
            )
            break
        except RuntimeError:
            assert time.monotonic() < give_up_at
            time.sleep(1)
    (tmp_path / "space.yaml").write_text("{}")
    log, told = io.StringIO(), []
    exit_code = submit_run(
        {"nodes": {}},
        server,
        folder=str(folder),
        space=tmp_path / "space.yaml",
        log=log,
        tell_job=told.append,
    )
    assert exit_code == 3 and told == [job_id]
    assert "runs in this folder already" in log.getvalue()
    assert "from the job that runs" in log.getvalue()
