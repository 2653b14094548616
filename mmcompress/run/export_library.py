"""The models of a finished run as checkpoints of their own libraries."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import DataError, ModelError
from mmcompress.export.library_folder import (
    PrunedNode,
    find_library_folder,
    write_library_folder,
)
from mmcompress.models.sources import load_models
from mmcompress.results.records import Proof
from mmcompress.run.load_modules import find_run_folders, load_modules, read_run_spec
from mmcompress.runtime.progress import ProgressListener, ignore_progress
from mmcompress.storage import replace_folder


@dataclass(frozen=True, kw_only=True)
class ExportedCheckpoints:
    """What was written, and what could not be."""

    folders: dict[str, Path]
    """The folder of every node that was written."""
    proofs: dict[str, Proof]
    """That the folder answers as the pruned model, by node."""
    refusals: dict[str, str]
    """Why a node was not written, in words."""


def export_library_folders(
    run: str | Path, out: str | Path, *, on_progress: ProgressListener = ignore_progress
) -> ExportedCheckpoints:
    """Write the models of a finished run as folders that their libraries load.

    Nodes of one checkpoint share a folder, which has the name of the first of them. A node whose
    structure its library can't express is left out, with the reason.

    Args:
        run: A run folder, or the folder of one of its targets.
        out: The folder that gets a folder for each checkpoint; it must be new or empty.
        on_progress: Receives messages for a person.

    Raises:
        DataError: The run is not finished, or `out` is not empty.
        ModelError: No library can express its model; nothing is written.
        ProofFailed: A folder answers otherwise than the pruned model; nothing is written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: not empty; choose another --out")
    _, run_folder = find_run_folders(run)
    spec = read_run_spec(run_folder)
    dense_models = load_models(spec)
    pruned_models = load_modules(run)
    proofs: dict[str, Proof] = {}
    refusals: dict[str, str] = {}
    nodes_by_source: dict[Path, list[str]] = {}
    written_by_source: dict[Path, Path] = {}
    with replace_folder(out) as unfinished, tempfile.TemporaryDirectory(dir=unfinished) as scratch:
        for node_name, node in spec.list_model_nodes().items():
            on_progress("export", f"{node_name} as its library has it", None)
            dense = dense_models[node_name]
            blocks_left = {block.name: block.units for block in pruned_models[node_name].blocks}
            pruned = PrunedNode(
                name=node_name,
                node=node,
                dense=dense,
                pruned=pruned_models[node_name],
                kept={block.name: blocks_left.get(block.name, 0) for block in dense.blocks},
            )
            written = Path(scratch) / node_name
            try:
                source, scheme = find_library_folder(node)
                latest = written_by_source.get(source, source)
                proofs[node_name] = write_library_folder(
                    latest, written, pruned=pruned, scheme=scheme
                )
            except ModelError as error:
                refusals[node_name] = str(error)
                continue
            written_by_source[source] = written
            nodes_by_source.setdefault(source, []).append(node_name)
        if not proofs:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
            raise ModelError(f"no library can express its model: {reasons}")
        folders: dict[str, Path] = {}
        for source, node_names in nodes_by_source.items():
            written_by_source[source].rename(unfinished / node_names[0])
            folders |= dict.fromkeys(node_names, out / node_names[0])
    return ExportedCheckpoints(folders=folders, proofs=proofs, refusals=refusals)
