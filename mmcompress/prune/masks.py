"""Units switched off by masks on the inputs of each block's output projection: the reference surgery is held to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mmcompress.models.base import Model
from mmcompress.records import Block, Writer


@contextmanager
def hooked(model: Model, block: Block, hook: object) -> Iterator[None]:
    """`hook(x) -> x` on the features a block's output projection reads."""
    handle = model.get_submodule(block.out).register_forward_pre_hook(lambda m, args: (hook(args[0]), *args[1:]))  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def spread(mask: Tensor, block: Block) -> Tensor:
    """A mask per unit as one per feature; [units] -> [features], [b, units] -> [b, 1, features]."""
    features = mask.repeat_interleave(block.width, -1)
    return features if mask.ndim == 1 else features[:, None]


@contextmanager
def masked(model: Model, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run `model` with units scaled by `masks[block]`, [units] or one row a sample [b, units]."""
    with ExitStack() as stack:
        for name, mask in masks.items():
            block = model.block(name)
            stack.enter_context(hooked(model, block, lambda x, m=mask, b=block: x * spread(m, b)))
        yield


def _spans(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def features(block: Block, units: Tensor) -> Tensor:
    """Feature indices of the given units."""
    return _spans(units, block.width)


def writer_rows(block: Block, writer: Writer, units: Tensor) -> Tensor:
    """Rows of a writer that belong to the given units."""
    kept = _spans(units, writer.width)
    return torch.cat([kept + p * block.units * writer.width for p in range(writer.parts)])


def out_linear(model: Model, block: Block) -> nn.Linear:
    return model.linear(block.out)
