"""Damage of every (block, level): how much the pipeline's loss rises when one block alone is cut and refitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block, cut_by_share
from mmcompress.kinds.base import Batch, Models
from mmcompress.models.base import Model
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.refit import Grams, refit_from_gram_
from mmcompress.prune.surgery import copy_without_units
from mmcompress.prune.units import choose_units
from mmcompress.search.sensitivity.curves import SensitivityCurve

MEASURED_SHARES = (0.25, 0.5, 0.75, 1.0)


NO_LIMIT: Mapping[str, float] = MappingProxyType({})


@torch.inference_mode()
def measure_sensitivity(
    pipeline: TorchPipeline,
    models: Models,
    *,
    batch: Batch,
    scores: Mapping[str, Mapping[str, Tensor]],
    grams: Mapping[str, Grams],
    ridge: float,
    progress: Callable[[str, float], None] = lambda what, share: None,
    shortest: Mapping[str, float] = NO_LIMIT,
) -> dict[str, dict[str, SensitivityCurve]]:
    """Curves per node and block. Only the nodes downstream of the cut are run again.

    `shortest`: the largest share of its positions that a node may lose. Damage rises steeply where the end of what is
    seen or heard begins: levels beyond would say too much of those within.
    """
    dense = pipeline.forward_in_pieces(models, batch)
    anchors = pipeline.select_reference_outputs(dense)
    base = pipeline.loss_of_outputs(dense, batch, dense=anchors)
    found: dict[str, dict[str, SensitivityCurve]] = {}
    total = sum(len(m.blocks) for m in models.values())
    done = 0
    for node, model in models.items():
        again = pipeline.downstream(node)
        known = {n: o for n, o in dense.items() if n not in again}
        found[node] = {}
        for block in model.blocks:
            progress(f"{node}.{block.name}", done / total)
            done += 1
            points = {block.units: 0.0}
            for kept in _levels(block, shortest.get(node, 0.0)):
                cut = _cut(
                    model, block, kept=kept, scores=scores[node], grams=grams[node], ridge=ridge
                )
                loss = pipeline.loss_of_models(
                    {**models, node: cut}, batch, known=known, dense=anchors
                )
                points[kept] = max(loss - base, 0.0)
            order = sorted(points)
            found[node][block.name] = SensitivityCurve(
                tuple(order), tuple(points[k] for k in order)
            )
    return found


def _levels(block: Block, shortest: float) -> list[int]:
    """Units kept at which damage is measured, all of them aside."""
    most = shortest if block.group == "tokens" and shortest else 1.0
    return sorted(
        {cut_by_share(block, s * most) for s in MEASURED_SHARES}
        - {block.units},
        reverse=True,
    )


def _cut(
    model: Model,
    block: Block,
    *,
    kept: int,
    scores: Mapping[str, Tensor],
    grams: Grams,
    ridge: float,
) -> Model:
    units = choose_units({block.name: kept}, [block], scores=scores)
    cut = copy_without_units(model, units)
    refit_from_gram_(cut, model, units=units, grams=grams, ridge=ridge)
    return cut.eval()
