"""Tables of results, as several commands print them."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from mmcompress.cli.console import out, write_event
from mmcompress.report.formats import format_quality
from mmcompress.results.records import Summary
from mmcompress.storage import read_plain
from mmcompress.workspace.folder import RESUME_CURE, RunFolder


def print_summary(summary: Summary) -> None:
    """Print the table that a run ends with, its verdict and its warnings."""
    title = f"{summary.pipeline}, target {summary.target.text}"
    table = Table("", "before", "after", box=None, title=title)
    dense_side = summary.baseline
    compressed_side = summary.compressed
    for name, node in dense_side.nodes.items():
        pruned = compressed_side.nodes[name]
        table.add_row(
            f"{name}, p50",
            f"{node.latency_ms_p50:.2f} ms",
            f"{pruned.latency_ms_p50:.2f} ms  ({pruned.precision})",
        )
    table.add_row(
        "end to end, p50",
        f"{dense_side.latency_ms.p50:.2f} ms",
        f"[bold]{compressed_side.latency_ms.p50:.2f} ms[/bold]",
    )
    table.add_row(
        "end to end, p95",
        f"{dense_side.latency_ms.p95:.2f} ms",
        f"{compressed_side.latency_ms.p95:.2f} ms",
    )
    for name, quality in dense_side.quality.items():
        table.add_row(name, format_quality(quality), format_quality(compressed_side.quality[name]))
    for row in _list_retained_rows(summary):
        table.add_row(*row)
    table.add_row(
        "parameters", f"{dense_side.params / 1e6:.2f} M", f"{compressed_side.params / 1e6:.2f} M"
    )
    table.add_row("bundle", f"{dense_side.size_mb:.1f} MB", f"{compressed_side.size_mb:.1f} MB")
    out.print(table)
    out.print(_describe_verdict(summary))
    for warning in summary.warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def write_result_event(summary: Summary, folder: RunFolder) -> None:
    """Write what came of one target as an event."""
    write_event(
        "result",
        target=summary.target.text,
        met=summary.target.met,
        speedup=summary.speedup,
        latency_ms=getattr(summary.compressed.latency_ms, summary.target.statistic),
        quality_retained=summary.determined_quality,
        warnings=list(summary.warnings),
        report=str(folder.report),
        bundle=str(folder.bundle),
    )


def _list_retained_rows(summary: Summary) -> list[tuple[str, str, str]]:
    """Return what is kept of the dense quality beside what was asked for, if it was."""
    retained = summary.retained
    if retained is None:
        return []
    verdict = "[green]kept[/green]" if retained.is_kept else "[red]not kept[/red]"
    choosing = format_quality(retained.choosing)
    test = format_quality(retained.test)
    return [
        ("retained, validation", f"{retained.limit:.1%} asked for", f"{choosing}: {verdict}"),
        ("retained, test", "", f"{test}: {retained.describe_test()}"),
    ]


def _describe_verdict(summary: Summary) -> str:
    """Say in one line whether the target is met, and what it took."""
    verdict = "[red]target not met[/red]"
    if summary.target.met:
        verdict = "[green]target met[/green]"
    if not summary.compressed.latency_ms.n:
        verdict += ", as predicted"
    if summary.is_target_within_margin:
        clause = f"the latency is known to ± {summary.latency_margin:.1%}, and lies that near to it"
        verdict += f" [yellow]({clause})[/yellow]"
    for kind in summary.target.undetermined_limits:
        verdict += f", [red]limit of {kind} undetermined[/red]"
    cross_modal = ""
    if summary.cross_modal_ratio is not None:
        cross_modal = f", cross-modal {summary.cross_modal_ratio:.0%}"
    for name, cut in summary.position_cuts.items():
        cross_modal += f", input of {escape(name)} {1 - cut.kept / cut.of:.0%} shorter"
    quality = f"{summary.quality_retained:.1%} of the quality retained"
    if summary.is_dense_at_chance:
        quality += " [red](the dense pipeline only guesses on these data)[/red]"
    if summary.determined_quality is None:
        nodes = ", ".join(summary.undetermined_nodes) or "no metric gave a figure"
        quality = f"[red]quality undetermined[/red] ({nodes})"
    passed_count = sum(proof.passed for proof in summary.proofs)
    return (
        f"[bold]{summary.speedup:.2f}x[/bold], {verdict}; "
        f"{quality}; "
        f"pruned: unimodal {summary.unimodal_ratio:.0%}{cross_modal}; "
        f"{passed_count} of {len(summary.proofs)} proofs passed"
    )


def print_claims(folder: RunFolder) -> None:
    """Print the claims that a comparison or an ablation tested, with their verdicts."""
    for claim in read_plain(list, folder.claims, cure=RESUME_CURE):
        points = f"{100 * claim['difference']:+.1f} ± {100 * claim['ci_half_width']:.1f} points"
        verdict = f"[bold]{escape(claim['verdict'])}[/bold]"
        out.print(f"{escape(claim['claim'])}: {verdict} ({points})", soft_wrap=True)


def print_path(name: str, path: Path | str) -> None:
    """Print where something was written."""
    out.print(f"{name:<7} {escape(str(path))}", soft_wrap=True)
