"""Runs a module of mmcompress in a fresh Python process."""

from __future__ import annotations

import os
import subprocess
import sys

from mmcompress.version import CHECKOUT_FOLDER


def run_in_fresh_python(
    module: str, argument: str = "", *, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module argument`, and return what it wrote.

    Args:
        module: A module of mmcompress that does something when it is run.
        argument: Its argument; empty for none.
        timeout: Seconds after which the process is ended; None waits for it.

    Raises:
        subprocess.TimeoutExpired: The process did not end in time.
    """
    command = [sys.executable, "-m", module]
    if argument:
        command.append(argument)
    # The process must find this checkout even where mmcompress is not installed.
    search_paths = [str(CHECKOUT_FOLDER)]
    if os.environ.get("PYTHONPATH"):
        search_paths.append(os.environ["PYTHONPATH"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_paths)}
    # both sides agree on UTF-8, whatever the locale is
    environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        timeout=timeout,
    )
