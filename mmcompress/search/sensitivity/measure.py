"""Sensitivity curves measured: the loss with one block cut and refitted, all others dense."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block, cut_by_share
from mmcompress.kinds.base import Batch, Models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.refit import Grams
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.search.sensitivity.curves import SensitivityCurve
from mmcompress.search.sensitivity.measured_curves import CurveKeeper
from mmcompress.search.worker import prune_node

MEASURED_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of a block's removable units at which the loss is measured."""

NO_LIMIT: Mapping[str, float] = MappingProxyType({})
"""Every node may lose all of its positions."""


@torch.inference_mode()
def measure_sensitivity(
    pipeline: TorchPipeline,
    models: Models,
    *,
    batch: Batch,
    scores: Mapping[str, Mapping[str, Tensor]],
    grams: Mapping[str, Grams],
    ridge: float,
    progress: StageProgress = ignore_progress,
    max_token_shares: Mapping[str, float] = NO_LIMIT,
    keeper: CurveKeeper | None = None,
) -> dict[str, dict[str, SensitivityCurve]]:
    """Measure the curve of every block. Only nodes downstream of a cut are run again.

    Args:
        pipeline: Runs the models and scores their outputs.
        models: Dense models by node.
        batch: Pairs that every loss is measured on.
        scores: Importance [units] by node and block; the least important units are cut.
        grams: Input moments of the dense output projections by node and block, for the refit.
        ridge: Share of the mean variance on the diagonal of the refit.
        progress: Called with the block (`node.block`) and the share done.
        max_token_shares: Largest share of its positions that a node may lose. Loss rises steeply
            once the content of an input is cut: a level beyond the limit would distort the curve.
        keeper: Knows curves of a measurement that was stopped, and keeps the others.

    Returns:
        Curves by node and block.
    """
    dense_outputs = pipeline.forward_in_pieces(models, batch)
    references = pipeline.select_reference_outputs(dense_outputs)
    dense_loss = pipeline.compute_loss_of_outputs(dense_outputs, batch, dense=references)
    block_count = sum(len(model.blocks) for model in models.values())
    blocks_done = 0
    curves: dict[str, dict[str, SensitivityCurve]] = {}
    for node_name, model in models.items():
        curves[node_name] = {}
        rerun_nodes = pipeline.list_downstream(node_name)
        unchanged_outputs = {
            name: outputs for name, outputs in dense_outputs.items() if name not in rerun_nodes
        }
        for block in model.blocks:
            progress(f"{node_name}.{block.name}", blocks_done / block_count)
            blocks_done += 1
            known_curve = keeper.find(node_name, block.name) if keeper else None
            if known_curve is not None:
                curves[node_name][block.name] = known_curve
                continue
            points = {block.units: 0.0}
            for kept in list_measured_levels(block, max_token_shares.get(node_name, 0.0)):
                pruned_model = prune_node(
                    model,
                    {block.name: kept},
                    scores=scores[node_name],
                    grams=grams[node_name],
                    ridge=ridge,
                )
                loss = pipeline.compute_loss(
                    {**models, node_name: pruned_model},
                    batch,
                    known_outputs=unchanged_outputs,
                    dense=references,
                )
                points[kept] = max(loss - dense_loss, 0.0)
            curve = SensitivityCurve.from_points(points)
            curves[node_name][block.name] = curve
            if keeper:
                keeper.keep(node_name, block.name, curve=curve)
    return curves


def list_measured_levels(block: Block, max_token_share: float) -> list[int]:
    """List the numbers of units kept at which a block is measured, descending.

    The whole block is not among them.

    Args:
        block: The block to be cut.
        max_token_share: Largest share of positions that may be removed, 0 for no limit. It does
            not hold for other units.
    """
    removable_share = 1.0
    if block.group == "tokens" and max_token_share:
        removable_share = max_token_share
    levels = set()
    for share in MEASURED_SHARES:
        levels.add(cut_by_share(block, share * removable_share))
    levels.discard(block.units)
    return sorted(levels, reverse=True)
