"""Fills the templates of this room: each page is an HTML file and a Markdown file beside it.

A page needs nothing else: its style and its charts are inside, and it loads nothing.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import jinja2

from mmcompress.report.artifact_rows import describe_structure
from mmcompress.report.formats import (
    count_noun,
    format_count,
    format_megabytes,
    format_milliseconds,
    format_percent,
    format_quality,
    format_retained,
    format_speedup,
    keep_together,
    mark_words,
    write_cell,
)
from mmcompress.results.target_met import compute_target_share
from mmcompress.storage import replace_file
from mmcompress.version import PACKAGE_FOLDER

TEMPLATE_FOLDER = PACKAGE_FOLDER / "report" / "templates"
"""Where the templates are."""

FILTERS = {
    "percent": format_percent,
    "retained": format_retained,
    "quality": format_quality,
    "count": format_count,
    "ms": format_milliseconds,
    "mb": format_megabytes,
    "speedup": format_speedup,
    "noun": count_noun,
    "target_share": compute_target_share,
    "unbroken": keep_together,
    "mark_words": mark_words,
    "cell": write_cell,
    "structure": describe_structure,
}
"""What templates write figures with."""


def fill_template(name: str, **values: object) -> str:
    """Return a page that is made of one template.

    Args:
        name: The name of the template.
        values: What it shows.
    """
    return _open_templates(TEMPLATE_FOLDER).get_template(name).render(values)


def write_pages(page: Path, **values: object) -> Path:
    """Write a page and its Markdown twin, each whole or not at all.

    Args:
        page: The HTML file. Its name without the ending is the name of both templates.
        values: What the templates show.

    Returns:
        The HTML file.
    """
    for path in (page.with_suffix(".md"), page):
        text = fill_template(path.name, **values)
        with replace_file(path) as unfinished:
            unfinished.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return page


def check_templates() -> None:
    """Parse every template: a broken one is found before a run, not at its end.

    Raises:
        jinja2.TemplateError: A template is broken.
    """
    environment = _open_templates(TEMPLATE_FOLDER)
    for name in environment.list_templates():
        environment.get_template(name)


@lru_cache
def _open_templates(folder: Path) -> jinja2.Environment:
    """Return the templates of a folder with their filters. A value that is missing is an error.

    To parse them takes as long as to fill them ten times, so a process parses each file once.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment
