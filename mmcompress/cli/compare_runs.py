"""`mmcompress compare-runs`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    are_same_inputs,
    check_comparable,
    find_difference,
    list_unlike_settings,
    name_devices,
)
from mmcompress.stats import SplitScores
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

PAGES = "mmcompress.report.compare_runs"
"""Writes the pages; they take Jinja and Altair."""

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
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
def compare_runs_command(
    folders: tuple[str, ...],
    max_latency: str | None,
    max_drop: str | None,
    folder: str | None,
    summary: str | None,
    as_json: bool,
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
            scores = load_paired_scores(name, folders[0])
            differences[name] = find_difference(run, reference, allowed=allowed, scores=scores)
    warnings = list_blind_spots(runs, differences, allowed=allowed)
    for name in differences:
        for unlike in list_unlike_settings(runs[name], reference):
            warnings.append(f"{name}: {unlike}: that may be what makes it differ")
    if as_json:
        click.echo(json.dumps(list_facts(runs, differences, warnings=warnings), indent=1))
    else:
        print_runs(runs, differences)
        for warning in warnings:
            out.print(f"[yellow]warning:[/yellow] {escape(warning)}", soft_wrap=True)
    if folder is not None:
        write_pages = resolve_entry(f"{PAGES}:write_run_comparison")
        page = write_pages(runs, differences, folder=Path(folder))
        if not as_json:
            print_path("page", page)
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


def load_paired_scores(run: str, reference: str) -> tuple[SplitScores, SplitScores] | None:
    """Load the scores of two runs, input by input; None where they are not of the same inputs.

    Args:
        run: The folder of a run.
        reference: The folder of the run that it is compared with.
    """
    records = [RunFolder(path=Path(name)).outcomes for name in (run, reference)]
    if not all(record.exists() for record in records):
        return None
    try:
        own, others = (read_record(SplitScores, record) for record in records)
    except DataError:
        # They only make margins narrower.
        return None
    return (own, others) if are_same_inputs(own, others) else None


def list_facts(
    runs: Mapping[str, Summary],
    differences: Mapping[str, RunDifference],
    *,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """List what the table shows, for a program."""
    facts: dict[str, Any] = {}
    for name, run in runs.items():
        facts[name] = {
            "target": run.target.text,
            "met": run.target.met,
            "speedup": run.speedup,
            "quality_retained": run.determined_quality,
            "latency_ms": run.compressed.latency_ms.p50,
            "device": run.device,
        }
        difference = differences.get(name)
        if difference is None:
            continue
        drops: dict[str, Any] = {}
        for metric, drop in difference.drops.items():
            drops[metric] = {"drop": drop, "margin": difference.drop_margins[metric]}
        facts[name] |= {
            "latency_difference": difference.latency,
            "latency_margin": difference.latency_margin,
            "drops": drops,
            "is_paired": difference.is_paired,
            "problems": list(difference.problems),
        }
    is_passed = not any(difference.problems for difference in differences.values())
    return {"passed": is_passed, "runs": facts, "warnings": list(warnings)}


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
    devices = name_devices(runs)
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
