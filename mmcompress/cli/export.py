"""`mmcompress export`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.console import Progress, out
from mmcompress.cli.options import LocalPath, parse_settings, set_option
from mmcompress.errors import SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import resolve_entry
from mmcompress.results.records import Proof

EXPORT_DENSE = "mmcompress.run.export_dense:export_dense"
"""Writes a dense bundle; it takes torch."""

EXPORT_LIBRARY_FOLDERS = "mmcompress.run.export_library:export_library_folders"
"""Writes pruned models as checkpoints; it takes torch."""


@click.command("export")
@click.argument("spec", type=LocalPath(), metavar="SPEC|RUN")
@click.option("--out", "bundle", type=LocalPath(), required=True, help="Folder of the bundle.")
@click.option(
    "--as-transformers",
    "as_library",
    is_flag=True,
    help="SPEC is a finished run: write its models as checkpoints that their own library loads.",
)
@set_option
def export_command(spec: str, bundle: str, as_library: bool, settings: tuple[str, ...]) -> None:
    """Write the dense pipeline as a bundle for ONNX Runtime, with its caches and all proofs.

    The spec needs no target, no metrics and no data. Of a finished run, write the pruned models as
    checkpoints of transformers or open_clip.
    """
    if as_library:
        _export_checkpoints(spec, bundle)
        return
    if Path(spec).is_dir():
        raise SpecError(
            f"{spec}: a folder, not a spec; of a finished run, --as-transformers writes the models"
        )
    overrides = parse_settings(settings)
    load_spec(spec, overrides, for_export=True)
    with Progress() as on_progress:
        proofs: list[Proof] = resolve_entry(EXPORT_DENSE)(
            spec, bundle, overrides=overrides, on_progress=on_progress
        )
    table = Table("node", "proof", "difference", "bound", box=None)
    for proof in proofs:
        name = f"{proof.name} {proof.detail}".strip()
        table.add_row(proof.node, escape(name), f"{proof.difference:.1e}", f"{proof.bound:.0e}")
    out.print(table)
    out.print(f"[green]{len(proofs)} proofs hold[/green]; the bundle is in {escape(bundle)}")


def _export_checkpoints(run: str, folder: str) -> None:
    """Write the models of a finished run as checkpoints of their own libraries."""
    with Progress() as on_progress:
        written = resolve_entry(EXPORT_LIBRARY_FOLDERS)(run, folder, on_progress=on_progress)
    for node_name, proof in written.proofs.items():
        out.print(
            f"{escape(node_name)}: {escape(str(written.folders[node_name]))}; its library answers "
            f"as the pruned model (difference {proof.difference:.1e})"
        )
    for node_name, reason in written.refusals.items():
        out.print(f"{escape(node_name)}: [yellow]not written[/yellow]: {escape(reason)}")
    if written.refusals:
        out.print(
            "[yellow]a checkpoint that holds such a model as well has its dense weights there"
            "[/yellow]",
            soft_wrap=True,
        )
    count = len(written.proofs)
    out.print(f"{count} of {count + len(written.refusals)} models written")
