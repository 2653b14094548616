"""Importance of every unit: one function a criterion, each higher for what should stay.

A criterion takes a `Material` and gives scores [units] per node and block, of `model.weighted_blocks` at least. They are
compared only within one node and unit kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block
from mmcompress.kinds.base import Batch, Models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.masks import mask_units, reader_norms, writer_rows
from mmcompress.prune.refit import Gram, Grams, is_refittable

Scores = dict[str, dict[str, Tensor]]


MOVEMENT_RATE, MOVEMENT_STEPS = 1e-4, 16


ELIMINATION_RIDGE, MAX_ELIMINATION_ROUNDS = 0.01, 64
"""Share of the mean variance on the diagonal when a block is refitted; rounds at most in which its units go."""


@dataclass(frozen=True, kw_only=True)
class ImportanceInputs:
    """What a criterion may look at: the dense models, calibration pairs with references, input statistics, a seed."""

    pipeline: TorchPipeline
    models: Models
    batch: Batch
    grams: dict[str, Grams]
    seed: int


Criterion = Callable[[ImportanceInputs], Scores]


def mix_criteria(parts: Sequence[tuple[float, Criterion]]) -> Criterion:
    """A weighted sum of criteria, each divided by its mean over the units of one node and kind."""

    def score(e: ImportanceInputs) -> Scores:
        total: Scores = {n: {} for n in e.models}
        for weight, criterion in parts:
            found = criterion(e)
            for n, m in e.models.items():
                for kind in {b.kind for b in m.blocks}:
                    same = [b.name for b in m.blocks if b.kind == kind and b.name in found[n]]
                    if not same:  # positions, of which most criteria say nothing
                        continue
                    mean = torch.cat([found[n][b] for b in same]).abs().mean().clamp(min=1e-12)
                    for b in same:
                        total[n][b] = total[n].get(b, 0) + weight * found[n][b] / mean
        return total

    return score


def score_units(criterion: Criterion, e: ImportanceInputs) -> Scores:
    """What a criterion says, and evenly spread positions where it says nothing of them."""
    found = criterion(e)
    return {
        n: {b.name: found[n].get(b.name, score_positions_evenly(b)) for b in m.blocks}
        for n, m in e.models.items()
    }


def score_positions_evenly(block: Block) -> Tensor:
    """Scores of positions, which have no weights of their own: whatever is kept lies evenly (van der Corput)."""
    count = max(1, (block.units - 1).bit_length())
    turned = torch.tensor(
        [int(f"{i:0{count}b}"[::-1], 2) for i in range(block.units)], dtype=torch.float
    )
    return -turned


def compute_mask_gradients(e: ImportanceInputs) -> Scores:
    """d loss / d mask of every unit for each calibration pair: [pairs, units].

    The loss is the pipeline's own against the reference captions; a self-distillation loss would have no gradient at
    mask = 1. Masks hold one row a pair, so one backward pass gives the gradients of many pairs.
    """
    size = max(1, e.pipeline.batch_size // 2)
    rows: dict[str, dict[str, list[Tensor]]] = {
        n: {b.name: [] for b in m.blocks} for n, m in e.models.items()
    }
    for piece in e.batch.chunks(size):
        masks = {
            n: {b.name: torch.ones(len(piece), b.units, requires_grad=True) for b in m.blocks}
            for n, m in e.models.items()
        }
        with ExitStack() as stack:
            for n, m in e.models.items():
                stack.enter_context(mask_units(m, masks[n]))
            loss = sum(e.pipeline.losses(e.pipeline.forward(e.models, piece), piece).values())
        flat = [(n, b, mask) for n, by in masks.items() for b, mask in by.items()]
        for (n, b, _), g in zip(
            flat, torch.autograd.grad(loss * len(piece), [m for *_, m in flat]), strict=True
        ):
            rows[n][b].append(g)
    return {n: {b: torch.cat(g) for b, g in by.items()} for n, by in rows.items()}


def score_by_fisher(e: ImportanceInputs) -> Scores:
    """Sum over pairs of (d loss / d mask)^2: the diagonal empirical Fisher of the masks (Kwon et al. 2022)."""
    return {
        n: {b: g.square().sum(0) for b, g in by.items()}
        for n, by in compute_mask_gradients(e).items()
    }


def score_by_taylor(e: ImportanceInputs) -> Scores:
    """|mean over pairs of d loss / d mask|: the first-order change of the loss (Molchanov et al. 2019)."""
    return {
        n: {b: g.mean(0).abs() for b, g in by.items()}
        for n, by in compute_mask_gradients(e).items()
    }


def _per_unit(block: Block, per_feature: Tensor) -> Tensor:
    return per_feature.view(block.units, block.width).sum(1)


def score_by_magnitude(e: ImportanceInputs) -> Scores:
    """L2 norm of all weights of a unit, those that write it and those that read it (Li et al. 2017)."""
    return {n: {b: s.sqrt() for b, s in by.items()} for n, by in _norms(e, Tensor.square).items()}


def score_by_magnitude_l1(e: ImportanceInputs) -> Scores:
    """L1 norm of the same weights."""
    return _norms(e, Tensor.abs)


def _norms(e: ImportanceInputs, size: Callable[[Tensor], Tensor]) -> Scores:
    found: Scores = {}
    for n, model in e.models.items():
        found[n] = {}
        for b in model.weighted_blocks:
            read = (
                size(model.get_submodule(b.reader).weight.detach())
                .transpose(0, 1)
                .flatten(1)
                .sum(1)
            )
            total = _per_unit(b, read)
            for w in b.writers:
                norms = size(model.get_submodule(w.path).weight.detach()).flatten(1).sum(1)
                rows = writer_rows(b, w, units=torch.arange(b.units)).view(
                    w.parts, b.units, w.width
                )
                total = total + norms[rows].sum((0, 2))
            found[n][b.name] = total
    return found


def score_by_movement(e: ImportanceInputs) -> Scores:
    """-sum over steps of fine-tuning of d loss / d mask: weights that grow count for, those that shrink against a unit.

    Movement pruning (Sanh et al. 2020) scores a weight by -sum w dL/dw; the mask's gradient is that sum over the unit.
    """
    models = {n: copy.deepcopy(m) for n, m in e.models.items()}
    parameters = [p for m in models.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=MOVEMENT_RATE)
    total: Scores = {n: {b.name: torch.zeros(b.units) for b in m.blocks} for n, m in models.items()}
    pieces = e.batch.chunks(max(1, e.pipeline.batch_size // 2))
    for step in range(max(MOVEMENT_STEPS, len(pieces))):
        piece = pieces[step % len(pieces)]
        masks = {
            n: {b.name: torch.ones(b.units, requires_grad=True) for b in m.weighted_blocks}
            for n, m in models.items()
        }
        with ExitStack() as stack:
            for n, m in models.items():
                stack.enter_context(mask_units(m, masks[n]))
            loss = sum(e.pipeline.losses(e.pipeline.forward(models, piece), piece).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for n, by in masks.items():
            for b, mask in by.items():
                if mask.grad is not None:
                    total[n][b] -= mask.grad
    return {n: {b.name: total[n][b.name] for b in m.weighted_blocks} for n, m in e.models.items()}


def score_by_activation(e: ImportanceInputs) -> Scores:
    """Norm of the reading weights times the norm of their input, per unit (Wanda, Sun et al. 2024)."""
    return _weighed(e, lambda gram: gram.second().diag())


def score_by_fluctuation(e: ImportanceInputs) -> Scores:
    """Norm of the reading weights times the variance of their input, which no bias repairs (FLAP, An et al. 2024)."""
    return _weighed(e, lambda gram: gram.covariance().diag())


def score_by_reconstruction(e: ImportanceInputs) -> Scores:
    """The error of a block's output when a unit goes and what is left is refitted, units going one after the other.

    Structured optimal brain surgery (ZipLM, Kurtic et al. 2023): a unit that others can stand in for is worth little,
    however large. Of large blocks several units go at once. What can't be refitted is scored by `fluctuation`.
    """
    flow = score_by_fluctuation(e)
    score = lambda n, m, b: (
        _eliminated(m.get_linear(b.reader), b, gram=e.grams[n][b.name])
        if is_refittable(m, b)
        else flow[n][b.name]
    )
    return {n: {b.name: score(n, m, b) for b in m.weighted_blocks} for n, m in e.models.items()}


def _eliminated(out: nn.Linear, block: Block, *, gram: Gram) -> Tensor:
    """What is lost of the output of a linear layer by the time that a unit is gone: [units]."""
    moments, width = (
        (gram.second() if out.bias is None else gram.covariance()).double(),
        block.width,
    )
    ridge = ELIMINATION_RIDGE * moments.diag().mean().clamp(min=1e-8)
    inverse = torch.linalg.inv(moments + ridge * torch.eye(len(moments), dtype=torch.double))
    weight, lost = out.weight.detach().double(), 0.0
    left, scores = torch.arange(block.units), torch.zeros(block.units, dtype=torch.double)
    while (n := len(left)) > 0:
        own = inverse.view(n, width, n, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        read = weight.view(-1, n, width).permute(1, 2, 0)
        cost = (read * torch.linalg.solve(own, read)).sum((1, 2))
        going = cost.argsort()[: max(1, block.units // MAX_ELIMINATION_ROUNDS)]
        scores[left[going]] = lost + cost[going].cumsum(0)
        lost += float(cost[going].sum())
        stays = torch.ones(n, dtype=torch.bool)
        stays[going] = False
        kept = stays.repeat_interleave(width)
        by = torch.linalg.solve(inverse[~kept][:, ~kept], inverse[~kept][:, kept])
        weight = weight[:, kept] - weight[:, ~kept] @ by
        inverse = inverse[kept][:, kept] - inverse[kept][:, ~kept] @ by
        left = left[stays]
    return scores.float()


def _weighed(e: ImportanceInputs, moment: Callable[[Gram], Tensor]) -> Scores:
    score = lambda n, m, b: _per_unit(b, reader_norms(m, b) * moment(e.grams[n][b.name]))
    return {n: {b.name: score(n, m, b) for b in m.weighted_blocks} for n, m in e.models.items()}


def score_at_random(e: ImportanceInputs) -> Scores:
    """Uniform scores from the seed."""
    g = torch.Generator().manual_seed(e.seed)
    return {
        n: {b.name: torch.rand(b.units, generator=g) for b in m.blocks} for n, m in e.models.items()
    }
