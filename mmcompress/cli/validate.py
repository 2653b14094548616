"""`mmcompress validate`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from mmcompress.cli.console import Progress, out
from mmcompress.cli.options import LocalPath, parse_settings, set_option, space_option
from mmcompress.data.check_data import describe_shortage, open_data
from mmcompress.data.open_dataset import read_lookup_texts
from mmcompress.errors import MissingPackage, ModelError
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.modality import propagate_modalities
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import sort_nodes
from mmcompress.registry import resolve_entry
from mmcompress.spec.loader import list_given_keys
from mmcompress.spec.name_lines import name_spec_lines
from mmcompress.spec.schema import Spec
from mmcompress.spec.space import find_default_space, load_space


@click.command("validate")
@click.argument("spec", type=LocalPath())
@space_option
@click.option(
    "--deep", is_flag=True, help="Also try everything that a run does, on the dense pipeline."
)
@set_option
def validate_command(spec: str, space: str | None, deep: bool, settings: tuple[str, ...]) -> None:
    """Check a spec, its graph and the search space, its data, and its models by their headers."""
    overrides = parse_settings(settings)
    loaded = load_spec(spec, overrides)
    load_space(space or find_default_space(), loaded, fixed=list_given_keys(spec, overrides))
    try:
        with name_spec_lines(spec, overrides):
            # The data are looked at first: models take torch, which takes seconds.
            data = open_data(loaded)
            warnings = _check_models(loaded)
        shortage = describe_shortage(loaded, data)
        for node in loaded.nodes.values():
            texts_file = node.get_option(get_kind(node.kind).list_option, "")
            if texts_file:
                read_lookup_texts(data, texts_file)
    except (MissingPackage, ImportError) as error:
        raise ModelError(
            f"{spec}: its keys and its graph are right; models and data were not looked at: {error}"
        ) from error
    out.print(_make_table(loaded))
    if deep:
        _check_deeply(spec, space, overrides=overrides)
    if shortage:
        warnings.append(shortage)
    for warning in warnings:
        out.print(f"[yellow]{escape(warning)}[/yellow]")
    out.print(f"[green]{escape(spec)} is valid[/green]", soft_wrap=True)


def _check_models(spec: Spec) -> list[str]:
    """Check every model by its configuration and the headers of its weights, and the readings of
    another device.

    Returns:
        Sentences on models that can be loaded and hardly fit each other.

    Raises:
        DataError: The readings can't be used.
        ModelError: A run could not load a model, or could not cut it as the spec says.
    """
    # They take torch, which a light install lacks.
    check_models = resolve_entry("mmcompress.models.sources:check_models")
    check_prune_options = resolve_entry("mmcompress.workspace.context:check_prune_options")
    load_readings = resolve_entry("mmcompress.workspace.context:load_readings")
    describe_foreign_encoders = resolve_entry(
        "mmcompress.models.foreign_encoders:describe_foreign_encoders"
    )
    models = check_models(spec)
    check_prune_options(spec, models)
    load_readings(spec)
    sentences: list[str] = describe_foreign_encoders(spec, models)
    return sentences


def _check_deeply(spec: str, space: str | None, *, overrides: dict[str, Any]) -> None:
    """Export, prove and run the dense pipeline in a folder that is removed again."""
    # They take torch, which a light install lacks.
    begin_run = resolve_entry("mmcompress.run.begin_run:begin_run")
    check_everything = resolve_entry("mmcompress.run.preflight:check_everything")
    with tempfile.TemporaryDirectory() as scratch, Progress() as on_progress:
        folder = Path(scratch)
        options = {"space": space, "overrides": overrides, "on_progress": on_progress}
        with begin_run(spec, folder / "run", **options) as run:
            proofs = check_everything(run, folder / "bundles")
    out.print(f"[green]{len(proofs)} proofs of the dense pipeline hold[/green]")


def _make_table(spec: Spec) -> Table:
    """Return a row for every node: its kind, what it reads, and the modalities in its outputs."""
    modalities = propagate_modalities(spec)
    table = Table("node", "kind", "reads", "modalities", box=None)
    for name in sort_nodes(spec):
        node = spec.nodes[name]
        reads = [f"{port}: {reference}" for port, reference in node.inputs.items()]
        table.add_row(name, node.kind, ", ".join(reads), "+".join(sorted(modalities[name])))
    return table
