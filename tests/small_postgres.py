"""A PostgreSQL server of a test: it listens at 127.0.0.1, and ends with the test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

DEBIAN_FOLDERS = "/usr/lib/postgresql"
"""Where Debian puts the programs of the server."""

START_SECONDS = 60
"""Seconds that the server may take to start or stop."""


def find_program(name: str) -> str | None:
    """Return the path of a program of the server; None where it is not installed."""
    places = [str(path) for path in sorted(Path(DEBIAN_FOLDERS).glob("*/bin"))]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


class SmallPostgres:
    """A server with a folder of its own. It refuses to run as root, so root takes another user."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mm-postgres-"))
        self.user = "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        if os.getuid() == 0:
            shutil.chown(self.folder, self.user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-A", "trust", "-U", "mm", "--no-sync", "-E", "UTF8", "--locale=C")

    @property
    def url(self) -> str:
        """The URL of its database."""
        return f"postgresql://mm@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder}"
        self._run("pg_ctl", "-w", "-o", options, "-l", str(self.folder / "log"), "start")

    def stop(self) -> None:
        """Stop the server at once: connections are cut."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def remove(self) -> None:
        """Remove its folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, name: str, *arguments: str) -> None:
        program = find_program(name)
        assert program
        subprocess.run(
            [program, "-D", str(self.folder / "data"), *arguments],
            check=True,
            # What the server inherits would keep the pipes of this process open.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            user=self.user if os.getuid() == 0 else None,
            timeout=START_SECONDS,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )
