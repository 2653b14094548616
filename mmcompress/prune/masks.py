"""Units switched off by masks on the inputs of each block's output projection: the reference surgery is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from mmcompress.graph.blocks import Block, Writer
from mmcompress.models.base import Model, TokenSelector


@contextmanager
def hook_inputs(
    model: Model, paths: Iterable[str], *, hook: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """`hook(x) -> x` on the input of some modules."""
    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            handle = module.register_forward_pre_hook(lambda m, args: (hook(args[0]), *args[1:]))
            stack.callback(handle.remove)
        yield


def expand_mask(mask: Tensor, block: Block, *, like: Tensor) -> Tensor:
    """A mask per unit, [units] or [b, units], as one per feature that multiplies `like`: [b, .., f] or [b, f, h, w]."""
    features = mask.repeat_interleave(block.width, -1)
    if mask.ndim == 2 and len(like) != len(mask):  # several texts a sample
        features = features.repeat_interleave(len(like) // len(mask), 0)
    if like.ndim == 4:
        return features[..., None, None]
    return features if mask.ndim == 1 else features.view(len(features), *[1] * (like.ndim - 2), -1)


@contextmanager
def mask_units(model: Model, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Run `model` with units scaled by `masks[block]`, [units] or one row a sample [b, units]."""
    with ExitStack() as stack:
        for name, mask in masks.items():
            block = model.get_block(name)
            if block.group == "tokens":
                stack.enter_context(_thinned(model, block, mask=mask))
                continue
            paths = (block.reader, *block.extra_readers)
            stack.enter_context(
                hook_inputs(
                    model, paths, hook=lambda x, m=mask, b=block: x * expand_mask(m, b, like=x)
                )
            )
        yield


@contextmanager
def _thinned(model: Model, block: Block, *, mask: Tensor) -> Iterator[None]:
    """Positions left out where a mask [units] is zero; faded, all of them there, by one row a sample [b, units]."""
    at = model.get_submodule(block.reader)
    assert isinstance(at, TokenSelector)

    def hook(m: object, args: tuple, x: Tensor) -> Tensor:
        if mask.ndim == 1:
            return at.select_positions(x[:, : at.extra + at.count], mask.nonzero().flatten())
        return (
            x
            * torch.cat([mask.new_ones(len(mask), x.shape[1] - mask.shape[1]), mask], 1)[..., None]
        )

    handle = at.register_forward_hook(hook)
    yield
    handle.remove()


def sample_units(block: Block, keep: int, *, generator: torch.Generator) -> Tensor:
    """`keep` units of a block at random, sorted; of an ordered one the first."""
    if block.prefix_only:
        return torch.arange(keep)
    return torch.sort(torch.randperm(block.units, generator=generator)[:keep]).values


def _spans(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width)).flatten()


def feature_indices(block: Block, units: Tensor) -> Tensor:
    """Feature indices of the given units."""
    return _spans(units, block.width)


def writer_rows(block: Block, writer: Writer, *, units: Tensor) -> Tensor:
    """Rows of a writer that belong to the given units."""
    kept = _spans(units, writer.width)
    return torch.cat([kept + p * block.units * writer.width for p in range(writer.parts)])


def reader_norms(model: Model, block: Block) -> Tensor:
    """Squared norm of the weights that read each feature of a block [f]."""
    weight = model.get_submodule(block.reader).weight.detach()
    return weight.square().transpose(0, 1).flatten(1).sum(1)
