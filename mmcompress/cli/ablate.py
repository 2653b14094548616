"""`mmcompress ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mmcompress.cli.console import Progress
from mmcompress.cli.options import (
    LocalPath,
    add_run_options,
    choose_default_folder,
    collect_overrides,
    resume_option,
    split_names,
)
from mmcompress.cli.results_table import print_claims, print_path
from mmcompress.experiments.names import TABLES
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import resolve_entry
from mmcompress.workspace.folder import RunFolder

ABLATE = "mmcompress.experiments.ablate:ablate"
"""What does the work; it takes torch."""


@click.command("ablate")
@click.argument("spec", type=LocalPath())
@add_run_options
@click.option(
    "--tables", help=f"Which, with commas between them (default: all): {', '.join(TABLES)}."
)
@click.option(
    "--out", "folder", type=LocalPath(), help="Folder (default: runs/NAME-TARGET-ablation)."
)
@resume_option
def ablate_command(
    spec: str,
    tables: str | None,
    space: str | None,
    folder: str | None,
    resume: bool,
    **options: Any,
) -> None:
    """Measure what each part of the recipe brings: cells that differ in one thing, and claims on
    them."""
    overrides = collect_overrides(**options)
    load_spec(spec, overrides)
    folder = folder or choose_default_folder(spec, overrides, kind="ablation")
    with Progress() as on_progress:
        resolve_entry(ABLATE)(
            spec,
            folder,
            space=space,
            overrides=overrides,
            resume=resume,
            on_progress=on_progress,
            tables=split_names(tables),
        )
    results = RunFolder(path=Path(folder))
    print_claims(results)
    print_path("report", results.ablation_page)
