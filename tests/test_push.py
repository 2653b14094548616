"""A bundle is shared by the real client of the hub, with a server on this machine."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from mmcompress.cli import main


class Hub:
    """Takes what is uploaded."""

    def __init__(self):
        self.created = []
        self.files = {}
        self.status = 200

    def answer(self, path, body):
        """Return the JSON of one request."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.url}/someone/thing", "name": "someone/thing"}
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": path, **modes} for path in files]}
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[value["path"]] = base64.b64decode(value["content"])
            commit = {"commitOid": "0" * 40, "commitUrl": f"{self.url}/someone/thing/commit/0"}
            return {**commit, "pullRequestUrl": None}
        return {"errors": [], "warnings": []}


@pytest.fixture()
def hub():
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            answer = json.dumps(hub.answer(self.path.partition("?")[0], body)).encode()
            self.send_response(hub.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def push(hub, bundle, *options, token="hf_word"):
    """Push by the command, in a process that reads the variables of the client."""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
    }
    command = [sys.executable, "-m", "mmcompress.cli", "push", str(bundle), "someone/thing"]
    return subprocess.run(
        [*command, *options],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def is_private(created):
    """Return whether a repository is to be private: clients say it in two ways."""
    if "visibility" in created:
        return created["visibility"] == "private"
    return created["private"]


@pytest.mark.slow
def test_every_file_arrives_in_a_private_repository(hub, run_folder):
    bundle = run_folder / "bundle"
    done = push(hub, bundle)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {hub.url}/someone/thing" in done.stdout
    [created] = hub.created
    assert created["name"] == "thing" and is_private(created)
    names = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert set(hub.files) == names and {"README.md", "manifest.json"} <= names
    for name, content in hub.files.items():
        assert content == (bundle / name).read_bytes(), name
    assert push(hub, bundle, "--public").returncode == 0
    assert not is_private(hub.created[1])


@pytest.mark.slow
def test_a_hub_that_refuses_is_told(hub, run_folder):
    hub.status = 403
    done = push(hub, run_folder / "bundle")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "someone/thing: the hub refuses or can't be reached" in " ".join(done.stderr.split())


def test_what_is_no_whole_bundle_is_not_shared(run_folder, tmp_path):
    bundle = shutil.copytree(run_folder / "bundle", tmp_path / "bundle")
    (bundle / "README.md").unlink()
    done = CliRunner().invoke(main, ["push", str(bundle), "someone/thing"])
    assert done.exit_code == 2
    assert "mmcompress report RUN writes it" in " ".join(done.output.split())
    (bundle / "text" / "model.onnx").write_bytes(b"another")
    assert CliRunner().invoke(main, ["push", str(bundle), "someone/thing"]).exit_code == 2
