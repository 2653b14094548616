"""Loads the pruned and trained models of a finished run as torch modules, to train them on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from safetensors.torch import load_file

from mmcompress.errors import DataError
from mmcompress.export.weights import load_weights
from mmcompress.models.base import Model
from mmcompress.models.sources import load_models, pin_sources, set_context_lengths
from mmcompress.prune.surgery import copy_without_units
from mmcompress.spec.schema import Spec
from mmcompress.storage import build_record
from mmcompress.workspace.folder import RunFolder


def load_modules(run: str | Path) -> dict[str, Model]:
    """Load the models of a finished run in torch: pruned, trained, and not rounded.

    The dense models are loaded from the sources that the spec of the run names, and cut again.
    Then the trained weights of the run take the place of theirs.

    Args:
        run: A run folder, or the folder of one of its targets.

    Returns:
        A `torch.nn.Module` for each model node, by its name. What its `forward` takes and gives
        says the class of its kind in `mmcompress.models.base`.

    Raises:
        DataError: The folder holds no finished training, or its weights can't be read.
        ModelError: A dense model can't be loaded.
    """
    folder, run_folder = find_run_folders(run)
    spec = read_run_spec(run_folder)
    units_by_block = load_file(folder.units)
    modules: dict[str, Model] = {}
    for node_name, model in load_models(spec).items():
        kept_units = {
            block.name: units_by_block[f"{node_name}/{block.name}"] for block in model.blocks
        }
        pruned_model = copy_without_units(model, kept_units)
        modules[node_name] = load_weights(pruned_model, folder.locate_node_weights(node_name))
    set_context_lengths(spec, modules)
    return modules


def find_run_folders(run: str | Path) -> tuple[RunFolder, RunFolder]:
    """Find the folder with the trained weights, and the one with the spec.

    Args:
        run: A run folder, or the folder of one of its targets.

    Raises:
        DataError: The folder holds no finished training.
    """
    folder = RunFolder(path=Path(run))
    run_folder = folder if folder.spec.exists() else folder.shared_by_targets
    if not folder.units.exists() or not run_folder.spec.exists():
        raise DataError(
            f"{folder}: holds no trained weights; give the folder of a finished run, "
            "or of one of its targets"
        )
    return folder, run_folder


def read_run_spec(folder: RunFolder) -> Spec:
    """Read the spec of a run, with its models pinned to the commits that it used."""
    data = json.loads(folder.spec.read_text(encoding="utf-8"))
    for plugin in data.get("plugins", ()):
        importlib.import_module(plugin)
    spec, _ = pin_sources(build_record(Spec, data), folder.read_sources())
    return spec
