"""Commands for a device that is not this machine: kit, measure, check."""

from __future__ import annotations

from pathlib import Path

import click

from mmcompress.cli.shared import Progress, out, parse_settings


@click.group()
def device() -> None:
    """Search for a device that is not this machine: make a kit here, measure it there, search here or on a cluster."""


@device.command()
@click.argument("spec", type=click.Path())
@click.option(
    "--out",
    "folder",
    required=True,
    type=click.Path(),
    help="Folder of the kit, to be carried over.",
)
@click.option(
    "--space", type=click.Path(), help="Search space (default: search_spaces/joint.yaml)."
)
@click.option("--set", "sets", multiple=True, metavar="A.B=C")
def kit(spec: str, folder: str, *, space: str | None, sets: tuple[str, ...]) -> None:
    """Write what a device needs to measure this pipeline: dense bundle, requests, whole exports."""
    import tempfile

    from mmcompress.run.write_kit import write_kit
    from mmcompress.workspace.context import open_run

    with Progress() as say, tempfile.TemporaryDirectory() as scratch:
        r = open_run(
            spec,
            Path(scratch) / "run",
            space=space,
            overrides=parse_settings(sets),
            on_progress=say,
        )
        write_kit(r, Path(folder))
    out.print(
        f"{folder}: on the device, run\n  mmcompress device measure {folder} --out readings.json",
        soft_wrap=True,
    )


@device.command()
@click.argument("kit", type=click.Path())
@click.option("--out", "file", required=True, type=click.Path(), help="The readings (JSON).")
def measure(kit: str, file: str) -> None:
    """Measure a kit on this device; neither torch nor the models' libraries are needed."""
    from mmcompress.measure.devices.measure_kit import measure_kit
    from mmcompress.storage import write_record

    with Progress() as say:
        found = measure_kit(Path(kit), lambda what, share: say("measure", what, share))
    write_record(Path(file), found)
    p50 = found.baseline.latency.p50
    out.print(
        f"{found.pipeline} on {found.cpu['name']}, {found.threads} threads: p50 {p50:.2f} ms\n{file}",
        soft_wrap=True,
    )


@device.command()
@click.argument("kit", type=click.Path())
@click.argument("bundle", type=click.Path())
@click.option("--out", "file", required=True, type=click.Path(), help="The figures (JSON).")
def check(kit: str, bundle: str, file: str) -> None:
    """Measure a bundle beside the dense one of its kit on this device; `report --measured` takes the figures."""
    from mmcompress.measure.devices.bundle_check import check_bundle
    from mmcompress.storage import write_record

    found = check_bundle(Path(kit), Path(bundle))
    write_record(Path(file), found)
    a, b = found.baseline.latency.p50, found.compressed.latency.p50
    out.print(f"p50 {a:.2f} -> {b:.2f} ms, [bold]{a / b:.2f}x[/bold]\n{file}", soft_wrap=True)
