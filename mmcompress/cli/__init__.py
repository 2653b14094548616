"""Commands: arguments in, a function of another room, a table out. There is no logic here.

A command is one file. Its row holds where it is and its help line, so that `--help` imports no
command at all.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
import warnings

import click

from mmcompress.cli.lazy_group import CommandRow, LazyGroup
from mmcompress.errors import PluginWarning
from mmcompress.version import __version__

SPIN_COUNT = "2000"
"""Turns of the loop in which a thread of GNU OpenMP waits before it sleeps (libgomp manual)."""

COMMANDS = {
    "run": CommandRow(
        target="mmcompress.cli.run:run_command",
        about="Compress a pipeline to its latency target.",
        is_resumable=True,
        puts_away=True,
    ),
    "init": CommandRow(
        target="mmcompress.cli.init:init_command",
        about="Write a spec of your own from a shipped pipeline.",
    ),
    "validate": CommandRow(
        target="mmcompress.cli.validate:validate_command",
        about="Check a spec, its search space, its sources and its data.",
    ),
    "explain": CommandRow(
        target="mmcompress.cli.explain:explain_command",
        about="Tell what a run would do, before anything runs.",
    ),
    "export": CommandRow(
        target="mmcompress.cli.export:export_command",
        about="Write the dense pipeline as a bundle, with proofs; nothing is compressed.",
    ),
    "profile": CommandRow(
        target="mmcompress.cli.profile:profile_command",
        about="Measure the dense pipeline: every node and block, with its modality.",
        is_resumable=True,
        puts_away=True,
    ),
    "watch": CommandRow(
        target="mmcompress.cli.watch:watch_command",
        about="Follow a run that another process works on.",
    ),
    "show": CommandRow(
        target="mmcompress.cli.show:show_command",
        about="Show the result of a finished run.",
    ),
    "report": CommandRow(
        target="mmcompress.cli.report:report_command",
        about="Write the report of a finished run again.",
    ),
    "compare-runs": CommandRow(
        target="mmcompress.cli.compare_runs:compare_runs_command",
        about="Put finished runs side by side; fail where one is slower or worse.",
    ),
    "compare": CommandRow(
        target="mmcompress.cli.compare:compare_command",
        about="Compare the search with other methods at equal latency.",
        is_resumable=True,
        puts_away=True,
    ),
    "ablate": CommandRow(
        target="mmcompress.cli.ablate:ablate_command",
        about="Measure what each part of the recipe brings.",
        is_resumable=True,
        puts_away=True,
    ),
    "predict": CommandRow(
        target="mmcompress.cli.predict:predict_command",
        about="Run a bundle on one request; print its outputs as JSON.",
    ),
    "bench": CommandRow(
        target="mmcompress.cli.bench:bench_command",
        about="Measure the latency of a bundle, alone or in turn with another.",
    ),
    "verify": CommandRow(
        target="mmcompress.cli.verify:verify_command",
        about="Replay the requests of a bundle, and say whether its answers hold here.",
    ),
    "push": CommandRow(
        target="mmcompress.cli.push:push_command",
        about="Share a bundle on the Hugging Face hub, private by default.",
    ),
    "fetch": CommandRow(
        target="mmcompress.cli.fetch:fetch_command",
        about="Copy a run from a storage URL.",
    ),
    "device": CommandRow(
        target="mmcompress.cli.device:device_command",
        about="Search for a device that is not this machine.",
    ),
    "submit": CommandRow(
        target="mmcompress.cli.submit:submit_command",
        about="Run the same command as a job on a Ray cluster.",
        is_resumable=True,
    ),
    "job": CommandRow(
        target="mmcompress.cli.job:job_command",
        about="Look after a run on a cluster: status, logs, stop, fetch.",
    ),
    "clean": CommandRow(
        target="mmcompress.cli.clean:clean_command",
        about="Tell what a run or the cache takes on disk; delete what can be made again.",
    ),
    "doctor": CommandRow(
        target="mmcompress.cli.doctor:doctor_command",
        about="Check this machine, or look through a run folder for what is damaged.",
    ),
    "list": CommandRow(
        target="mmcompress.cli.list:list_command",
        about="List what a spec may name: kinds, models, metrics and more.",
    ),
    "schema": CommandRow(
        target="mmcompress.cli.schema:schema_command",
        about="Print the JSON Schema of a spec, every key described.",
    ),
}
"""The commands, in the order in which `--help` lists them."""


@click.group(
    cls=LazyGroup,
    commands_by_name=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mmcompress")
def main() -> None:
    """Compress a multi-model multimodal pipeline to an end-to-end latency target."""
    _escape_unprintable_texts()
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        # A crash inside a library of C++ then leaves the Python lines that led there.
        faulthandler.enable(sys.__stderr__)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Threads of torch that wait for work spin. Where another process has their core, that one works
    # while they wait for each other. So they spin shortly, unless the user says how they wait.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    logging.getLogger().setLevel(logging.ERROR)
    # Other libraries warn of their own affairs; what this project warns of is for the user.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=FutureWarning, module=r"mmcompress\.")
    warnings.filterwarnings("default", category=PluginWarning)


def _escape_unprintable_texts() -> None:
    """Write characters that the terminal's encoding lacks as escapes: no text ends a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
