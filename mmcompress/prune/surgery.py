"""Removing units for good: smaller linear layers, whole sub-layers replaced by a constant."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmcompress.models.adapters import refresh_
from mmcompress.models.base import STANDINS, Model
from mmcompress.prune.masks import features, writer_rows
from mmcompress.records import Block, Kept

Units = Mapping[str, Tensor]
"""Sorted unit indices to keep, by block."""


def _rows(linear: nn.Linear, index: Tensor) -> nn.Linear:
    new = nn.Linear(linear.in_features, len(index), bias=linear.bias is not None)
    new.weight = nn.Parameter(linear.weight.detach()[index].clone())
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach()[index].clone())
    return new


def _columns(linear: nn.Linear, index: Tensor) -> nn.Linear:
    new = nn.Linear(len(index), linear.out_features, bias=linear.bias is not None)
    new.weight = nn.Parameter(linear.weight.detach()[:, index].clone())
    if linear.bias is not None:
        new.bias = nn.Parameter(linear.bias.detach().clone())
    return new


def _slice_block_(model: Model, block: Block, units: Tensor) -> Block | None:
    if len(units) < block.least:
        raise ValueError(f"{block.name} can't be removed whole")
    if len(units) == 0:
        out = model.linear(block.out)
        bias = out.bias if out.bias is not None else torch.zeros(out.out_features)
        for path, mode in block.drop:
            model.set_submodule(path, STANDINS[mode](bias))
        return None
    if len(units) == block.units:
        return block
    for w in block.writers:
        model.set_submodule(w.path, _rows(model.linear(w.path), writer_rows(block, w, units)))
    model.set_submodule(block.out, _columns(model.linear(block.out), features(block, units)))
    if block.group == "heads":
        refresh_(model.get_submodule(block.module), len(units), block.width)
    return dataclasses.replace(block, units=len(units))


def slice_(model: Model, kept: Units) -> Model:
    """Remove in place every unit not named in `kept` (blocks not named stay whole). Returns `model`."""
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


def reshape_(model: Model, kept: Kept) -> Model:
    """Give a freshly loaded dense model the structure of a pruned one, ready for its weights."""
    return slice_(model, {name: torch.arange(count) for name, count in kept.items()})
