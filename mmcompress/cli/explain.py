"""`mmcompress explain`."""

from __future__ import annotations

import click

from mmcompress.cli.options import LocalPath, parse_settings, set_option, space_option
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import resolve_entry

EXPLAIN_SPEC = "mmcompress.cli.explain_tables:explain_spec"
"""What does the work; it takes torch."""


@click.command("explain")
@click.argument("spec", type=LocalPath())
@space_option
@click.option(
    "--run", "folder", type=LocalPath(), help="An earlier run: its measured milliseconds are used."
)
@set_option
def explain_command(
    spec: str, space: str | None, folder: str | None, settings: tuple[str, ...]
) -> None:
    """Tell what a run would do: the graph, what may be cut, what is protected, what it takes.

    Nothing is measured, trained or written.
    """
    overrides = parse_settings(settings)
    load_spec(spec, overrides)
    resolve_entry(EXPLAIN_SPEC)(spec, space=space, folder=folder, overrides=overrides)
