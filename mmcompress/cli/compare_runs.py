"""`mmcompress compare-runs`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Column, Table

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.cli.results_table import print_path
from mmcompress.errors import DataError, RegressionFound, SpecError
from mmcompress.registry import resolve_entry
from mmcompress.report.formats import format_milliseconds, format_retained, format_speedup
from mmcompress.results.records import Summary
from mmcompress.results.run_differences import (
    AllowedDifferences,
    RunDifference,
    check_comparable,
    find_difference,
    list_unlike_settings,
)
from mmcompress.workspace.load_summary import load_summary

PAGES = "mmcompress.report.compare_runs"
"""Draws the pages; it takes Altair."""

PERCENT = re.compile(r"\+?(\d+(?:\.\d+)?)\s*%")
"""A share as a person writes it: `+3%`, `0.5%`."""


def parse_percent(text: str | None, *, option: str) -> float | None:
    """Parse a share in percent; None stays None.

    Raises:
        SpecError: It is no percentage.
    """
    if text is None:
        return None
    match = PERCENT.fullmatch(text.strip())
    if match is None:
        raise SpecError(f"{option} {text}: expected a percentage that is not negative, e.g. +3%")
    return float(match[1]) / 100


@click.command("compare-runs")
@click.argument("folders", nargs=-1, required=True, metavar="RUN RUN...", type=LocalPath())
@click.option(
    "--max-latency", metavar="+3%", help="Exit code 3 where a later run is slower by more."
)
@click.option(
    "--max-drop", metavar="0.5%", help="Exit code 3 where a metric is lower by more points."
)
@click.option("--out", "folder", type=LocalPath(), help="Folder of the pages (default: none).")
@click.option(
    "--summary",
    type=LocalPath(),
    help="File that the Markdown table is appended to, as CI shows it.",
)
def compare_runs_command(
    folders: tuple[str, ...],
    max_latency: str | None,
    max_drop: str | None,
    folder: str | None,
    summary: str | None,
) -> None:
    """Put finished runs side by side; the first one is what the others are compared with.

    Latencies are compared as ratios to the dense pipeline that answered in turn. Milliseconds of
    two devices never stand in one column.
    """
    allowed = AllowedDifferences(
        latency=parse_percent(max_latency, option="--max-latency"),
        drop=parse_percent(max_drop, option="--max-drop"),
    )
    if len(folders) < 2:
        raise SpecError("compare-runs needs two runs or more")
    if len(set(folders)) < len(folders):
        raise SpecError("compare-runs got the same run twice; name each once")
    runs = {name: load_summary(name) for name in folders}
    check_comparable(runs)
    if summary:
        # What is found must not be lost for want of a file to write it to.
        _require_writable(Path(summary))
    reference = runs[folders[0]]
    differences: dict[str, RunDifference] = {}
    for name, run in runs.items():
        if name != folders[0]:
            differences[name] = find_difference(run, reference, allowed=allowed)
    print_runs(runs, differences)
    warnings = list_blind_spots(runs, differences, allowed=allowed)
    for name in differences:
        for unlike in list_unlike_settings(runs[name], reference):
            warnings.append(f"{name}: {unlike}: that may be what makes it differ")
    for warning in warnings:
        out.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    if folder is not None:
        write_pages = resolve_entry(f"{PAGES}:write_run_comparison")
        print_path("page", write_pages(runs, differences, folder=Path(folder)))
    problems = [
        f"{name}: {'; '.join(difference.problems)}"
        for name, difference in differences.items()
        if difference.problems
    ]
    if summary:
        verdict = describe_verdict(allowed, problems)
        text = format_markdown(runs, differences, warnings=warnings)
        _append_text(Path(summary), verdict + text)
    if problems:
        raise RegressionFound("\n".join(problems))


def describe_verdict(allowed: AllowedDifferences, problems: Sequence[str]) -> str:
    """Say in Markdown whether the limits hold; nothing where there are none."""
    limits: list[str] = []
    if allowed.latency is not None:
        limits.append(f"latency +{100 * allowed.latency:g} %")
    if allowed.drop is not None:
        limits.append(f"quality -{100 * allowed.drop:g} points")
    if not limits:
        return ""
    asked = ", ".join(limits)
    if not problems:
        return f"**Passed** ({asked}).\n\n"
    lines = "".join(f"- {problem}\n" for problem in problems)
    return f"**Failed** ({asked}):\n\n{lines}\n"


def list_blind_spots(
    runs: Mapping[str, Summary],
    differences: Mapping[str, RunDifference],
    *,
    allowed: AllowedDifferences,
) -> list[str]:
    """List what a comparison with limits can't see: quality and differences that are not known."""
    warnings: list[str] = []
    for name, difference in differences.items():
        margin = difference.latency_margin
        if _may_be_chance(allowed.latency, difference.latency, margin=margin):
            warnings.append(
                f"{name}: the latencies are known to ± {margin:.1%} only. Chance decides whether a "
                f"limit of {allowed.latency:.1%} holds: measure more, or allow more"
            )
        margin = difference.worst_drop_margin
        if _may_be_chance(allowed.drop, difference.worst_drop, margin=margin):
            warnings.append(
                f"{name}: the quality is known to ± {100 * margin:.1f} points only. Chance decides "
                f"whether a limit of {100 * (allowed.drop or 0):g} points holds: judge it on more "
                "pairs, or allow more"
            )
    for name, run in runs.items():
        if run.determined_quality is None or run.is_dense_at_chance:
            warnings.append(f"{name}: its quality is undetermined: no drop of it would be seen")
    return warnings


