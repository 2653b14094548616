"""Single weights set to zero inside the blocks that are left. No unit goes.

ONNX Runtime multiplies zeros like any other number, so this makes nothing faster there. The tool
measures that and says so.

Shapes in this file:
    O  outputs of a layer, I  its inputs, G  groups of four inputs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.models.base import Model


def mask_unstructured(weight_OI: Tensor, share: float) -> Tensor:
    """Return a mask of 0 and 1 that drops the smallest weights of every row (Han et al. 2015).

    Args:
        weight_OI: The weights; compared within a row, as Wanda does.
        share: The share of each row that is dropped.
    """
    drop_count = round(share * weight_OI.shape[1])
    smallest_first = weight_OI.abs().argsort(1)
    is_dropped = smallest_first[:, :drop_count]
    mask_OI = torch.ones_like(weight_OI)
    return mask_OI.scatter(1, is_dropped, 0.0)


def mask_two_of_four(weight_OI: Tensor, share: float = 0.5) -> Tensor:
    """Return a mask that keeps the two largest of every four inputs (Mishra et al. 2021).

    Args:
        weight_OI: The weights.
        share: Not used: it is always one half.
    """
    rows, columns = weight_OI.shape
    padding = -columns % 4
    # Padding is smaller than any magnitude, so it is never kept before a weight.
    padded_weight = F.pad(weight_OI.abs(), (0, padding), value=-1.0)
    groups_OG4 = padded_weight.view(rows, -1, 4)
    largest_indices = groups_OG4.topk(2, 2).indices
    mask_OG4 = torch.zeros_like(groups_OG4).scatter(2, largest_indices, 1.0)
    padded_mask = mask_OG4.view(rows, -1)
    return padded_mask[:, :columns]


PATTERNS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "unstructured": mask_unstructured,
    "2:4": mask_two_of_four,
}
"""How zeros may lie: a function of a weight [o, i] and the share of zeros that returns a mask."""


@torch.no_grad()
def zero_weights_(models: Mapping[str, Model], pattern: str, *, share: float) -> Callable[[], None]:
    """Set weights of all blocks to zero in place.

    Args:
        models: The models by node.
        pattern: A key of `PATTERNS`.
        share: The share of zeros.

    Returns:
        A function that sets the same weights to zero again, to be called after a training step.
    """
    layers: list[nn.Linear] = []
    for model in models.values():
        layers += model.list_linear_layers()
    make_mask = PATTERNS[pattern]
    masks = [make_mask(layer.weight, share) for layer in layers]

    @torch.no_grad()
    def hold_zeros_() -> None:
        for layer, mask in zip(layers, masks, strict=True):
            layer.weight.mul_(mask)

    hold_zeros_()
    return hold_zeros_


def measure_zero_share(model: Model) -> float:
    """Return the share of the weights of a model's blocks that are zero."""
    total = 0
    zeros = 0
    for layer in model.list_linear_layers():
        is_zero = layer.weight == 0
        total += is_zero.numel()
        zeros += int(is_zero.sum())
    return zeros / total if total else 0.0
