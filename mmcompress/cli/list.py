"""`mmcompress list`."""

from __future__ import annotations

import click
from rich.markup import escape

from mmcompress.cli.console import out
from mmcompress.errors import SpecError, suggest_nearest
from mmcompress.registry import PLUG_POINTS


@click.command("list")
@click.argument("plug_point", metavar="[WHAT]", required=False)
def list_command(plug_point: str | None) -> None:
    """List what a spec may name, with a line on each."""
    if plug_point and plug_point not in PLUG_POINTS:
        nearest = suggest_nearest(plug_point, PLUG_POINTS)
        raise SpecError(f"list: unknown '{plug_point}'; {nearest}")
    for name in [plug_point] if plug_point else PLUG_POINTS:
        out.print(f"[bold]{name}[/bold]")
        registry = PLUG_POINTS[name]
        for entry in registry.list_names():
            out.print(f"  {entry:<28}{escape(registry.get_about(entry))}")
