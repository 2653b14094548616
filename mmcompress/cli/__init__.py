"""Commands: arguments in, a function of another room, a table out. No logic here."""

from __future__ import annotations

import logging
import os
import warnings

import click

from mmcompress import __version__
from mmcompress.cli import bundles, device, runs, specs
from mmcompress.cli.shared import Group


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmcompress")
def main() -> None:
    """Compress a multi-model multimodal pipeline to an end-to-end latency target."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


for command in (
    *(specs.validate, specs.profile, specs.list_),
    *(runs.run, runs.submit, runs.show, runs.report, runs.compare, runs.ablate),
    *(bundles.predict, bundles.bench, device.device),
):
    main.add_command(command)
