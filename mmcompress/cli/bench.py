"""`mmcompress bench`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.cli.predict import parse_input
from mmcompress.measure.latency.bench import BenchmarkOptions, PipelineLatency, Samples
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.runtime.bundle import read_manifest
from mmcompress.runtime.check_manifest import MAX_BATCH, MAX_THREADS
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.sample_requests import has_requests, read_requests
from mmcompress.stats import estimate_relative_margin
from mmcompress.storage import to_plain

MAX_CALM_MARGIN = 0.05
"""Share that the ratio of two latencies may be off by before a person is warned of the machine."""

WARMUP_REQUESTS = 10
"""Requests to each bundle that are not counted."""


@click.command("bench")
@click.argument("bundle", type=LocalPath())
@click.option("--against", type=LocalPath(), help="A second bundle, measured in turn with it.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=FILE",
    help="Requests (default: those it carries, or noise).",
)
@click.option(
    "--requests",
    "--rounds",
    "max_requests",
    type=click.IntRange(2),
    default=200,
    show_default=True,
    help="Requests to each bundle.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="Threads of every session (default: as measured).",
)
@click.option(
    "--provider",
    help="What sessions run on (default: as measured); `mmcompress list providers` has the names.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, MAX_BATCH),
    help="Requests that are answered together (default: as measured).",
)
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON, by bundle.")
def bench_command(
    bundle: str,
    against: str | None,
    inputs: tuple[str, ...],
    max_requests: int,
    threads: int | None,
    provider: str | None,
    batch: int | None,
    as_json: bool,
) -> None:
    """Measure a bundle end to end, alone or in turn with another."""
    bundles = {"bundle": Path(bundle)}
    if against:
        bundles["against"] = Path(against)
    requests: list[dict[str, Any]] = [dict([parse_input(text)]) for text in inputs]
    if not requests and has_requests(bundles["bundle"]):
        requests = [dict(request.inputs) for request in read_requests(bundles["bundle"]).requests]
    if not requests:
        requests.append(load_bundle(bundle, threads, provider=provider).make_noise_request())
    batch = batch or read_manifest(bundle).get("batch", 1)
    options = BenchmarkOptions(
        warmup=WARMUP_REQUESTS,
        max_requests=max_requests,
        threads=threads,
        provider=provider,
        batch=batch,
    )
    samples = bench_repeated(bundles, requests, options=options)
    latencies = {name: sample.summarize() for name, sample in samples.items()}
    if as_json:
        click.echo(json.dumps(_collect_figures(latencies, bundles, batch=batch), indent=1))
        return
    table = Table(
        "" if batch == 1 else f"batches of {batch}",
        "p50",
        "p95",
        "IQR",
        "n",
        "inside models",
        box=None,
    )
    for name, measured in latencies.items():
        table.add_row(
            escape(str(bundles[name])),
            f"{measured.latency.p50:.2f} ms",
            f"{measured.latency.p95:.2f} ms",
            f"{measured.latency.iqr:.2f} ms",
            str(measured.latency.n),
            f"{measured.model_share:.0%}",
        )
        for node, latency in measured.nodes.items():
            table.add_row(f"  {node}", f"{latency.p50:.2f} ms", f"{latency.p95:.2f} ms")
    out.print(table)
    if against:
        ratio = latencies["against"].latency.p50 / latencies["bundle"].latency.p50
        margin = _estimate_ratio_margin(samples["bundle"], samples["against"])
        out.print(
            f"[bold]{ratio:.2f}x[/bold] ± {margin:.1%} as fast as {escape(against)}", soft_wrap=True
        )
        if margin > MAX_CALM_MARGIN:
            out.print(
                "[yellow]the machine was busy or changed its speed: the ratio may differ the next "
                "time[/yellow]",
                soft_wrap=True,
            )


def _estimate_ratio_margin(bundle: Samples, against: Samples) -> float:
    """Return the share that the ratio of two latencies may be off by: 95 % over their loads."""
    ratios = [
        statistics.median(other_ms) / statistics.median(own_ms)
        for own_ms, other_ms in zip(bundle.split_loads(), against.split_loads(), strict=True)
    ]
    return estimate_relative_margin(ratios)


def _collect_figures(
    latencies: Mapping[str, PipelineLatency], bundles: Mapping[str, Path], *, batch: int
) -> dict[str, Any]:
    """Return the figures of every bundle, as JSON takes them."""
    figures: dict[str, Any] = {}
    for name, measured in latencies.items():
        figures[name] = {
            "path": str(bundles[name]),
            "batch": batch,
            "latency_ms": to_plain(measured.latency),
            "nodes_ms": {node: to_plain(latency) for node, latency in measured.nodes.items()},
            "model_share": measured.model_share,
        }
    if "against" in latencies:
        ratio = latencies["against"].latency.p50 / latencies["bundle"].latency.p50
        figures["times_as_fast"] = ratio
    return figures
