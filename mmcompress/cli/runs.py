"""Commands that make or show a run: run, compare, ablate, submit, report, show."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.shared import Progress, add_run_options, collect_overrides, default_folder, out
from mmcompress.errors import TargetNotMet

METHODS = "searched, knapsack, relinearized, separate, uniform, shortened, magnitude, ranking, random, student, int8, longer"
TABLES = "order, allocation, protection, importance, zeros, schedule, losses"
"""What `compare` and `ablate` know, for their help: to ask them takes torch."""


@click.command()
@click.argument("spec", type=click.Path())
@add_run_options
@click.option(
    "--out",
    "folder",
    type=click.Path(),
    default=None,
    help="Run folder (default: runs/NAME-TARGET-sSEED).",
)
@click.option(
    "--resume", is_flag=True, help="Go on with the run in the folder; no finished trial is lost."
)
def run(spec: str, space: str | None, folder: str | None, resume: bool, **options: Any) -> None:
    """Compress a pipeline to its target: profile, search, prune, distill, quantize, export, measure, report."""
    from mmcompress.run.targets import run_targets

    changes = collect_overrides(**options)
    folder = folder or default_folder(spec, changes)
    with Progress() as say:
        found = run_targets(
            spec, folder, space=space, overrides=changes, resume=resume, on_progress=say
        )
    for s in found:
        at = Path(folder) if len(found) == 1 else Path(folder) / s.target.asked.replace(" ", "-")
        show_summary(s)
        out.print(
            f"\nreport  {escape(str(at / 'report.html'))}\nbundle  {escape(str(at / 'bundle'))}",
            soft_wrap=True,
        )
    if len(found) > 1:
        out.print(f"front   {escape(str(Path(folder) / 'front.html'))}", soft_wrap=True)
    if missed := [s for s in found if not s.target.met]:
        raise TargetNotMet(
            "; ".join(f"{s.target.asked}: {', '.join(s.target.exceeded_bounds)}" for s in missed)
            + "; the best found was written"
        )


def show_summary(s: Any) -> None:
    """The table a run ends with."""
    from mmcompress.report.page import format_quality

    table = Table("", "before", "after", box=None, title=f"{s.pipeline}, target {s.target.asked}")
    b, c = s.baseline, s.compressed
    for name in b.nodes:
        table.add_row(
            f"{name}, p50",
            f"{b.nodes[name].latency_ms_p50:.2f} ms",
            f"{c.nodes[name].latency_ms_p50:.2f} ms  ({c.nodes[name].precision})",
        )
    table.add_row(
        "end to end, p50", f"{b.latency_ms.p50:.2f} ms", f"[bold]{c.latency_ms.p50:.2f} ms[/bold]"
    )
    table.add_row("end to end, p95", f"{b.latency_ms.p95:.2f} ms", f"{c.latency_ms.p95:.2f} ms")
    for name, q in b.quality.items():
        table.add_row(name, format_quality(q), format_quality(c.quality[name]))
    table.add_row("parameters", f"{b.params / 1e6:.2f} M", f"{c.params / 1e6:.2f} M")
    table.add_row("bundle", f"{b.size_mb:.1f} MB", f"{c.size_mb:.1f} MB")
    out.print(table)
    verdict = "[green]target met[/green]" if s.target.met else "[red]target not met[/red]"
    verdict += "" if c.latency_ms.n else ", as predicted"
    cross = "" if s.cross_modal_ratio is None else f", cross-modal {s.cross_modal_ratio:.0%}"
    passed = sum(p.passed for p in s.proofs)
    out.print(
        f"[bold]{s.speedup:.2f}x[/bold], {verdict}; {s.quality_retained:.1%} of the quality retained; "
        f"pruned: unimodal {s.unimodal_ratio:.0%}{cross}; {passed} of {len(s.proofs)} proofs passed"
    )
    for w in s.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(w)}")


@click.command()
@click.argument("spec", type=click.Path())
@add_run_options
@click.option("--methods", help=f"Which, with commas between them (default: all): {METHODS}.")
@click.option(
    "--out",
    "folder",
    type=click.Path(),
    default=None,
    help="Folder (default: runs/NAME-TARGET-compare).",
)
@click.option("--resume", is_flag=True, help="Go on; methods that are done are kept.")
def compare(
    spec: str,
    methods: str | None,
    space: str | None,
    folder: str | None,
    resume: bool,
    **options: Any,
) -> None:
    """The search beside other methods: same evidence, training and measured latency."""
    from mmcompress.experiments.baselines import BASELINES as EVERY
    from mmcompress.experiments.compare import compare as run_all
    from mmcompress.report.page import format_percent, format_quality
    from mmcompress.results.target import target_share

    changes = collect_overrides(**options)
    folder = folder or default_folder(spec, changes, kind="compare")
    wanted = tuple(m.strip() for m in methods.split(",")) if methods else tuple(EVERY)
    with Progress() as say:
        found = run_all(
            spec,
            folder,
            methods=wanted,
            space=space,
            overrides=changes,
            resume=resume,
            on_progress=say,
        )
    one = next(iter(found.values()))
    table = Table(
        "method",
        "speed-up",
        "of the target",
        "retained",
        *one.baseline.quality,
        box=None,
        title=f"{one.pipeline} at {one.target.asked}",
    )
    table.add_row(
        "dense", "1.00x", "", "100.0 %", *(format_quality(q) for q in one.baseline.quality.values())
    )
    for name, s in found.items():
        figures = (
            f"{s.speedup:.2f}x",
            format_percent(target_share(s)),
            format_percent(s.quality_retained),
        )
        table.add_row(name, *figures, *(format_quality(q) for q in s.compressed.quality.values()))
    out.print(table)
    _say_claims(Path(folder))
    out.print(f"report  {escape(str(Path(folder) / 'compare.html'))}", soft_wrap=True)


@click.command()
@click.argument("spec", type=click.Path())
@add_run_options
@click.option("--tables", help=f"Which, with commas between them (default: all): {TABLES}.")
@click.option(
    "--out",
    "folder",
    type=click.Path(),
    default=None,
    help="Folder (default: runs/NAME-TARGET-ablation).",
)
@click.option("--resume", is_flag=True, help="Go on; cells that are done are kept.")
def ablate(
    spec: str,
    tables: str | None,
    space: str | None,
    folder: str | None,
    resume: bool,
    **options: Any,
) -> None:
    """What each part of the recipe brings: cells that differ in one thing, and a sentence for each claim."""
    from mmcompress.experiments.ablate import ablate as run_all

    changes = collect_overrides(**options)
    folder = folder or default_folder(spec, changes, kind="ablation")
    wanted = tuple(t.strip() for t in tables.split(",")) if tables else ()
    with Progress() as say:
        run_all(
            spec,
            folder,
            space=space,
            overrides=changes,
            resume=resume,
            on_progress=say,
            tables=wanted,
        )
    _say_claims(Path(folder))
    out.print(f"report  {escape(str(Path(folder) / 'ablation.html'))}", soft_wrap=True)


def _say_claims(folder: Path) -> None:
    for c in json.loads((folder / "claims.json").read_text()):
        points = f"{100 * c['gap']:+.1f} ± {100 * c['half']:.1f} points"
        out.print(
            f"{escape(c['claim'])}: [bold]{escape(c['verdict'])}[/bold] ({points})", soft_wrap=True
        )


@click.command()
@click.argument("spec", type=click.Path())
@click.option(
    "--address", required=True, metavar="http://HOST:8265", help="The cluster's job server."
)
@click.option(
    "--out",
    "folder",
    required=True,
    type=click.Path(),
    help="Run folder, on storage the cluster sees.",
)
@click.option("--resume", is_flag=True)
@add_run_options
def submit(
    spec: str, address: str, folder: str, resume: bool, space: str | None, **options: Any
) -> None:
    """Run the same command as a job on a Ray cluster; follows its log until it ends."""
    from mmcompress.graph.load_spec import load_document, load_spec
    from mmcompress.search.jobs import submit_run
    from mmcompress.workspace.context import default_space

    changes = collect_overrides(**options) | {"search.ray_address": "auto"}
    echo = lambda text: click.echo(text, nl=False)
    load_spec(spec, changes)
    code = submit_run(
        load_document(spec, changes),
        address,
        folder=folder,
        space=space or default_space(),
        resume=resume,
        echo=echo,
    )
    if code:
        sys.exit(code)


@click.command()
@click.argument("folder", type=click.Path())
@click.option(
    "--measured",
    type=click.Path(),
    help="Figures of `device check`: they take the place of predicted ones.",
)
def report(folder: str, measured: str | None) -> None:
    """Write the report of a finished run again; figures that miss its target end with exit code 3."""
    from mmcompress.report.page import load_summary, write_report

    if not measured:
        out.print(str(write_report(load_summary(folder), folder)), soft_wrap=True)
        return
    from mmcompress.run.adopt import adopt_measurements

    out.print(str(adopt_measurements(Path(folder), Path(measured))), soft_wrap=True)
    if missed := load_summary(folder).target.exceeded_bounds:
        raise TargetNotMet(
            f"{', '.join(missed)}; the same run with --resume goes on from what was measured"
        )


@click.command()
@click.argument("folder", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="The whole summary as JSON.")
def show(folder: str, as_json: bool) -> None:
    """Show the result of a finished run."""
    from mmcompress.report.page import load_summary
    from mmcompress.storage import to_plain

    summary = load_summary(folder)
    if as_json:
        click.echo(json.dumps(to_plain(summary), indent=1))
    else:
        show_summary(summary)
