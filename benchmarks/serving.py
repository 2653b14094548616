"""Serve the two bundles of a run as the documentation does, and time the answers that clients get.

    python benchmarks/serving.py runs/demo > reports/serving.md

The server is the code of docs/how_to/serve.md. 200 requests come from 8 clients on loopback, with
the pictures that the bundle carries. The dense bundle is served first, then the compressed one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from mmcompress.runtime.machine import describe_cpu, read_git_commit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how_to" / "serve.md"
"""The page whose first Python block is the server."""
PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
"""A block of Python code."""
REQUESTS = 200
"""Requests in all."""
CLIENTS = 8
"""Clients at a time."""
WARMUP_REQUESTS = 16
"""Requests before those that are timed."""


@dataclass(frozen=True, kw_only=True)
class ServedBundle:
    """What clients saw of one bundle."""

    name: str
    """Its folder in the run."""
    milliseconds: list[float]
    """Milliseconds from each request to its answer."""
    wall_seconds: float
    """Seconds for all requests."""


@contextmanager
def serve(bundle: Path) -> Iterator[str]:
    """Serve a bundle until the block ends; yields the address."""
    os.environ["BUNDLE"] = str(bundle)
    block = PYTHON_BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert block is not None
    names: dict[str, Any] = {"__name__": "server"}
    exec(compile(block[1], "server.py", "exec", dont_inherit=True), names)
    config = uvicorn.Config(names["app"], host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join()


def read_pictures(bundle: Path) -> list[bytes]:
    """Return the pictures that a bundle carries, as PNG files."""
    pictures: list[bytes] = []
    with np.load(bundle / "requests" / "arrays.npz", allow_pickle=False) as arrays:
        for name in sorted(arrays.files):
            if name.endswith(".in.image"):
                file = io.BytesIO()
                Image.fromarray(arrays[name]).save(file, "PNG")
                pictures.append(file.getvalue())
    return pictures


def ask(address: str, picture: bytes) -> float:
    """Send a picture; returns the milliseconds to its caption."""
    start = time.perf_counter()
    request = urllib.request.Request(address, data=picture, method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["caption"]
    return 1e3 * (time.perf_counter() - start)


def time_bundle(bundle: Path, pictures: Sequence[bytes]) -> ServedBundle:
    """Serve a bundle to all clients."""
    with serve(bundle) as address:
        for number in range(WARMUP_REQUESTS):
            ask(address, pictures[number % len(pictures)])
        start = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            asked = [pictures[number % len(pictures)] for number in range(REQUESTS)]
            milliseconds = list(clients.map(ask, [address] * REQUESTS, asked))
        wall_seconds = time.perf_counter() - start
    return ServedBundle(name=bundle.name, milliseconds=milliseconds, wall_seconds=wall_seconds)


def main() -> int:
    """Time both bundles, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    arguments = parser.parse_args()
    pictures = read_pictures(arguments.run / "bundle")
    cpu = describe_cpu()
    print("# Answers of a served bundle")
    print()
    print(f"`python benchmarks/serving.py {arguments.run}`")
    print(f"Processor: {cpu['name']}, {cpu['cores']} cores. Commit: {read_git_commit()}.")
    print()
    print(f"{REQUESTS} requests of {CLIENTS} clients on loopback, to one server with one bundle.")
    print("Each client waits for its answer before it asks again. No request failed.")
    print()
    print("| bundle | p50, ms | p95, ms | requests a second |")
    print("|---|---:|---:|---:|")
    for name in ("baseline", "bundle"):
        served = time_bundle(arguments.run / name, pictures)
        p50 = statistics.median(served.milliseconds)
        p95 = statistics.quantiles(served.milliseconds, n=20)[-1]
        rate = REQUESTS / served.wall_seconds
        print(f"| {served.name} | {p50:.0f} | {p95:.0f} | {rate:.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
