"""TODO."""

from __future__ import annotations

from typing import Any

from mmcompress.graph.structure import Candidate
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.refit import refit_
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.worker import prune_node
from mmcompress.workspace.context import RunContext


def build_pruned_models(
    run: RunContext,
    ev: Sensitivity,
    *,
    candidate: Candidate,
    refit: bool,
    dense: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fresh pruned models of a candidate, refitted in order on calibration pairs when asked.

    `dense`: the models to cut, those of the run by default.
    """

    dense = dense or run.models
    models = {
        n: prune_node(m, candidate.kept_units[n], scores=ev.scores[n], grams=None, ridge=0.0)
        for n, m in dense.items()
    }
    set_context_lengths(run.spec, models)
    if refit:
        batch = run.pipeline.collate(run.data.load("train", run.spec.data.calibration))
        refit_(run.pipeline, models, dense=dense, batch=batch, ridge=run.spec.prune.ridge)
    return models
