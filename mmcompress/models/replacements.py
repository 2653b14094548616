"""Modules that stand in for a removed sub-layer, so that a library's own forward still runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ConstantOutput(nn.Module):
    """Return the same vector for every input: what a removed sub-layer adds to the residual stream.

    The vector starts as the bias of the removed output projection. A refit sets it to the mean
    that the removed sub-layer added.

    Args:
        bias: [w] the vector.
        returns: What the library expects of the module. `plain` is a tensor. `pair` has its
            attention weights too, and `biased` the position bias that T5 hands from layer to layer.
    """

    def __init__(self, bias: Tensor, returns: str = "plain"):
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())
        # Libraries ask a layer for the dtype of its weight.
        self.register_buffer("weight", bias.detach().new_zeros(0), persistent=False)
        self.returns = returns

    def forward(self, *_: Any, position_bias: Tensor | None = None, **__: Any) -> Any:
        """Return the vector in the form that the library expects."""
        if self.returns == "pair":
            return self.bias, None
        if self.returns == "biased":
            return self.bias, position_bias, None
        return self.bias


class Passthrough(nn.Module):
    """Return the input, before a `ConstantOutput` that ignores it.

    Args:
        bias: [w] the bias of the removed output projection, for its dtype.
        pair: The library expects a tensor and its attention weights.
    """

    def __init__(self, bias: Tensor, *, pair: bool = False) -> None:
        super().__init__()
        # Libraries ask a layer for the dtype of its weight.
        self.register_buffer("weight", bias.detach().new_zeros(0), persistent=False)
        self.pair = pair

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """Return the input in the form that the library expects."""
        return (x, None) if self.pair else x


def _make_constant_pair(bias: Tensor) -> nn.Module:
    return ConstantOutput(bias, returns="pair")


def _make_constant_with_position_bias(bias: Tensor) -> nn.Module:
    return ConstantOutput(bias, returns="biased")


def _make_passthrough(bias: Tensor) -> nn.Module:
    return Passthrough(bias)


def _make_passthrough_pair(bias: Tensor) -> nn.Module:
    return Passthrough(bias, pair=True)


REPLACEMENTS: dict[str, Callable[[Tensor], nn.Module]] = {
    "plain": ConstantOutput,
    "pair": _make_constant_pair,
    "biased": _make_constant_with_position_bias,
    "skip": _make_passthrough,
    "skip pair": _make_passthrough_pair,
}
"""The module that replaces one of a removed block, by the mode in `Block.drop`. Each is made from
the bias [w] of the block's output projection."""
