"""Surgery: units removed for good. Layers get smaller, and a whole sub-layer becomes a constant."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import KeptUnits
from mmcompress.models.base import Model, TokenSelector
from mmcompress.models.device import CPU
from mmcompress.models.layouts import refresh_sizes_
from mmcompress.models.replacements import REPLACEMENTS, ConstantOutput
from mmcompress.prune.masks import list_feature_indices, list_writer_rows

Units = Mapping[str, Tensor]
"""Sorted indices of the units to keep, by block. A block that is not listed stays whole."""


def keep_out_features_(module: nn.Module, index: Tensor) -> None:
    """Keep some outputs of a linear layer or convolution, in place."""
    _index_tensors_(module, ("weight", "bias"), index=index)
    size_name = "out_features" if isinstance(module, nn.Linear) else "out_channels"
    setattr(module, size_name, len(index))


def keep_in_features_(module: nn.Module, index: Tensor) -> None:
    """Keep some inputs of a linear layer or convolution, in place."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    kept_weight = weight.detach()[:, index].clone()
    module.weight = nn.Parameter(kept_weight)
    size_name = "in_features" if isinstance(module, nn.Linear) else "in_channels"
    setattr(module, size_name, len(index))


def keep_channels_(module: nn.Module, index: Tensor) -> None:
    """Keep some features of a batch norm or depthwise convolution, in place."""
    if isinstance(module, nn.Conv2d):
        keep_out_features_(module, index)
        # Depthwise: each channel is a group of its own.
        module.in_channels = len(index)
        module.groups = len(index)
        return
    _index_tensors_(module, ("weight", "bias", "running_mean", "running_var"), index=index)
    size_name = "num_features"
    setattr(module, size_name, len(index))


def _index_tensors_(module: nn.Module, names: tuple[str, ...], *, index: Tensor) -> None:
    """Replace tensors of a module by their rows at some indices; never change one in place.

    Other modules may share it (a tied embedding).
    """
    for name in names:
        value = getattr(module, name)
        if isinstance(value, nn.Parameter):
            kept_rows = value.detach()[index].clone()
            setattr(module, name, nn.Parameter(kept_rows))
        elif value is not None:
            # A buffer, such as the running mean of a batch norm.
            setattr(module, name, value[index].clone())


def remove_units_(model: Model, kept: Units) -> Model:
    """Remove the units that are not kept, in place.

    Weights that other modules share (a tied embedding) are replaced, never changed.

    Args:
        model: The model.
        kept: Units to keep, by block.

    Returns:
        The same model.

    Raises:
        ValueError: A block can't lose these units.
    """
    blocks: list[Block] = []
    for block in model.blocks:
        if block.name not in kept:
            blocks.append(block)
            continue
        smaller_block = _cut_block_(model, block, units=kept[block.name].long())
        if smaller_block is not None:
            blocks.append(smaller_block)
    model.blocks = tuple(blocks)
    return model


def _cut_block_(model: Model, block: Block, *, units: Tensor) -> Block | None:
    """Keep some units of a block; returns the smaller block, None when nothing is left of it."""
    count = len(units)
    if count < block.min_units:
        raise ValueError(f"{block.name} can't be removed whole: at least {block.min_units} stay")
    if block.prefix_only and count > 0 and int(units[-1]) != count - 1:
        raise ValueError(f"{block.name} can lose units from its end only")
    if count == 0:
        _drop_block_(model, block)
        return None
    if count == block.units:
        return block
    if block.group == "tokens":
        # Positions have no weights: the selector only passes on fewer.
        selector = model.get_submodule(block.reader)
        assert isinstance(selector, TokenSelector)
        selector.keep_positions_(units)
    else:
        _slice_layers_(model, block, units=units)
    return dataclasses.replace(block, units=count)


def _drop_block_(model: Model, block: Block) -> None:
    """Replace the modules of a block by constants, which start as the bias of its reader."""
    reader = model.get_linear(block.reader)
    bias = reader.bias
    if bias is None:
        bias = reader.weight.new_zeros(reader.out_features)
    for path, mode in block.drop:
        make_replacement = REPLACEMENTS[mode]
        model.set_submodule(path, make_replacement(bias))


