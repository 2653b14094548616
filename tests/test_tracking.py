"""Results on an MLflow server: a real one, with the real client, in an environment of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sysconfig
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT
from made_summary import make_summary

from mmcompress.cli import main
from mmcompress.errors import SpecError, TrackingError
from mmcompress.report.trackers.base import open_tracker
from mmcompress.run import run_targets as workflow
from mmcompress.runtime.addresses import hide_password
from mmcompress.storage import write_record
from mmcompress.workspace.folder import RunFolder

ENVIRONMENT_VARIABLE = "MMCOMPRESS_MLFLOW"
"""Names a virtual environment with MLflow: `python tools/make_mlflow_environment.py FOLDER` makes it."""

ANSWER_SECONDS = 90

SEND = """
import sys
from pathlib import Path
from mmcompress.errors import TrackingError
from mmcompress.report.trackers.base import open_tracker
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

address, folder = sys.argv[1:]
try:
    print(open_tracker(address).log_result(load_summary(folder), RunFolder(path=Path(folder))))
except TrackingError as error:
    sys.exit(f"told: {error}")
"""

SHIPPED_SPEC = str(Path(__file__).resolve().parents[1] / "pipelines/clip_captioner.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlflow", "expected KIND:ADDRESS"),
        ("mlflow:", "expected KIND:ADDRESS"),
        ("mlfow:http://x", "did you mean 'mlflow'"),
    ],
)
def test_an_address_that_names_no_tracker_is_refused(text, message):
    with pytest.raises(SpecError, match=message):
        open_tracker(text)


def test_users_and_passwords_are_hidden():
    text = "mlflow at https://me:secret@host:5000/a and postgresql+psycopg://u:p@db/x, a@b.org"
    assert (
        hide_password(text)
        == "mlflow at https://***@host:5000/a and postgresql+psycopg://***@db/x, a@b.org"
    )


class Gone:
    """A server that answers at first and then does not."""

    def log_result(self, summary, folder):
        raise TrackingError("mlflow at http://x: connection refused")


def test_a_server_that_goes_away_costs_no_result(monkeypatch, tmp_path):
    monkeypatch.setattr(workflow, "run_targets", lambda *a, **o: [make_summary()])
    monkeypatch.setattr("mmcompress.cli.run.open_tracker", lambda address: Gone())
    command = ["run", SHIPPED_SPEC, "--out", str(tmp_path / "r"), "--track", "mlflow:http://x"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "the result was not tracked: mlflow at http://x: connection refused" in done.output


@pytest.fixture(scope="module")
def environment():
    """The Python of an environment with MLflow, and with the packages of this one behind it."""
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if not folder:
        pytest.skip(f"{ENVIRONMENT_VARIABLE} names no environment with MLflow")
    [packages] = Path(folder).glob("lib/python*/site-packages")
    # Its own packages come first.
    (packages / "zz_behind.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    return Path(folder) / "bin"


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    """The address of a server that ends with the tests."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        environment / "mlflow",
        "server",
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/runs.db"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    give_up_at = time.monotonic() + ANSWER_SECONDS
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < give_up_at, (folder / "log").read_text()
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.fixture()
def run_folder_of(tmp_path):
    """`run_folder_of(summary)`: a finished run of a made-up summary, with a bundle."""

    def write(summary):
        folder = RunFolder(path=tmp_path / "run")
        (folder.bundle / "vision").mkdir(parents=True, exist_ok=True)
        (folder.bundle / "manifest.json").write_text("{}")
        (folder.bundle / "vision" / "model.onnx").write_bytes(b"graph")
        folder.report.write_text("<html></html>")
        write_record(folder.summary, summary)
        return folder

    return write


def send(environment, address, folder):
    words = [environment / "python", "-c", SEND, address, folder.path]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
    )


def ask(server, path, **body):
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_a_result_is_one_run_with_its_figures_and_files(environment, server, run_folder_of):
    summary = replace(make_summary(), pipeline="tracked", validation_losses=(0.1, 0.9, 0.2))
    folder = run_folder_of(summary)
    sent = send(environment, f"mlflow:{server}", folder)
    assert sent.returncode == 0, sent.stderr
    address = sent.stdout.strip()
    assert address.startswith(f"{server}/#/experiments/")
    run = ask(server, f"runs/get?run_id={address.rpartition('/')[2]}")["run"]
    assert run["info"]["status"] == "FINISHED"
    metrics = {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}
    assert metrics["speedup"] == pytest.approx(summary.speedup)
    assert metrics["latency_ms.p50.dense"] == pytest.approx(summary.baseline.latency_ms.p50)
    assert metrics["validation_loss"] == pytest.approx(0.2)
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["target"] == summary.target.text
    params = {param["key"]: param["value"] for param in run["data"]["params"]}
    assert params == {"measure.threads": "2"}
    root = ask(server, f"artifacts/list?run_id={run['info']['run_id']}")["files"]
    assert {file["path"] for file in root} >= {"report.html", "summary.json", "bundle"}
    kept = ask(server, f"artifacts/list?run_id={run['info']['run_id']}&path=bundle")["files"]
    assert {file["path"] for file in kept} == {"bundle/manifest.json", "bundle/vision"}
    # The same result again is known; another one is another run.
    assert send(environment, f"mlflow:{server}", folder).stdout.strip() == address
    other = run_folder_of(replace(summary, speedup=3.0))
    assert send(environment, f"mlflow:{server}", other).stdout.strip() != address


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told_at_once(environment, run_folder_of):
    start = time.monotonic()
    sent = send(environment, "mlflow:http://me:secret@127.0.0.1:9", run_folder_of(make_summary()))
    assert sent.returncode == 1 and "told: mlflow at http://***@127.0.0.1:9" in sent.stderr
    assert "secret" not in sent.stderr
    assert time.monotonic() - start < 60
