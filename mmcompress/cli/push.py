"""`mmcompress push`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.registry import resolve_entry


@click.command("push")
@click.argument("bundle", type=LocalPath())
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a new repository public (default: private).")
def push_command(bundle: str, repository: str, public: bool) -> None:
    """Share a bundle on the Hugging Face hub, with its card. A new repository is private."""
    # It takes huggingface_hub, which a light install lacks.
    push_bundle = resolve_entry("mmcompress.export.push:push_bundle")
    address = push_bundle(Path(bundle), repository, public=public)
    out.print(f"pushed: {escape(address)}", soft_wrap=True)
    out.print("The card names the sources of the weights: mind their licences.")
