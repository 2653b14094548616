"""Pages over finished runs side by side: their figures, and what differs from the first one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmcompress.registry import resolve_entry
from mmcompress.report.fill_templates import fill_template, write_pages
from mmcompress.results.records import Summary
from mmcompress.results.run_differences import RunDifference, name_devices

DRAW_CHART = "mmcompress.report.charts.run_fronts:draw_run_fronts"
"""Draws the chart of the page; it takes Altair, which the table does without."""

PAGE_NAME = "compare_runs.html"
"""Name of the page."""


def write_run_comparison(
    runs: Mapping[str, Summary], differences: Mapping[str, RunDifference], *, folder: Path
) -> Path:
    """Write the page of several runs, and its Markdown twin.

    Args:
        runs: The summaries by name; the first one is the reference.
        differences: How every other one differs from it, by name.
        folder: Where the pages go. It is made when it is missing.

    Returns:
        The page.

    Raises:
        DataError: The folder can't be written.
    """
    chart = resolve_entry(DRAW_CHART)(runs)
    return write_pages(folder / PAGE_NAME, **_list_values(runs, differences), chart=chart)


def format_run_comparison(
    runs: Mapping[str, Summary], differences: Mapping[str, RunDifference]
) -> str:
    """Format the Markdown page of several runs; see `write_run_comparison`."""
    name = Path(PAGE_NAME).with_suffix(".md").name
    return fill_template(name, **_list_values(runs, differences))


def _list_values(
    runs: Mapping[str, Summary], differences: Mapping[str, RunDifference]
) -> dict[str, object]:
    """List what the templates show."""
    reference_name = next(iter(runs))
    return {
        "runs": runs,
        "differences": differences,
        "reference_name": reference_name,
        "first": runs[reference_name],
        "devices": name_devices(runs),
    }
