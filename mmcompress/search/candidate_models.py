"""Torch models of a candidate: fresh copies of the dense ones, cut and refitted."""

from __future__ import annotations

from collections.abc import Mapping

from mmcompress.graph.structure import Candidate
from mmcompress.models.base import Model
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.refit import refit_in_order_
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.worker import prune_node
from mmcompress.workspace.context import RunContext


def build_pruned_models(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    candidate: Candidate,
    refit: bool,
    dense: Mapping[str, Model] | None = None,
) -> dict[str, Model]:
    """Build fresh pruned models of a candidate.

    Args:
        run: Spec, pipeline and data.
        sensitivity: Importance of the units: the most important ones are kept.
        candidate: Units kept in every block.
        refit: Whether the models are refitted in order, on the calibration pairs.
        dense: The models to cut; those of the run by default.

    Returns:
        Models by node. The dense ones are not changed.
    """
    dense_models = dense or run.models
    pruned_models: dict[str, Model] = {}
    for node_name, model in dense_models.items():
        pruned_models[node_name] = prune_node(
            model,
            candidate.kept_units[node_name],
            scores=sensitivity.scores[node_name],
            grams=None,
            ridge=0.0,
        )
    set_context_lengths(run.spec, pruned_models)
    if refit:
        pairs = run.data.load("train", run.spec.data.calibration)
        refit_in_order_(
            run.pipeline,
            pruned_models,
            dense=dense_models,
            batch=run.pipeline.collate(pairs),
            ridge=run.spec.prune.ridge,
        )
    return pruned_models
