"""The weights of a trained structure, as the start of a structure cut a little differently."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmcompress.graph.structure import Candidate
from mmcompress.models.base import Model
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.refit import refit_in_order_
from mmcompress.prune.surgery import copy_constants_, restore_units
from mmcompress.run.compress.trained import TrainedModels
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext


@dataclass(frozen=True, kw_only=True)
class InheritedModels:
    """The models of one structure with weights that were trained in another one."""

    cut: dict[str, Model]
    """The models by node: units of the trained models are there as they are, others are dense."""
    refitted: dict[str, Model] | None
    """The same, refitted to what the trained models give. None where these have not all of their
    positions, so that outputs cannot be compared."""

    def list_variants(self) -> list[dict[str, Model]]:
        """Return the models as they are, and refitted where they can be."""
        return [self.cut] if self.refitted is None else [self.cut, self.refitted]


def inherit_weights(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate, trained: TrainedModels
) -> InheritedModels:
    """Build the models of a structure from trained models of another one.

    They are refitted to what the trained models give. The outputs of dense blocks are no longer
    what the blocks around them have learned to live with.

    Args:
        run: The run, with the dense models.
        sensitivity: The importance scores that units are chosen by.
        candidate: The structure to build.
        trained: Trained models of another structure; they are not changed.
    """
    grown_models = _grow_models(run, trained)
    models = build_pruned_models(
        run, sensitivity, candidate=candidate, refit=False, dense=grown_models
    )
    for node_name, model in models.items():
        # A dense model has no place for what stands in for a dropped sub-layer.
        copy_constants_(model, trained.models[node_name])
    if not _has_all_positions(trained.models, models):
        return InheritedModels(cut=models, refitted=None)
    refitted_models = copy.deepcopy(models)
    batch = run.pipeline.collate(run.data.load("train", run.spec.data.calibration))
    refit_in_order_(
        run.pipeline,
        refitted_models,
        dense=trained.models,
        batch=batch,
        ridge=run.spec.prune.ridge,
    )
    return InheritedModels(cut=models, refitted=refitted_models)


def _has_all_positions(trained: Mapping[str, Model], models: Mapping[str, Model]) -> bool:
    """Return whether trained models have all positions that others have: their outputs can be
    compared only then."""
    for node_name, model in models.items():
        selector = model.token_selector
        trained_selector = trained[node_name].token_selector
        if selector is None or trained_selector is None:
            continue
        if not torch.isin(selector.index, trained_selector.index).all():
            return False
    return True


def _grow_models(run: RunContext, trained: TrainedModels) -> dict[str, Model]:
    """Return the dense models with the weights of an earlier artifact in their places."""
    models = {}
    for node_name, dense_model in run.models.items():
        models[node_name] = restore_units(
            dense_model, trained.models[node_name], kept=trained.survivors[node_name]
        )
    set_context_lengths(run.spec, models)
    return models
