"""Importance of every unit: one function a criterion, each higher for what should stay.

A criterion takes a `Material` and gives scores [units] per node and block. They are compared only within one node
and unit kind.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.graph.pipeline import Batch, Models, TorchPipeline
from mmcompress.prune.masks import masked, reader, writer_rows
from mmcompress.prune.refit import Grams
from mmcompress.records import Block

Scores = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Material:
    """What a criterion may look at: the dense models, calibration pairs with references, input statistics, a seed."""

    pipeline: TorchPipeline
    models: Models
    batch: Batch
    grams: dict[str, Grams]
    seed: int


def mask_gradients(e: Material) -> Scores:
    """d loss / d mask of every unit for each calibration pair: [pairs, units].

    The loss is the pipeline's own against the reference captions; a self-distillation loss would have no gradient at
    mask = 1. Masks hold one row a pair, so one backward pass gives the gradients of many pairs.
    """
    size = max(1, e.pipeline.size // 2)
    rows: dict[str, dict[str, list[Tensor]]] = {n: {b.name: [] for b in m.blocks} for n, m in e.models.items()}
    for piece in e.batch.chunks(size):
        masks = {
            n: {b.name: torch.ones(len(piece), b.units, requires_grad=True) for b in m.blocks}
            for n, m in e.models.items()
        }
        with ExitStack() as stack:
            for n, m in e.models.items():
                stack.enter_context(masked(m, masks[n]))
            loss = sum(e.pipeline.losses(e.pipeline.forward(e.models, piece), piece).values())
        flat = [(n, b, mask) for n, by in masks.items() for b, mask in by.items()]
        for (n, b, _), g in zip(flat, torch.autograd.grad(loss * len(piece), [m for *_, m in flat]), strict=True):
            rows[n][b].append(g)
    return {n: {b: torch.cat(g) for b, g in by.items()} for n, by in rows.items()}


def fisher(e: Material) -> Scores:
    """Sum over pairs of (d loss / d mask)^2: the diagonal empirical Fisher of the masks (Kwon et al. 2022)."""
    return {n: {b: g.square().sum(0) for b, g in by.items()} for n, by in mask_gradients(e).items()}


def taylor(e: Material) -> Scores:
    """|mean over pairs of d loss / d mask|: the first-order change of the loss (Molchanov et al. 2019)."""
    return {n: {b: g.mean(0).abs() for b, g in by.items()} for n, by in mask_gradients(e).items()}


def _per_unit(block: Block, per_feature: Tensor) -> Tensor:
    return per_feature.view(block.units, block.width).sum(1)


def magnitude(e: Material) -> Scores:
    """L2 norm of all weights of a unit, those that write it and those that read it (Li et al. 2017)."""
    found: Scores = {}
    for n, model in e.models.items():
        found[n] = {}
        for b in model.blocks:
            total = _per_unit(b, reader(model, b))
            for w in b.writers:
                norms = model.get_submodule(w.path).weight.detach().square().flatten(1).sum(1)  # type: ignore[operator, union-attr]
                rows = writer_rows(b, w, torch.arange(b.units)).view(w.parts, b.units, w.width)
                total = total + norms[rows].sum((0, 2))
            found[n][b.name] = total.sqrt()
    return found


def activation(e: Material) -> Scores:
    """Norm of the reading weights times the norm of their input, per unit (Wanda, Sun et al. 2024)."""
    return {
        n: {b.name: _per_unit(b, reader(m, b) * e.grams[n][b.name].second().diag()) for b in m.blocks}
        for n, m in e.models.items()
    }


def fluctuation(e: Material) -> Scores:
    """Norm of the reading weights times the variance of their input, which no bias repairs (FLAP, An et al. 2024)."""
    return {
        n: {b.name: _per_unit(b, reader(m, b) * e.grams[n][b.name].covariance().diag()) for b in m.blocks}
        for n, m in e.models.items()
    }


def random(e: Material) -> Scores:
    """Uniform scores from the seed."""
    g = torch.Generator().manual_seed(e.seed)
    return {n: {b.name: torch.rand(b.units, generator=g) for b in m.blocks} for n, m in e.models.items()}
