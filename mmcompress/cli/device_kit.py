"""`mmcompress device kit`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from mmcompress.cli.console import Progress, out
from mmcompress.cli.options import LocalPath, parse_settings, set_option, space_option
from mmcompress.run.write_kit import write_kit
from mmcompress.workspace.context import open_run


@click.command("kit")
@click.argument("spec", type=LocalPath())
@click.option(
    "--out",
    "folder",
    required=True,
    type=LocalPath(),
    help="Folder of the kit, to be carried to the device.",
)
@space_option
@set_option
def kit_command(spec: str, folder: str, space: str | None, settings: tuple[str, ...]) -> None:
    """Write what a device needs to measure this pipeline: dense bundle, requests, whole exports."""
    with Progress() as on_progress, tempfile.TemporaryDirectory() as scratch:
        run = open_run(
            spec,
            Path(scratch) / "run",
            space=space,
            overrides=parse_settings(settings),
            on_progress=on_progress,
        )
        write_kit(run, Path(folder))
    out.print(f"{folder}: on the device, run", soft_wrap=True)
    out.print(f"  mmcompress device measure {folder} --out readings.json", soft_wrap=True)
