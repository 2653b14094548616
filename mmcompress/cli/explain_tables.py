"""Tell what a run would do, as tables. It takes torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mmcompress.cli.console import Progress, out
from mmcompress.run.explain import Explanation, explain_run
from mmcompress.run.profile import Profile, profile_pipeline
from mmcompress.spec.durations import parse_max_time
from mmcompress.storage import read_record
from mmcompress.workspace.context import open_run
from mmcompress.workspace.folder import RunFolder


def explain_spec(
    spec: str,
    *,
    space: str | None,
    folder: str | None,
    measure: bool,
    max_time: str | None,
    overrides: dict[str, Any],
) -> None:
    """Print what a run of a spec would do.

    Args:
        spec: The spec file.
        space: The search space; None for the one that belongs to the spec.
        folder: An earlier run, whose measured milliseconds are used; None: there is none.
        measure: Whether the dense pipeline is exported and measured now.
        max_time: What the run may take, such as `2h`; None: there is no limit.
        overrides: Values by dotted key that replace those of the spec.
    """
    dense = None
    max_seconds = parse_max_time(max_time) if max_time else None
    if folder is not None and not measure:
        dense = read_record(Profile, RunFolder(path=Path(folder)).profile)
        out.print(f"Milliseconds are those of {escape(folder)}.")
    with tempfile.TemporaryDirectory() as scratch, Progress() as on_progress:
        run = open_run(
            spec, Path(scratch) / "run", space=space, overrides=overrides, on_progress=on_progress
        )
        if measure:
            dense = profile_pipeline(run)
        explanation = explain_run(run, dense, max_seconds=max_seconds)
    print_explanation(explanation, target=run.spec.target)


def print_explanation(explanation: Explanation, *, target: str) -> None:
    """Print the tables of an explanation."""
    out.print(_make_node_table(explanation))
    if explanation.is_measured:
        out.print(
            f"Shares are of measured latencies. A target of {escape(target)} leaves these "
            "milliseconds to each node, if all of them get faster alike."
        )
    else:
        out.print(
            "Shares are of multiply-adds, for texts of ten tokens: no latency was measured. "
            "--measure measures them, --run RUN takes those of an earlier run."
        )
    out.print()
    out.print(_make_cut_table(explanation))
    out.print(f"Cross-modal units are cut {explanation.protection}:")
    for reason, blocks in explanation.reasons.items():
        names = ", ".join(blocks)
        out.print(f"  {escape(reason)}: {escape(names)}", soft_wrap=True)
    if not explanation.reasons:
        out.print("  none: no layer joins two modalities")
    out.print(f"\nA run will take {explanation.needs.describe()}.")
    for sentence in explanation.expected_times:
        out.print(f"{escape(sentence)}.")


def _make_node_table(explanation: Explanation) -> Table:
    """Return a row for every node."""
    table = Table("node", "kind", "reads", "modalities", "parameters", "share", box=None)
    if explanation.is_measured:
        table.add_column("asked for, alike")
    for node in explanation.nodes:
        row = [
            node.name,
            node.kind,
            node.reads,
            node.modalities,
            "" if node.params_m is None else f"{node.params_m:.2f} M",
            "" if node.share is None else f"{node.share:.0%}",
        ]
        if explanation.is_measured:
            row.append("" if node.asked_ms is None else f"{node.asked_ms:.2f} ms")
        table.add_row(*row)
    return table


def _make_cut_table(explanation: Explanation) -> Table:
    """Return a row for every kind of unit of every node."""
    table = Table("node", "units", "blocks", "count", "cross-modal", "may be cut", box=None)
    for cut in explanation.cuts:
        table.add_row(
            cut.node,
            cut.group,
            str(cut.blocks),
            str(cut.units),
            str(cut.cross_modal) if cut.cross_modal else "",
            cut.allowed,
        )
    return table
