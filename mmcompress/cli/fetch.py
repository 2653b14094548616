"""`mmcompress fetch`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.errors import DataError, SpecError
from mmcompress.registry import resolve_entry
from mmcompress.spec.storage_urls import is_remote


@click.command("fetch")
@click.argument("url", metavar="URL")
@click.option("--out", "folder", required=True, type=LocalPath(), help="The folder to write.")
def fetch_command(url: str, folder: str) -> None:
    """Copy a run from the storage URL that `run --out` or `submit --out` kept it at."""
    if not is_remote(url):
        raise SpecError(f"fetch {url}: expected a storage URL such as s3://bucket/run")
    if Path(folder).exists():
        raise DataError(f"{folder}: exists already; name another --out")
    resolve_entry("mmcompress.workspace.mirror_run:fetch_run")(url, Path(folder))
    out.print(escape(folder))
