"""How this program is called, and how it goes on, for lines that a person copies."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mmcompress.workspace.command_line import read_sent_command


def name_program() -> str:
    """Return how this program is called here: its path, where its name is not on the PATH."""
    name = "mmcompress"
    beside_python = Path(sys.executable).parent / name
    if shutil.which(name) is None and beside_python.is_file():
        return os.path.relpath(beside_python)
    return name


def make_resume_line(arguments: Sequence[str], *, flags: Sequence[str] = ()) -> str:
    """Return the line that goes on with a command.

    A job on a cluster goes on by the line that sent it.

    Args:
        arguments: The command line, without the name of the program.
        flags: Flags of the program itself, which the line has on top.
    """
    again = list(arguments)
    if "--resume" not in again:
        again.append("--resume")
    return read_sent_command() or shlex.join([name_program(), *flags, *again])
