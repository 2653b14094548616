"""Criteria that follow the gradient of the loss: fisher, taylor, movement.

Each unit is scaled by a mask of value 1. The derivative of the loss with respect to the mask says
how much the loss changes when the unit fades.

Shapes in this file:
    B  pairs of a piece of the batch, P  calibration pairs, U  units of a block
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor

from mmcompress.kinds.base import Batch, Models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.importance.inputs import ImportanceInputs, Scores
from mmcompress.prune.masks import mask_units

MOVEMENT_RATE = 1e-4
"""Learning rate of the fine-tuning that movement follows."""

MOVEMENT_STEPS = 16
"""Steps of that fine-tuning at least; every calibration pair is seen once at least."""

Masks = Mapping[str, Mapping[str, Tensor]]
"""Masks of units: node -> block -> [units], or one row a pair [b, units]."""


def score_by_fisher(inputs: ImportanceInputs) -> Scores:
    """Score units by the diagonal empirical Fisher information of their masks (Kwon et al. 2022).

    score(u) = sum over pairs of (d loss / d mask_u)^2
    """
    scores: Scores = {}
    for node_name, gradients in compute_mask_gradients(inputs).items():
        scores[node_name] = {}
        for block_name, gradient_PU in gradients.items():
            scores[node_name][block_name] = gradient_PU.square().sum(0)
    return scores


def score_by_taylor(inputs: ImportanceInputs) -> Scores:
    """Score units by the first-order change of the loss (Molchanov et al. 2019).

    score(u) = | mean over pairs of d loss / d mask_u |
    """
    scores: Scores = {}
    for node_name, gradients in compute_mask_gradients(inputs).items():
        scores[node_name] = {}
        for block_name, gradient_PU in gradients.items():
            scores[node_name][block_name] = gradient_PU.mean(0).abs()
    return scores


def score_by_movement(inputs: ImportanceInputs) -> Scores:
    """Score units by how far fine-tuning moves their weights away from zero (Sanh et al. 2020).

    score(u) = - sum over steps of d loss / d mask_u

    Movement pruning scores a weight w by - sum of w dL/dw. The gradient of a unit's mask is the sum
    of w dL/dw over the unit.
    """
    models = {node_name: copy.deepcopy(model) for node_name, model in inputs.models.items()}
    # The copies are trained; the models of the inputs stay as they are.
    parameters: list[Tensor] = []
    for model in models.values():
        parameters += model.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=MOVEMENT_RATE)
    scores: Scores = {}
    for node_name, model in models.items():
        scores[node_name] = {
            block.name: torch.zeros(block.units, device=inputs.pipeline.device)
            for block in model.weighted_blocks
        }
    pieces = _split_for_backward(inputs)
    for step in range(max(MOVEMENT_STEPS, len(pieces))):
        masks: dict[str, dict[str, Tensor]] = {}
        for node_name, model in models.items():
            masks[node_name] = {}
            for block in model.weighted_blocks:
                mask_U = torch.ones(block.units, requires_grad=True, device=inputs.pipeline.device)
                masks[node_name][block.name] = mask_U
        piece = pieces[step % len(pieces)]
        loss = _compute_masked_loss(inputs.pipeline, models, piece=piece, masks=masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for node_name, node_masks in masks.items():
            for block_name, mask_U in node_masks.items():
                # What the loss does not depend on has no gradient: it has not moved.
                if mask_U.grad is not None:
                    scores[node_name][block_name] -= mask_U.grad
    return scores


def compute_mask_gradients(inputs: ImportanceInputs) -> Scores:
    """Return d loss / d mask of every unit for every calibration pair: [pairs, units].

    The loss is the pipeline's own against the references: a loss against the dense pipeline has no
    gradient at mask = 1. Masks have a row for each pair, so one backward pass serves many pairs.
    """
    rows: dict[str, dict[str, list[Tensor]]] = {}
    for node_name, model in inputs.models.items():
        rows[node_name] = {block.name: [] for block in model.blocks}
    for piece in _split_for_backward(inputs):
        node_names: list[str] = []
        block_names: list[str] = []
        flat_masks: list[Tensor] = []
        masks: dict[str, dict[str, Tensor]] = {}
        for node_name, model in inputs.models.items():
            masks[node_name] = {}
            for block in model.blocks:
                mask_BU = torch.ones(
                    len(piece), block.units, requires_grad=True, device=inputs.pipeline.device
                )
                masks[node_name][block.name] = mask_BU
                node_names.append(node_name)
                block_names.append(block.name)
                flat_masks.append(mask_BU)
        loss = _compute_masked_loss(inputs.pipeline, inputs.models, piece=piece, masks=masks)
        # The loss is a mean over pairs: times their number, each row is the gradient of its pair.
        gradients = torch.autograd.grad(loss * len(piece), flat_masks)
        for node_name, block_name, gradient_BU in zip(
            node_names, block_names, gradients, strict=True
        ):
            rows[node_name][block_name].append(gradient_BU)
    stacked_grams: Scores = {}
    for node_name, rows_by_block in rows.items():
        stacked_grams[node_name] = {}
        for block_name, parts in rows_by_block.items():
            stacked_grams[node_name][block_name] = torch.cat(parts)
    return stacked_grams


def _split_for_backward(inputs: ImportanceInputs) -> list[Batch]:
    """Split the calibration pairs into pieces of half a batch."""
    # A backward pass keeps all activations: it takes more memory than a forward pass.
    size = inputs.pipeline.batch_size // 2
    return inputs.batch.split_evenly(max(1, size))


def _compute_masked_loss(
    pipeline: TorchPipeline, models: Models, *, piece: Batch, masks: Masks
) -> Tensor:
    """Return the pipeline's own loss on some pairs with the units scaled by masks."""
    with ExitStack() as stack:
        for node_name, model in models.items():
            stack.enter_context(mask_units(model, masks[node_name]))
        outputs = pipeline.forward(models, piece)
        losses = pipeline.compute_losses(outputs, piece)
    return sum(losses.values(), torch.zeros((), device=pipeline.device))
