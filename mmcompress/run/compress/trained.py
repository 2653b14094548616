"""Trained models as they lie in a run folder: a resumed run does not train again."""

from __future__ import annotations

from dataclasses import dataclass

from safetensors.torch import load_file, save_file

from mmcompress.export.weights import load_weights, save_weights
from mmcompress.graph.structure import Candidate
from mmcompress.models.base import Model
from mmcompress.prune.schedule import Survivors, list_all_units
from mmcompress.prune.units import choose_units
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.short_finetune import FinetunedStructure
from mmcompress.storage import replace_file
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class TrainedModels:
    """The trained models of a candidate."""

    models: dict[str, Model]
    """The models by node."""
    survivors: Survivors
    """Units of the dense models that are left, by node and block."""


def save_trained_models(trained: TrainedModels, folder: RunFolder) -> None:
    """Write the weights, and last the units: that file says that all weights are there."""
    save_weights(trained.models, folder.weights)
    tensors = {}
    for node_name, units_by_block in trained.survivors.items():
        for block_name, units in units_by_block.items():
            tensors[f"{node_name}/{block_name}"] = units
    with replace_file(folder.units) as unfinished:
        save_file(tensors, unfinished)


def load_trained_models(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate, folder: RunFolder
) -> TrainedModels:
    """Read the trained models of a candidate from a folder.

    Args:
        run: The run with the dense models.
        sensitivity: The importance scores that its units were chosen by.
        candidate: The structure of the models.
        folder: The folder that holds their weights.
    """
    models = build_pruned_models(run, sensitivity, candidate=candidate, refit=False)
    for node_name, model in models.items():
        load_weights(model, folder.locate_node_weights(node_name))
    tensors = load_file(folder.units)
    survivors: Survivors = {}
    for node_name, blocks in run.blocks.items():
        survivors[node_name] = {
            block.name: tensors[f"{node_name}/{block.name}"] for block in blocks
        }
    return TrainedModels(models=models, survivors=survivors)


def load_finetuned_models(
    run: RunContext, sensitivity: Sensitivity, *, best: FinetunedStructure
) -> TrainedModels:
    """Read the models of the best short training of a run folder."""
    candidate = best.candidate
    models = build_pruned_models(run, sensitivity, candidate=candidate, refit=False)
    for node_name, model in models.items():
        load_weights(model, run.folder.short_finetuned.locate_node_weights(node_name))
    survivors = select_survivors(run, sensitivity, candidate=candidate)
    return TrainedModels(models=models, survivors=survivors)


def select_survivors(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate
) -> Survivors:
    """Return the units of the dense models that a candidate keeps."""
    survivors = list_all_units(run.blocks)
    for node_name, blocks in run.blocks.items():
        survivors[node_name] |= choose_units(
            candidate.kept_units[node_name], blocks, scores=sensitivity.scores[node_name]
        )
    return survivors
