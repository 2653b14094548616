"""The server of the documentation, with real requests on loopback."""

from __future__ import annotations

import io
import json
import re
import statistics
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import uvicorn
from conftest import ROOT
from PIL import Image

from mmcompress.runtime.graph import load_bundle

REQUESTS = 200
CLIENTS = 8
BLOCK = re.compile(r"```python\n(.*?)```", re.S)


def encode_picture(seed):
    """Return a picture as the bytes of a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture()
def address(run_folder, monkeypatch):
    """The address of the server, which stands in the page as it is run here."""
    monkeypatch.setenv("BUNDLE", str(run_folder / "bundle"))
    page = (ROOT / "docs" / "how_to" / "serve.md").read_text()
    names = {"__name__": "server"}
    exec(compile(BLOCK.search(page)[1], "server.py", "exec", dont_inherit=True), names)
    config = uvicorn.Config(names["app"], host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.mark.slow
def test_the_documented_server_answers_eight_clients(address, run_folder, record_property):
    pictures = [encode_picture(seed) for seed in range(10)]
    pipeline = load_bundle(run_folder / "bundle")
    expected = [pipeline(image=picture)["caption"] for picture in pictures]
    milliseconds = []

    def ask(number):
        start = time.perf_counter()
        request = urllib.request.Request(address, data=pictures[number % 10], method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        return answer

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    assert answers == [{"caption": expected[i % 10]} for i in range(REQUESTS)]
    record_property("p95_ms", statistics.quantiles(milliseconds, n=20)[-1])
    request = urllib.request.Request(address, data=b"no picture", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as response:
        assert response.code == 400 and "not a readable image" in json.load(response)["detail"]
