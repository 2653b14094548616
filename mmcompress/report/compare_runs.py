"""Pages over finished runs side by side: their figures, and what differs from the first one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmcompress.report.charts.run_fronts import draw_run_fronts
from mmcompress.report.fill_templates import fill_template, write_pages
from mmcompress.results.records import Summary
from mmcompress.results.run_differences import RunDifference

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
    return write_pages(folder / PAGE_NAME, **_list_values(runs, differences))


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
        "chart": draw_run_fronts(runs),
    }


def name_devices(runs: Mapping[str, Summary]) -> dict[str, str]:
    """Name every device that runs were measured on, by its fingerprint.

    Milliseconds of two devices never stand in one column.
    """
    names: dict[str, str] = {}
    for summary in runs.values():
        if summary.device not in names:
            name = str(summary.cpu.get("name", "?"))
            is_taken = name in names.values()
            names[summary.device] = f"{name} ({len(names) + 1})" if is_taken else name
    return names
