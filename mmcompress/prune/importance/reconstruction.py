"""The criterion reconstruction: the error when a unit goes and what is left is refitted.

Shapes in this file:
    O  outputs of the layer that reads the block
    U  units that are left, W  width of a unit, F  features that are left: U * W
    G  features of the units that go in a round, K  features of those that stay
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block
from mmcompress.models.device import make_double
from mmcompress.prune.importance.activations import score_by_fluctuation
from mmcompress.prune.importance.inputs import ImportanceInputs, Scores
from mmcompress.prune.refit import MIN_MEAN_VARIANCE, Gram, is_refittable
from mmcompress.prune.side_by_side import run_side_by_side

ELIMINATION_RIDGE = 0.01
"""Share of the mean variance that is added to the diagonal before the moments are inverted."""

MAX_ELIMINATION_ROUNDS = 64
"""Rounds in which the units of a block go at most. Of larger blocks, several units go at once."""


def score_by_reconstruction(inputs: ImportanceInputs) -> Scores:
    """Score units by the output error when they go one after the other and the rest is refitted.

    A unit that others can stand in for is worth little, however large it is (structured optimal
    brain surgeon; ZipLM, Kurtic et al. 2023). Blocks that can't be refitted are scored by
    `score_by_fluctuation`.
    """
    scores = score_by_fluctuation(inputs)
    places: list[tuple[str, str]] = []
    eliminations: list[Callable[[], Tensor]] = []
    for node_name, model in inputs.models.items():
        for block in model.weighted_blocks:
            if is_refittable(model, block):
                places.append((node_name, block.name))
                reader = model.get_linear(block.reader)
                gram = inputs.grams[node_name][block.name]
                eliminations.append(partial(score_by_elimination, reader, block, gram=gram))
    results = run_side_by_side(eliminations)
    for (node_name, block_name), block_scores in zip(places, results, strict=True):
        scores[node_name][block_name] = block_scores
    return scores


def score_by_elimination(reader: nn.Linear, block: Block, *, gram: Gram) -> Tensor:
    """Return the output error at the time that each unit goes.

    Args:
        reader: The layer that reads the block.
        block: The block; its units times width are the inputs of the layer.
        gram: The moments of these inputs.

    Returns:
        [units] the errors. They rise in the order in which the units go.
    """
    width = block.width
    units_per_round = max(1, block.units // MAX_ELIMINATION_ROUNDS)
    weight_OF = make_double(reader.weight.detach())
    inverse_FF = _invert_moments(reader, gram)
    device = weight_OF.device
    units_U = torch.arange(block.units, device=device)
    scores = torch.zeros(block.units, dtype=torch.double, device=device)
    error = 0.0
    # Structured optimal brain surgeon (ZipLM, Kurtic et al. 2023). H are the moments of the inputs,
    # u the features of one unit, G those of the units that go, K those of the units that stay:
    #     cost(u)  = sum over outputs of w_u^T [(H^-1)_uu]^-1 w_u
    #     W_K     <- W_K - W_G [(H^-1)_GG]^-1 (H^-1)_GK
    #     H^-1_KK <- H^-1_KK - H^-1_KG [(H^-1)_GG]^-1 (H^-1)_GK
    while len(units_U) > 0:
        costs_U = _measure_costs(weight_OF, inverse_FF, width=width)
        leaving = costs_U.argsort()[:units_per_round]
        leaving_costs = costs_U[leaving]
        scores[units_U[leaving]] = error + leaving_costs.cumsum(0)
        error += float(leaving_costs.sum())

        # The rest takes over what it can of those that go, as a refit would.
        is_kept_U = torch.ones(len(units_U), dtype=torch.bool, device=device)
        is_kept_U[leaving] = False
        is_kept_F = is_kept_U.repeat_interleave(width)
        goes_F = ~is_kept_F

        inverse_GG = inverse_FF[goes_F][:, goes_F]
        inverse_GK = inverse_FF[goes_F][:, is_kept_F]
        inverse_KG = inverse_FF[is_kept_F][:, goes_F]
        inverse_KK = inverse_FF[is_kept_F][:, is_kept_F]
        substitutes_GK = torch.linalg.solve(inverse_GG, inverse_GK)
        weight_OK = weight_OF[:, is_kept_F]
        weight_OG = weight_OF[:, goes_F]
        weight_OF = weight_OK - weight_OG @ substitutes_GK
        inverse_FF = inverse_KK - inverse_KG @ substitutes_GK
        units_U = units_U[is_kept_U]
    return scores.float().to(reader.weight.device)


def _invert_moments(reader: nn.Linear, gram: Gram) -> Tensor:
    """Return the inverse of the inputs' moments [f, f] in double precision, with a ridge.

    A layer without a bias can't make up for means: its moments are about the origin.
    """
    if reader.bias is None:
        moments_FF = make_double(gram.compute_second_moment())
    else:
        moments_FF = make_double(gram.compute_covariance())
    mean_variance = moments_FF.diag().mean()
    ridge = ELIMINATION_RIDGE * mean_variance.clamp(min=MIN_MEAN_VARIANCE)
    identity_FF = torch.eye(len(moments_FF), dtype=torch.double, device=moments_FF.device)
    inverse_FF: Tensor = torch.linalg.inv(moments_FF + ridge * identity_FF)
    return inverse_FF


def _measure_costs(weight_OF: Tensor, inverse_FF: Tensor, *, width: int) -> Tensor:
    """Return the error that each unit adds when it goes next [u]."""
    unit_count = len(inverse_FF) // width
    inverse_UWUW = inverse_FF.view(unit_count, width, unit_count, width)
    # The diagonal over both unit axes comes last.
    own_inverse_WWU = inverse_UWUW.diagonal(dim1=0, dim2=2)
    own_inverse_UWW = own_inverse_WWU.permute(2, 0, 1)
    weight_OUW = weight_OF.view(-1, unit_count, width)
    weight_UWO = weight_OUW.permute(1, 2, 0)
    solved_UWO: Tensor = torch.linalg.solve(own_inverse_UWW, weight_UWO)
    products_UWO = weight_UWO * solved_UWO
    return products_UWO.sum((1, 2))
