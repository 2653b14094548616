"""A Redis server of a test: it listens at 127.0.0.1, and ends with the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_SECONDS = 20
"""Seconds that the server may take to start."""


@contextmanager
def serve_redis(folder: Path) -> Iterator[str]:
    """Serve Redis until the block ends; yields `HOST:PORT`.

    The test is skipped where Redis is not installed.
    """
    program = shutil.which("redis-server")
    if program is None:
        if os.environ.get("MMCOMPRESS_REQUIRE"):
            pytest.fail("Redis is not installed")
        pytest.skip("Redis is not installed (Debian: redis-server)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_for_answer(port)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for_answer(port: int) -> None:
    """Wait until the server takes a connection."""
    give_up_at = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.1)
