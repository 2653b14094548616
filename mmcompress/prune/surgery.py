"""Removing units for good: smaller linear layers, whole sub-layers replaced by a constant."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import KeptUnits
from mmcompress.models.base import Model
from mmcompress.models.layouts import refresh_sizes_
from mmcompress.models.replacements import REPLACEMENTS, ConstantOutput
from mmcompress.prune.masks import feature_indices, writer_rows

Units = Mapping[str, Tensor]
"""Sorted unit indices to keep, by block."""


def _keep_(module: nn.Module, names: tuple[str, ...], *, index: Tensor) -> None:
    for name in names:
        value = getattr(module, name)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(value.detach()[index].clone()))
        elif value is not None:
            setattr(module, name, value[index].clone())


def keep_out_features_(module: nn.Module, index: Tensor) -> None:
    """Keep some outputs of a linear layer or convolution, in place."""
    _keep_(module, ("weight", "bias"), index=index)
    setattr(module, "out_features" if isinstance(module, nn.Linear) else "out_channels", len(index))


def keep_in_features_(module: nn.Module, index: Tensor) -> None:
    """Keep some inputs of a linear layer or convolution, in place."""
    module.weight = nn.Parameter(module.weight.detach()[:, index].clone())
    setattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels", len(index))


def keep_channels_(module: nn.Module, index: Tensor) -> None:
    """Keep some features of a batch norm or depthwise convolution, in place."""
    if isinstance(module, nn.Conv2d):
        keep_out_features_(module, index)
        module.in_channels = module.groups = len(index)
        return
    _keep_(module, ("weight", "bias", "running_mean", "running_var"), index=index)
    module.num_features = len(index)  # type: ignore[assignment]


def _slice_block_(model: Model, block: Block, *, units: Tensor) -> Block | None:
    if len(units) < block.min_units:
        raise ValueError(f"{block.name} can't be removed whole")
    if block.prefix_only and len(units) and int(units[-1]) != len(units) - 1:
        raise ValueError(f"{block.name} loses units from its end alone")
    if len(units) == 0:
        out = model.get_linear(block.reader)
        bias = out.bias if out.bias is not None else torch.zeros(out.out_features)
        for path, mode in block.drop:
            model.set_submodule(path, REPLACEMENTS[mode](bias))
        return None
    if len(units) == block.units:
        return block
    if block.group == "tokens":
        model.get_submodule(block.reader).keep_positions_(units)
        return dataclasses.replace(block, units=len(units))
    for w in block.writers:
        keep_out_features_(model.get_submodule(w.path), writer_rows(block, w, units=units))
    for path in block.per_channel:
        keep_channels_(model.get_submodule(path), feature_indices(block, units))
    for path in (block.reader, *block.extra_readers):
        keep_in_features_(model.get_submodule(path), feature_indices(block, units))
    if block.group == "heads":
        refresh_sizes_(model.get_submodule(block.module), len(units), width=block.width)
    return dataclasses.replace(block, units=len(units))


def remove_units_(model: Model, kept: Units) -> Model:
    """Remove in place every unit not named in `kept` (blocks not named stay whole). Returns `model`.

    Weights that other modules share (a tied embedding) are replaced, never changed.
    """
    blocks = []
    for block in model.blocks:
        new = (
            _slice_block_(model, block, units=kept[block.name].long())
            if block.name in kept
            else block
        )
        if new is not None:
            blocks.append(new)
    model.blocks = tuple(blocks)
    return model


def copy_without_units(model: Model, kept: Units) -> Model:
    """A copy of `model` without the removed units."""
    return remove_units_(copy.deepcopy(model), kept)


def restore_units(model: Model, small: Model, *, kept: Units) -> Model:
    """A copy of `model` with the weights of `small`, which was cut out of it and trained since, each in its place.

    What stands in for a removed sub-layer has none.
    """
    places, whole = copy.deepcopy(model), copy.deepcopy(model)
    for p in places.parameters():
        p.data = torch.arange(p.numel(), dtype=torch.float64).view(
            p.shape
        )  # cut as the weights were
    remove_units_(places, kept)
    standing = {f"{at}.bias" for at, m in places.named_modules() if isinstance(m, ConstantOutput)}
    trained, of = dict(small.named_parameters()), dict(places.named_parameters())
    for name, p in whole.named_parameters():
        if name in trained and name in of and name not in standing:
            flat = p.detach().flatten().clone()
            flat[of[name].detach().flatten().long()] = trained[name].detach().flatten()
            p.data = flat.view(p.shape)
    return whole


def resize_(model: Model, kept: KeptUnits) -> Model:
    """Give a freshly loaded dense model the structure of a pruned one, ready for its weights."""
    return remove_units_(model, {name: torch.arange(count) for name, count in kept.items()})


def copy_resized(model: Model, kept: KeptUnits) -> Model:
    """A copy of that structure, whichever units are left: for what depends on shapes alone."""
    return resize_(copy.deepcopy(model), kept).eval()
