"""`mmcompress clean`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Column, Table

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.errors import DataError, SpecError
from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.runtime.environment import BYTES_PER_MB
from mmcompress.workspace.clean import DiskPart, delete_parts, list_cache_parts, list_run_parts
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import WAIT, hold_folder

LISTED_BYTES = 100_000
"""Bytes from which a file that stays has a line of its own."""


@click.command("clean")
@click.argument("run", required=False, type=LocalPath())
@click.option(
    "--cache",
    is_flag=True,
    help="Clean the cache: device tables, converted weights, copies of runs at storage URLs.",
)
@click.option("--yes", is_flag=True, help="Delete without asking.")
@click.option("--dry-run", is_flag=True, help="Only tell what takes how much.")
def clean_command(run: str | None, cache: bool, yes: bool, dry_run: bool) -> None:
    """Tell what the parts of a run take on disk, and delete those that can be made again.

    Result, report, trained weights and the search stay.
    """
    if cache == (run is not None):
        raise SpecError("clean takes a run folder, or --cache")
    if cache:
        _offer(list_cache_parts(), base=locate_cache_folder(), yes=yes, dry_run=dry_run)
        return
    folder = RunFolder(path=Path(str(run)))
    if not folder.spec.exists():
        raise DataError(f"{folder}: no run has begun in this folder")
    with hold_folder(folder.path, cure=WAIT):
        _offer(list_run_parts(folder), base=folder.path, yes=yes, dry_run=dry_run)


def _offer(parts: list[DiskPart], *, base: Path, yes: bool, dry_run: bool) -> None:
    """Show the parts, and delete those that may go if the user agrees."""
    name_column = Column("part", overflow="fold")
    table = Table(Column("MB", justify="right"), "", name_column, "what it is", box=None)
    shown = [part for part in parts if part.can_go or part.size_bytes >= LISTED_BYTES]
    for part in shown:
        mark = "[yellow]goes[/yellow]" if part.can_go else "stays"
        size = f"{part.size_bytes / BYTES_PER_MB:,.1f}"
        table.add_row(size, mark, escape(str(part.path.relative_to(base))), part.about)
    out.print(table)
    if len(shown) < len(parts):
        out.print(f"and {len(parts) - len(shown)} small files that stay")
    removable = [part for part in parts if part.can_go]
    size_bytes = sum(part.size_bytes for part in removable)
    total = f"{size_bytes / BYTES_PER_MB:,.1f} MB can go"
    if dry_run or not removable:
        out.print(total)
        return
    if not yes and not sys.stdin.isatty():
        out.print(f"{total}: add --yes to delete them")
        return
    if yes or click.confirm(f"{total}. Delete?"):
        freed_bytes = delete_parts(removable)
        out.print(f"{freed_bytes / BYTES_PER_MB:,.1f} MB deleted")
