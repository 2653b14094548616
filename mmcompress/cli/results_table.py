"""Tables of results, as several commands print them."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mmcompress.cli.console import out
from mmcompress.report.formats import format_quality
from mmcompress.results.records import Summary
from mmcompress.storage import read_plain
from mmcompress.workspace.folder import RESUME_CURE, RunFolder


def print_summary(summary: Summary) -> None:
    """Print the table that a run ends with, its verdict and its warnings."""
    title = f"{summary.pipeline}, target {summary.target.text}"
    table = Table("", "before", "after", box=None, title=title)
    before = summary.baseline
    after = summary.compressed
    for name, node in before.nodes.items():
        pruned = after.nodes[name]
        table.add_row(
            f"{name}, p50",
            f"{node.latency_ms_p50:.2f} ms",
            f"{pruned.latency_ms_p50:.2f} ms  ({pruned.precision})",
        )
    table.add_row(
        "end to end, p50",
        f"{before.latency_ms.p50:.2f} ms",
        f"[bold]{after.latency_ms.p50:.2f} ms[/bold]",
    )
    table.add_row(
        "end to end, p95", f"{before.latency_ms.p95:.2f} ms", f"{after.latency_ms.p95:.2f} ms"
    )
    for name, quality in before.quality.items():
        table.add_row(name, format_quality(quality), format_quality(after.quality[name]))
    table.add_row("parameters", f"{before.params / 1e6:.2f} M", f"{after.params / 1e6:.2f} M")
    table.add_row("bundle", f"{before.size_mb:.1f} MB", f"{after.size_mb:.1f} MB")
    out.print(table)
    out.print(_describe_verdict(summary))
    for warning in summary.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def _describe_verdict(summary: Summary) -> str:
    """Say in one line whether the target is met, and what it took."""
    verdict = "[red]target not met[/red]"
    if summary.target.met:
        verdict = "[green]target met[/green]"
    if not summary.compressed.latency_ms.n:
        verdict += ", as predicted"
    for kind in summary.target.undetermined_limits:
        verdict += f", [red]limit of {kind} undetermined[/red]"
    cross_modal = ""
    if summary.cross_modal_ratio is not None:
        cross_modal = f", cross-modal {summary.cross_modal_ratio:.0%}"
    quality = f"{summary.quality_retained:.1%} of the quality retained"
    if summary.determined_quality is None:
        nodes = ", ".join(summary.undetermined_nodes) or "no metric gave a figure"
        quality = f"[red]quality undetermined[/red] ({nodes})"
    passed = sum(proof.passed for proof in summary.proofs)
    return (
        f"[bold]{summary.speedup:.2f}x[/bold], {verdict}; "
        f"{quality}; "
        f"pruned: unimodal {summary.unimodal_ratio:.0%}{cross_modal}; "
        f"{passed} of {len(summary.proofs)} proofs passed"
    )


def print_claims(folder: RunFolder) -> None:
    """Print the claims that a comparison or an ablation tested, with their verdicts."""
    for claim in read_plain(list, folder.claims, cure=RESUME_CURE):
        points = f"{100 * claim['gap']:+.1f} ± {100 * claim['half']:.1f} points"
        verdict = f"[bold]{escape(claim['verdict'])}[/bold]"
        out.print(f"{escape(claim['claim'])}: {verdict} ({points})", soft_wrap=True)


def print_path(name: str, path: Path) -> None:
    """Print where something was written."""
    out.print(f"{name:<7} {escape(str(path))}", soft_wrap=True)
