"""TODO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ConstantOutput(nn.Module):
    """Stands for a removed sub-layer: what it adds to the residual stream is this bias (refit makes it the mean).

    `returns`: what the library expects of the sub-layer: "plain" a tensor, "pair" also its attention weights, "biased"
    also the position bias that T5 hands from layer to layer. `weight` is there for libraries that ask a layer's dtype.
    """

    def __init__(self, bias: Tensor, returns: str = "plain"):
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())
        self.register_buffer("weight", torch.zeros(0), persistent=False)
        self.returns = returns

    def forward(self, *_: Any, position_bias: Tensor | None = None, **__: Any) -> Any:
        return {
            "plain": self.bias,
            "pair": (self.bias, None),
            "biased": (self.bias, position_bias, None),
        }[self.returns]


class Passthrough(nn.Module):
    """Stands before a `Constant`: passes its input on. `weight`: see there."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0), persistent=False)
        self.pair = pair

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return (x, None) if self.pair else x


REPLACEMENTS: dict[str, Callable[[Tensor], nn.Module]] = {
    "plain": ConstantOutput,
    "pair": lambda bias: ConstantOutput(bias, "pair"),
    "biased": lambda bias: ConstantOutput(bias, "biased"),
    "skip": lambda bias: Passthrough(),
    "skip pair": lambda bias: Passthrough(pair=True),
}
"""What takes the place of a module of a removed block, by mode; made from the bias of its output projection."""
