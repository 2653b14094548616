"""A pruned model in the sizes of the dense one: zeros take the place of what was cut.

Libraries know one number of heads and one feed-forward size for all layers, and no layer without a
sub-layer. With zeros in the place of units, their own classes compute what a pruned model does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block
from mmcompress.models.base import Model
from mmcompress.models.replacements import ConstantOutput
from mmcompress.prune.masks import list_feature_indices, list_writer_rows


@dataclass(kw_only=True)
class _KeptIndices:
    """Where the features that a pruned layer has stand in the dense layer."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Rows of the weight, by the path of the layer."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Columns of the weight, by the path of the layer."""


@torch.no_grad()
def pad_to_dense(dense: Model, pruned: Model, *, kept: Mapping[str, int]) -> Model:
    """Return a model of the dense sizes that computes what a pruned one does.

    The kept units of a block come first, and zeros after them. Nothing reads a unit of zeros. The
    constant of a removed sub-layer becomes the bias of its output projection.

    Args:
        dense: The model that was pruned; it is not changed.
        pruned: What was made of it.
        kept: How many units were kept, by block.

    Raises:
        ModelError: The dense layers can't express it.
    """
    indices = _KeptIndices()
    for block in dense.blocks:
        if kept[block.name] < block.units:
            _note_kept_indices(block, kept[block.name], indices=indices)
    padded = copy.deepcopy(dense)
    pruned_tensors = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    for name, tensor in [*padded.named_parameters(), *padded.named_buffers()]:
        path, _, attribute = name.rpartition(".")
        rows = indices.outputs.get(path)
        columns = indices.inputs.get(path) if attribute == "weight" else None
        source = pruned_tensors.get(name)
        if rows is None and columns is None:
            if source is not None and source.shape == tensor.shape:
                tensor.copy_(source)
            continue
        tensor.zero_()
        if source is not None and source.numel():
            _place(tensor, source, rows=rows, columns=columns)
    for block in dense.blocks:
        if kept[block.name] == 0:
            _place_constant(padded, pruned, block=block)
    return padded


def _note_kept_indices(block: Block, count: int, *, indices: _KeptIndices) -> None:
    """Note which features the layers of a block keep, when its first units are the kept ones."""
    if block.group == "tokens":
        raise ModelError(
            f"{block.name}: positions were cut, and the library reads all of them. A search space "
            "without the dimension prune.tokens of this node cuts none"
        )
    first_units = torch.arange(count)
    features = list_feature_indices(block, first_units)
    for writer in block.writers:
        indices.outputs[writer.path] = list_writer_rows(block, writer, units=first_units)
    for path in block.per_channel:
        indices.outputs[path] = features
    for path in (block.reader, *block.extra_readers):
        indices.inputs[path] = features


def _place(tensor: Tensor, source: Tensor, *, rows: Tensor | None, columns: Tensor | None) -> None:
    """Copy a smaller tensor to some rows and columns of a larger one, in place."""
    if rows is None:
        rows = torch.arange(tensor.shape[0])
    if columns is None:
        tensor[rows] = source
    else:
        tensor[rows[:, None], columns[None, :]] = source


def _place_constant(padded: Model, pruned: Model, *, block: Block) -> None:
    """Make the constant of a removed sub-layer the bias of its output projection, in place."""
    path = next(path for path, mode in block.drop if not mode.startswith("skip"))
    replacement = pruned.get_submodule(path)
    assert isinstance(replacement, ConstantOutput)
    bias = padded.get_linear(block.reader).bias
    if bias is not None:
        bias.copy_(replacement.bias)
    elif replacement.bias.any():
        raise ModelError(
            f"{block.name}: it was removed, and its layers have no bias for the mean of its output"
        )
