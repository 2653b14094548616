"""Commands that run a bundle: predict, bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.shared import out
from mmcompress.errors import SpecError


def parse_input(pair: str) -> tuple[str, str]:
    """NAME=FILE in its parts. Raises `SpecError`."""
    name, equals, value = pair.partition("=")
    if not equals:
        raise SpecError(f"--input {pair}: expected name=file, e.g. image=photo.png")
    return name, value


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE", required=True)
@click.option("--threads", type=int)
def predict(bundle: str, inputs: tuple[str, ...], threads: int | None) -> None:
    """Run a bundle on one request; prints its outputs as JSON."""
    from mmcompress.runtime.graph import load_bundle

    found = load_bundle(bundle, threads)(**dict(parse_input(pair) for pair in inputs))
    click.echo(json.dumps({k: v.tolist() if hasattr(v, "tolist") else v for k, v in found.items()}))


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--against", type=click.Path(), help="A second bundle, measured interleaved.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=FILE", help="Requests (default: noise)."
)
@click.option("--rounds", type=click.IntRange(2), default=200, show_default=True)
@click.option("--threads", type=int)
def bench(
    bundle: str, against: str | None, inputs: tuple[str, ...], rounds: int, threads: int | None
) -> None:
    """Measure a bundle end to end, alone or against another."""
    from mmcompress.measure.latency.bench import BenchmarkOptions
    from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
    from mmcompress.runtime.graph import load_bundle

    names = {"bundle": bundle, **({"against": against} if against else {})}
    requests: list[dict[str, Any]] = [dict([parse_input(pair)]) for pair in inputs] or [
        load_bundle(bundle, threads).make_noise_request()
    ]
    bundles = {k: Path(v) for k, v in names.items()}
    options = BenchmarkOptions(warmup=10, max_requests=rounds, threads=threads)
    samples = bench_repeated(bundles, requests, options=options)
    found = {name: sample.summarize() for name, sample in samples.items()}
    table = Table("", "p50", "p95", "IQR", "n", "inside models", box=None)
    for key, m in found.items():
        table.add_row(
            escape(names[key]),
            f"{m.latency.p50:.2f} ms",
            f"{m.latency.p95:.2f} ms",
            f"{m.latency.iqr:.2f} ms",
            str(m.latency.n),
            f"{m.model_share:.0%}",
        )
        for node, latency in m.nodes.items():
            table.add_row(f"  {node}", f"{latency.p50:.2f} ms", f"{latency.p95:.2f} ms")
    out.print(table)
    if against:
        ratio = found["against"].latency.p50 / found["bundle"].latency.p50
        out.print(f"[bold]{ratio:.2f}x[/bold] as fast as {escape(against)}")
