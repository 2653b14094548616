"""`mmcompress export`."""

from __future__ import annotations

import click
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.console import Progress, out
from mmcompress.cli.options import parse_settings, set_option
from mmcompress.run.export_dense import export_dense


@click.command("export")
@click.argument("spec", type=click.Path())
@click.option("--out", "bundle", type=click.Path(), required=True, help="Folder of the bundle.")
@set_option
def export_command(spec: str, bundle: str, settings: tuple[str, ...]) -> None:
    """Write the dense pipeline as a bundle for ONNX Runtime, with its caches and all proofs.

    The spec needs no target, no metrics and no data.
    """
    with Progress() as on_progress:
        proofs = export_dense(
            spec, bundle, overrides=parse_settings(settings), on_progress=on_progress
        )
    table = Table("node", "proof", "difference", "bound", box=None)
    for proof in proofs:
        name = f"{proof.name} {proof.detail}".strip()
        table.add_row(proof.node, escape(name), f"{proof.difference:.1e}", f"{proof.bound:.0e}")
    out.print(table)
    out.print(f"[green]{len(proofs)} proofs hold[/green]; the bundle is in {escape(bundle)}")
