"""`mmcompress compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from mmcompress.cli.console import Progress, out
from mmcompress.cli.options import (
    LocalPath,
    add_run_options,
    choose_default_folder,
    collect_overrides,
    resume_option,
    split_names,
)
from mmcompress.cli.results_table import print_claims, print_path
from mmcompress.experiments.names import METHODS
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import resolve_entry
from mmcompress.report.formats import NO_FIGURE, format_percent, format_quality, format_retained
from mmcompress.results.records import Summary
from mmcompress.results.target_met import compute_target_share
from mmcompress.workspace.folder import RunFolder

COMPARE = "mmcompress.experiments.compare:compare"
"""What does the work; it takes torch."""


@click.command("compare")
@click.argument("spec", type=LocalPath())
@add_run_options
@click.option(
    "--methods", help=f"Which, with commas between them (default: all): {', '.join(METHODS)}."
)
@click.option(
    "--out", "folder", type=LocalPath(), help="Folder (default: runs/NAME-TARGET-compare)."
)
@resume_option
def compare_command(
    spec: str,
    methods: str | None,
    space: str | None,
    folder: str | None,
    resume: bool,
    **options: Any,
) -> None:
    """Compare the search with other methods: same sensitivity, training and measured latency."""
    overrides = collect_overrides(**options)
    load_spec(spec, overrides)
    folder = folder or choose_default_folder(spec, overrides, kind="compare")
    with Progress() as on_progress:
        summaries: dict[str, Summary] = resolve_entry(COMPARE)(
            spec,
            folder,
            methods=split_names(methods) or METHODS,
            space=space,
            overrides=overrides,
            resume=resume,
            on_progress=on_progress,
        )
    out.print(_make_table(summaries))
    results = RunFolder(path=Path(folder))
    print_claims(results)
    print_path("report", results.comparison_page)


def _make_table(summaries: dict[str, Summary]) -> Table:
    """Return a row for the dense pipeline and for every method."""
    first = next(iter(summaries.values()))
    dense = first.baseline.quality
    title = f"{first.pipeline} at {first.target.text}"
    headings = ["method", "speedup", "latency / target", "quality retained", *dense]
    table = Table(box=None, title=title)
    for heading in headings:
        table.add_column(heading)
    rows = [["dense", "1.00x", "", "100.0 %", *map(format_quality, dense.values())]]
    for method, summary in summaries.items():
        row = [method, f"{summary.speedup:.2f}x", format_percent(compute_target_share(summary))]
        row.append(format_retained(summary.determined_quality))
        quality = summary.compressed.quality
        row += [format_quality(quality[name]) if name in quality else NO_FIGURE for name in dense]
        rows.append(row)
    for row in rows:
        table.add_row(*row)
    return table
