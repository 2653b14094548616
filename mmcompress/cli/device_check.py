"""`mmcompress device check`."""

from __future__ import annotations

from pathlib import Path

import click

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.measure.devices.bundle_check import check_bundle
from mmcompress.storage import write_record


@click.command("check")
@click.argument("kit", type=LocalPath())
@click.argument("bundle", type=LocalPath())
@click.option("--out", "file", required=True, type=LocalPath(), help="The figures (JSON).")
def check_command(kit: str, bundle: str, file: str) -> None:
    """Measure a bundle in turn with the dense one of its kit; `report --measured` takes the
    figures."""
    figures = check_bundle(Path(kit), Path(bundle))
    write_record(Path(file), figures)
    dense_ms = figures.baseline.latency.p50
    compressed_ms = figures.compressed.latency.p50
    ratio = f"[bold]{dense_ms / compressed_ms:.2f}x[/bold]"
    out.print(f"p50 {dense_ms:.2f} -> {compressed_ms:.2f} ms, {ratio}", soft_wrap=True)
    out.print(file, soft_wrap=True)
