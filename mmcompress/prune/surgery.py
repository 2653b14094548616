"""Removing units for good: smaller linear layers, whole sub-layers replaced by a constant."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmcompress.models.adapters import refresh_
from mmcompress.models.base import STANDINS, Constant, Model
from mmcompress.prune.masks import features, writer_rows
from mmcompress.records import Block, Kept

Units = Mapping[str, Tensor]
"""Sorted unit indices to keep, by block."""


def _keep_(module: nn.Module, names: tuple[str, ...], index: Tensor) -> None:
    for name in names:
        value = getattr(module, name)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(value.detach()[index].clone()))
        elif value is not None:
            setattr(module, name, value[index].clone())


def rows_(module: nn.Module, index: Tensor) -> None:
    """Keep some outputs of a linear layer or convolution, in place."""
    _keep_(module, ("weight", "bias"), index)
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", len(index))


def columns_(module: nn.Module, index: Tensor) -> None:
    """Keep some inputs of a linear layer or convolution, in place."""
    module.weight = nn.Parameter(module.weight.detach()[:, index].clone())
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", len(index))


def through_(module: nn.Module, index: Tensor) -> None:
    """Keep some features of a batch norm or depthwise convolution, in place."""
    if isinstance(module, nn.Conv2d):
        rows_(module, index)
        module.in_channels = module.groups = len(index)
        return
    _keep_(module, ("weight", "bias", "running_mean", "running_var"), index)
    module.num_features = len(index)  # type: ignore[assignment]


def _slice_block_(model: Model, block: Block, units: Tensor) -> Block | None:
    if len(units) < block.least:
        raise ValueError(f"{block.name} can't be removed whole")
    if block.ordered and len(units) and int(units[-1]) != len(units) - 1:
        raise ValueError(f"{block.name} loses units from its end alone")
    if len(units) == 0:
        out = model.linear(block.out)
        bias = out.bias if out.bias is not None else torch.zeros(out.out_features)
        for path, mode in block.drop:
            model.set_submodule(path, STANDINS[mode](bias))
        return None
    if len(units) == block.units:
        return block
    if block.group == "tokens":
        model.get_submodule(block.out).keep_(units)
        return dataclasses.replace(block, units=len(units))
    for w in block.writers:
        rows_(model.get_submodule(w.path), writer_rows(block, w, units))
    for path in block.through:
        through_(model.get_submodule(path), features(block, units))
    for path in (block.out, *block.also):
        columns_(model.get_submodule(path), features(block, units))
    if block.group == "heads":
        refresh_(model.get_submodule(block.module), len(units), block.width)
    return dataclasses.replace(block, units=len(units))


def slice_(model: Model, kept: Units) -> Model:
    """Remove in place every unit not named in `kept` (blocks not named stay whole). Returns `model`.

    Weights that other modules share (a tied embedding) are replaced, never changed.
    """
    blocks = []
    for block in model.blocks:
        new = _slice_block_(model, block, kept[block.name].long()) if block.name in kept else block
        if new is not None:
            blocks.append(new)
    model.blocks = tuple(blocks)
    return model


def sliced(model: Model, kept: Units) -> Model:
    """A copy of `model` without the removed units."""
    return slice_(copy.deepcopy(model), kept)


def restored(model: Model, small: Model, kept: Units) -> Model:
    """A copy of `model` with the weights of `small`, which was cut out of it and trained since, each in its place.

    What stands in for a removed sub-layer has none.
    """
    places, whole = copy.deepcopy(model), copy.deepcopy(model)
    for p in places.parameters():
        p.data = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)  # cut as the weights were
    slice_(places, kept)
    standing = {f"{at}.bias" for at, m in places.named_modules() if isinstance(m, Constant)}
    trained, of = dict(small.named_parameters()), dict(places.named_parameters())
    for name, p in whole.named_parameters():
        if name in trained and name in of and name not in standing:
            flat = p.detach().flatten().clone()
            flat[of[name].detach().flatten().long()] = trained[name].detach().flatten()
            p.data = flat.view(p.shape)
    return whole


def reshape_(model: Model, kept: Kept) -> Model:
    """Give a freshly loaded dense model the structure of a pruned one, ready for its weights."""
    return slice_(model, {name: torch.arange(count) for name, count in kept.items()})


def resized(model: Model, kept: Kept) -> Model:
    """A copy of that structure, whichever units are left: for what depends on shapes alone."""
    return reshape_(copy.deepcopy(model), kept).eval()