def _slice_layers_(model: Model, block: Block, *, units: Tensor) -> None:
    """Keep the rows and columns of some units in all layers of a block."""
    features = list_feature_indices(block, units)
    for writer in block.writers:
        rows = list_writer_rows(block, writer, units=units)
        keep_out_features_(model.get_submodule(writer.path), rows)
    for path in block.per_channel:
        # Modules between writers and readers treat each feature alone: batch norms, for example.
        keep_channels_(model.get_submodule(path), features)
    for path in (block.reader, *block.extra_readers):
        keep_in_features_(model.get_submodule(path), features)
    if block.group == "heads":
        # Libraries keep the number of heads as an attribute beside the weights.
        refresh_sizes_(model.get_submodule(block.module), len(units), width=block.width)


def copy_without_units(model: Model, kept: Units) -> Model:
    """Return a copy of a model that has only the units in `kept`; see `remove_units_`."""
    smaller = copy.deepcopy(model)
    return remove_units_(smaller, kept)


def restore_units(model: Model, small: Model, *, kept: Units) -> Model:
    """Put the weights of a pruned model back to their places in the dense one.

    What replaced a removed sub-layer has no place there.

    Args:
        model: The dense model. It is not changed.
        small: What was cut out of it, and trained since.
        kept: The units that were kept, by block.

    Returns:
        A copy of the dense model with the weights of the small one.
    """
    places = _number_weights(model)
    remove_units_(places, kept)
    constant_names = {
        f"{path}.bias"
        for path, module in places.named_modules()
        if isinstance(module, ConstantOutput)
    }
    trained_weights = dict(small.named_parameters())
    numbers_by_name = dict(places.named_parameters())
    whole_model = copy.deepcopy(model)
    # A name may be missing on either side: blocks that were dropped have no weights left.
    for name, parameter in whole_model.named_parameters():
        is_left = name in trained_weights and name in numbers_by_name
        if not is_left or name in constant_names:
            continue
        numbers = numbers_by_name[name].detach()
        trained_weight = trained_weights[name].detach()
        flat_weight = parameter.detach().flatten().clone()
        flat_weight[numbers.flatten().long()] = trained_weight.flatten()
        parameter.data = flat_weight.view(parameter.shape)
    return whole_model


@torch.no_grad()
def copy_constants_(model: Model, trained: Model) -> None:
    """Copy what stands in for dropped sub-layers from one pruned model to another, in place.

    Args:
        model: The model that is changed.
        trained: The model that the constants come from. A sub-layer that it still has is left out.
    """
    trained_modules = dict(trained.named_modules())
    for path, module in model.named_modules():
        source = trained_modules.get(path)
        if isinstance(module, ConstantOutput) and isinstance(source, ConstantOutput):
            module.load_state_dict(source.state_dict())


def _number_weights(model: Model) -> Model:
    """Return a copy whose weights hold their own index: after a cut, it tells what is where."""
    numbered = copy.deepcopy(model).to(CPU)
    for parameter in numbered.parameters():
        # Double precision holds every index exactly.
        indices = torch.arange(parameter.numel(), dtype=torch.float64, device=CPU)
        parameter.data = indices.view(parameter.shape)
    return numbered


def resize_model_(model: Model, kept: KeptUnits) -> Model:
    """Give a dense model the structure of a pruned one, ready to load its weights.

    Args:
        model: The model; it is changed in place.
        kept: How many units stay, by block.

    Returns:
        The same model.
    """
    units = {name: torch.arange(count, device=CPU) for name, count in kept.items()}
    return remove_units_(model, units)


def copy_resized(model: Model, kept: KeptUnits) -> Model:
    """Return a copy with the first units of each block: for what depends on shapes only."""
    smaller = copy.deepcopy(model)
    return resize_model_(smaller, kept).eval()
