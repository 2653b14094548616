"""The command line of this process, as a person would type it again."""

from __future__ import annotations

import os
import shlex
import sys

from mmcompress.runtime.addresses import hide_password

SENT_AS_VARIABLE = "MMCOMPRESS_SENT_AS"
"""Environment variable of a job on a cluster: the command line that sent it. Its own one names
files that only the job sees."""


def read_command_line() -> str:
    """Return the command line that began this run, without passwords of addresses in it.

    It stands in the records and in the report of a run, which people pass on.
    """
    return read_sent_command() or hide_password(shlex.join(["mmcompress", *sys.argv[1:]]))


def read_sent_command() -> str:
    """Return the command line that sent this process as a job; empty where none did.

    The same line goes on with the run of the job.
    """
    return os.environ.get(SENT_AS_VARIABLE, "")
