"""`mmcompress device measure`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from mmcompress.cli.console import Progress, out
from mmcompress.cli.options import LocalPath
from mmcompress.measure.devices.measure_kit import measure_kit
from mmcompress.storage import write_record


@click.command("measure")
@click.argument("kit", type=LocalPath())
@click.option("--out", "file", required=True, type=LocalPath(), help="The readings (JSON).")
def measure_command(kit: str, file: str) -> None:
    """Measure a kit on this device; neither torch nor the models' libraries are needed."""
    with Progress() as on_progress:
        readings = measure_kit(Path(kit), partial(on_progress, "measure"))
    write_record(Path(file), readings)
    device = f"{readings.cpu['name']}, {readings.threads} threads"
    p50 = readings.baseline.latency.p50
    out.print(f"{readings.pipeline} on {device}: p50 {p50:.2f} ms", soft_wrap=True)
    out.print(file, soft_wrap=True)
