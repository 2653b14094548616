"""What each part of the recipe brings: cells that differ in one thing, tables, and claims.

All cells share profile, predictor and sensitivity. A cell with a structure of its own is fitted to
the same measured latency. Only cells whose claim is about training are trained. A finished cell is
not made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from mmcompress.errors import DataError, SpecError, suggest_nearest
from mmcompress.experiments.cells import CLAIMS, Cell, list_cells
from mmcompress.experiments.claims import judge_claim
from mmcompress.experiments.make_cell import make_cell, make_missing_cells, require_same_effort
from mmcompress.graph.load_spec import load_spec
from mmcompress.report.comparison_pages import write_ablation
from mmcompress.results.records import Summary
from mmcompress.run.begin_run import begin_run
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.stages import prepare_run
from mmcompress.spec.overrides import apply_overrides
from mmcompress.spec.schema import Spec
from mmcompress.spec.space import Space
from mmcompress.spec.target import require_one_target
from mmcompress.storage import build_record, read_plain, to_plain, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import NEW_FOLDER_CURE, RunFolder
from mmcompress.workspace.run_options import RunOptions

REFERENCE_CHANGES = {"prune.schedule": "one_shot", "prune.refit": True, "prune.sparsity": 0.0}
"""Keys of the spec, and their values in the reference that every cell differs from."""

PlainCell = dict[str, object]
"""What a cell is made of, as plain data."""


def ablate(
    spec_path: str | Path,
    out: str | Path,
    *,
    tables: tuple[str, ...] = (),
    **options: Unpack[RunOptions],
) -> dict[str, Summary]:
    """Make the cells of some tables or of all, and write `ablation.html` into `out`.

    Args:
        spec_path: The spec file, with one target.
        out: The folder; each cell gets one of its own in it.
        tables: Names of tables. Empty: all of them.
        options: See `RunOptions`. Of a folder to go on in, cells that are done are kept.

    Returns:
        The summary of each cell by the name of its folder.

    Raises:
        SpecError: A table is unknown, or there are several targets.
        DataError: A finished cell was made in another way, or with another search effort.
    """
    spec = require_one_target(load_spec(spec_path, options.get("overrides")))
    spec = _change_spec(spec, REFERENCE_CHANGES)
    cells = list_cells(spec)
    known_tables = list(dict.fromkeys(cell.table for cell in cells))
    for table in tables:
        if table not in known_tables:
            nearest = suggest_nearest(table, known_tables)
            raise SpecError(f"ablate: unknown table '{table}'; {nearest}")
    with begin_run(spec_path, out, **options) as opened:
        run = replace(opened, spec=spec)
        suitable_cells = [cell for cell in cells if cell.method.is_suitable(run)]
        wanted_tables = _choose_cells(suitable_cells, tables)
        require_same_effort(run)
        return _make_cells(prepare_run(run), wanted_tables)


def _choose_cells(cells: Sequence[Cell], tables: Sequence[str]) -> list[Cell]:
    """Return the cells of some tables, and those that they take their structures from."""
    chosen_cells = [cell for cell in cells if not tables or cell.table in tables]
    folders = {cell.folder for cell in chosen_cells}
    folders |= {cell.structure_of for cell in chosen_cells}
    return [cell for cell in cells if cell.folder in folders]


def _make_cells(prepared: PreparedRun, cells: Sequence[Cell]) -> dict[str, Summary]:
    """Make what is missing, and write the report after each cell."""
    run = prepared.run
    summaries: dict[str, Summary] = {}
    by_folder = {cell.folder: cell for cell in cells}
    names = list(by_folder)

    def make_named_cell(name: str, steps: int) -> None:
        cell = by_folder[name]
        position = f"{names.index(name) + 1} of {len(names)}"
        run.on_progress("ablate", f"{cell.table}: {cell.name} ({position})", None)
        write_record(run.folder.get_subfolder(name).cell, _describe_cell(cell))
        _make_one_cell(prepared, cell, steps=steps)

    def check_cell(folder: RunFolder) -> None:
        description = _describe_cell(by_folder[folder.path.name])
        written: PlainCell = {}
        if folder.cell.exists():
            written = read_plain(dict, folder.cell, cure=NEW_FOLDER_CURE)
        if written != description:
            raise DataError(
                f"{folder}: another version of mmcompress made this cell in another way; "
                "use a new --out"
            )

    for summaries in make_missing_cells(run, names, make=make_named_cell, check=check_cell):
        _write_report(prepared, cells=cells, summaries=summaries)
    return summaries


def _describe_cell(cell: Cell) -> PlainCell:
    """Return what a cell is made of, as its folder keeps it."""
    return {"about": cell.method.about, "changes": dict(cell.changes), "like": cell.structure_of}


def _make_one_cell(prepared: PreparedRun, cell: Cell, *, steps: int) -> None:
    """Make one cell in its own folder."""
    run = prepared.run
    cell_run = replace(
        run,
        spec=_change_spec(run.spec, cell.changes),
        space=remove_fixed_dimensions(run.space, cell.changes),
    )
    method = replace(cell.method, structure_of=_choose_structure(run, cell))
    make_cell(cell_run, cell.folder, method=method, prepared=prepared, steps=steps)


def _choose_structure(run: RunContext, cell: Cell) -> str:
    """Return the folder of the cell whose structure a cell takes; empty where it fits one."""
    if cell.table != "allocation" or not cell.structure_of:
        return cell.structure_of
    # Short trainings chose such a structure, so untrained ones are not its equals.
    if run.folder.get_subfolder(cell.structure_of).short_finetunings.exists():
        return ""
    return cell.structure_of


def _write_report(
    prepared: PreparedRun, *, cells: Sequence[Cell], summaries: Mapping[str, Summary]
) -> None:
    """Write the report of the cells that are done."""
    tables: dict[str, dict[str, Summary]] = {}
    for cell in cells:
        if cell.folder in summaries:
            tables.setdefault(cell.table, {})[cell.name] = summaries[cell.folder]
    claims = []
    for claim in CLAIMS:
        if all(folder in summaries for folder in (*claim.better, *claim.worse)):
            claims.append(judge_claim(prepared.run, claim, dense=prepared.dense))
    write_ablation(tables, claims, folder=prepared.run.folder)


def remove_fixed_dimensions(space: Space, changes: Mapping[str, Any]) -> Space:
    """Return the search space without the keys that a cell fixes."""
    dimensions = {
        path: dimension for path, dimension in space.dimensions.items() if path not in changes
    }
    return replace(space, dimensions=dimensions)


def _change_spec(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    """Return a spec with some keys changed, and checked again."""
    return build_record(Spec, apply_overrides(to_plain(spec), changes))
