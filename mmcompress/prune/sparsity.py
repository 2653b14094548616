"""Single weights set to zero inside the blocks that are left: scattered, or two of every four. No structure goes.

ONNX Runtime multiplies zeros like any other number, so this makes nothing faster there; the tool measures and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.models.base import Model


def mask_unstructured(weight: Tensor, share: float) -> Tensor:
    """Mask [o, i] without the `share` of smallest magnitude in every row (Han et al. 2015; rows as Wanda compares)."""
    gone = round(share * weight.shape[1])
    order = weight.abs().argsort(1)
    return torch.ones_like(weight).scatter(1, order[:, :gone], 0.0)


def mask_two_of_four(weight: Tensor, share: float = 0.5) -> Tensor:
    """Mask [o, i] that keeps the two largest of every four inputs in a row (Mishra et al. 2021); `share` is fixed."""
    rows, columns = weight.shape
    groups = F.pad(weight.abs(), (0, -columns % 4), value=-1.0).view(rows, -1, 4)
    kept = torch.zeros_like(groups).scatter(2, groups.topk(2, 2).indices, 1.0)
    return kept.view(rows, -1)[:, :columns]


PATTERNS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "unstructured": mask_unstructured,
    "2:4": mask_two_of_four,
}


@torch.no_grad()
def zero_weights_(models: Mapping[str, Model], pattern: str, *, share: float) -> Callable[[], None]:
    """Set weights to zero in place; the function returned sets them to zero again after a step of training."""
    held = [
        (m.weight, PATTERNS[pattern](m.weight, share))
        for model in models.values()
        for m in model.list_linear_layers()
    ]

    @torch.no_grad()
    def hold_() -> None:
        for weight, mask in held:
            weight.mul_(mask)

    hold_()
    return hold_


def zero_share(model: Model) -> float:
    """Share of the weights of a model's blocks that are zero."""
    found = model.list_linear_layers()
    total = sum(m.weight.numel() for m in found)
    return sum(int((m.weight == 0).sum()) for m in found) / total if total else 0.0