def _may_be_chance(limit: float | None, difference: float, *, margin: float) -> bool:
    """Return whether a limit lies within what a difference may be off by, and is narrower."""
    return limit is not None and margin > limit and abs(difference - limit) < margin


def print_runs(runs: dict[str, Summary], differences: dict[str, RunDifference]) -> None:
    """Print the runs side by side, with their differences from the first one."""
    devices = resolve_entry(f"{PAGES}:name_devices")(runs)
    first = next(iter(runs.values()))
    # A name that is cut off tells nobody which run it is.
    table = Table(
        Column("run", overflow="fold"),
        "target",
        "speedup",
        "retained",
        "latency",
        "drop",
        box=None,
        title=first.pipeline,
    )
    for name in devices.values():
        table.add_column(f"p50 on {name}", justify="right")
    for name, run in runs.items():
        latency = ""
        drop = ""
        if name in differences:
            difference = differences[name]
            latency = f"{difference.latency:+.1%} ± {100 * difference.latency_margin:.1f}"
            drop = (
                f"{100 * difference.worst_drop:.1f} ± {100 * difference.worst_drop_margin:.1f} "
                "points"
            )
        row = [
            escape(name),
            f"{run.target.text}, {'met' if run.target.met else '[red]not met[/red]'}",
            format_speedup(run.speedup),
            format_retained(run.determined_quality),
            latency,
            drop,
        ]
        for device in devices:
            is_own = device == run.device
            row.append(format_milliseconds(run.compressed.latency_ms.p50) if is_own else "–")
        table.add_row(*row)
    out.print(table)
    for name, run in runs.items():
        for miss in run.target.describe_misses():
            out.print(f"{escape(name)}: {escape(miss)}")


def format_markdown(
    runs: dict[str, Summary], differences: dict[str, RunDifference], *, warnings: Sequence[str]
) -> str:
    """Return the Markdown page with its warnings."""
    text: str = resolve_entry(f"{PAGES}:format_run_comparison")(runs, differences)
    return text + "".join(f"\n**Warning:** {warning}\n" for warning in warnings)


def _require_writable(path: Path) -> None:
    """Raise `DataError` where nothing can be appended to a file."""
    _append_text(path, "")


def _append_text(path: Path, text: str) -> None:
    """Append to a file, such as `$GITHUB_STEP_SUMMARY`.

    Raises:
        DataError: The file can't be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise DataError(f"{path}: can't be written: {error.strerror or error}") from error
