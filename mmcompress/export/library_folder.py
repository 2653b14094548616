"""A pruned model as a checkpoint that its own library loads.

The checkpoint is that of the dense model, with zeros where units were cut
(`mmcompress.prune.padding`). Where all feed-forward blocks lost units, they are as small as the
largest of them, if the library's configuration has a number for it. The folder is loaded and
compared with the pruned model before it is called done.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcompress.errors import ModelError
from mmcompress.export.family_contract import make_random_inputs
from mmcompress.export.proofs import (
    EXPORT_BOUND,
    compare_tensors,
    compute_outputs,
    make_proof,
    require_proofs,
)
from mmcompress.export.weight_places import (
    WeightPlaces,
    find_weight_places,
    list_weight_tensors,
    read_checkpoint_tensors,
    write_checkpoint_tensors,
)
from mmcompress.graph.blocks import Block
from mmcompress.models.base import Model
from mmcompress.models.sources import fetch_folder, load_model, locate_node_source
from mmcompress.prune.masks import list_feature_indices, list_writer_rows
from mmcompress.prune.padding import pad_to_dense
from mmcompress.results.records import Proof
from mmcompress.spec.schema import Node

SIZES_FILE = "config.json"
"""Where transformers keeps the sizes of a model."""

FEED_FORWARD_KEYS = (
    "intermediate_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "ffn_dim",
)
"""Names that configurations of transformers have for the feed-forward size."""

PROVED_SAMPLES = 3
"""Random inputs that the folder and the pruned model are compared on."""


@dataclass(frozen=True, kw_only=True)
class PrunedNode:
    """A node with its model before and after pruning."""

    name: str
    """The node."""
    node: Node
    """What the spec says of it."""
    dense: Model
    """The model that was pruned."""
    pruned: Model
    """What was made of it."""
    kept: Mapping[str, int]
    """How many units were kept, by block."""


def find_library_folder(node: Node) -> tuple[Path, str]:
    """Find the checkpoint of a node, and what stands before a folder in its source.

    Raises:
        ModelError: It is no folder: a module of the user's own, or a name of open_clip's list.
    """
    location = locate_node_source(node)
    folder = fetch_folder(location)
    if folder is None:
        raise ModelError(
            f"source '{node.source}': no folder of a library that a pruned checkpoint could take "
            "after; mmcompress.load_modules gives its torch module"
        )
    scheme = "" if location.library == "transformers" else "open_clip:local-dir:"
    return folder, scheme


def write_library_folder(source: Path, folder: Path, *, pruned: PrunedNode, scheme: str) -> Proof:
    """Write a checkpoint that the library of a node loads, and that answers as its pruned model.

    Args:
        source: The checkpoint of the dense model, or one that another node was written to.
        folder: The folder to write; it must not exist.
        pruned: The node.
        scheme: What stands before a folder in a source.

    Returns:
        The proof that the folder answers as the pruned model.

    Raises:
        ModelError: The library's layers can't express the structure.
        ProofFailed: The folder answers otherwise.
    """
    places = find_weight_places(source, pruned.node, scheme=scheme)
    padded = pad_to_dense(pruned.dense, pruned.pruned, kept=pruned.kept)
    checkpoint = read_checkpoint_tensors(source)
    pruned = replace(pruned, pruned=_round_like(checkpoint, pruned.pruned))
    _write_weights(checkpoint, padded, dense=pruned.dense, places=places)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    saved_node = replace(pruned.node, source=f"{scheme}{folder}")
    write_checkpoint_tensors(checkpoint, folder)
    for blocks in _group_feed_forward(pruned):
        smaller = _cut_feed_forward(checkpoint, pruned, places=places, blocks=blocks)
        if smaller and _write_smaller(
            smaller, folder, pruned=pruned, blocks=blocks, node=saved_node
        ):
            checkpoint = smaller
        else:
            write_checkpoint_tensors(checkpoint, folder)
    proof = _compare(load_model(saved_node), pruned)
    require_proofs([proof])
    return proof


def _round_like(checkpoint: Mapping[str, Mapping[str, Tensor]], model: Model) -> Model:
    """Return a model whose weights have lost what a checkpoint in half precision can't hold."""
    types = {checkpoint[file][name].dtype for file, name in list_weight_tensors(checkpoint)}
    if len(types) != 1:
        return model
    return copy.deepcopy(model).to(types.pop()).float()


def _compare(loaded: Model, pruned: PrunedNode) -> Proof:
    """Compare a loaded folder with the pruned model."""
    inputs = make_random_inputs(pruned.pruned, PROVED_SAMPLES)
    with torch.no_grad():
        expected = compute_outputs(pruned.pruned, inputs)
        actual = compute_outputs(loaded, inputs)
    difference = max(
        compare_tensors(want, have) for want, have in zip(expected, actual, strict=True)
    )
    return make_proof("library == pruned", pruned.name, difference=difference, bound=EXPORT_BOUND)


def _write_weights(
    checkpoint: dict[str, dict[str, Tensor]],
    padded: Model,
    *,
    dense: Model,
    places: Mapping[str, WeightPlaces],
) -> None:
    """Write the weights of a model to their places in a checkpoint, in place.

    Raises:
        ModelError: A trained weight has no place, or two that differ have the same.
    """
    names = list_weight_tensors(checkpoint)
    dense_tensors = dict(_list_tensors(dense))
    written: list[tuple[str, Tensor, WeightPlaces]] = []
    for name, tensor in _list_tensors(padded):
        values = tensor.detach().flatten()
        place = places[name]
        has_place = place.tensors >= 0
        unchanged = values == dense_tensors[name].detach().flatten()
        if not (has_place | unchanged).all():
            raise ModelError(
                f"{name}: it was trained, and its library computes it of something else"
            )
        for number in place.tensors[has_place].unique().tolist():
            file, key = names[number]
            is_here = place.tensors == number
            flat = checkpoint[file][key].flatten().clone()
            flat[place.positions[is_here]] = values[is_here].to(flat.dtype)
            checkpoint[file][key] = flat.view(checkpoint[file][key].shape)
        written.append((name, values, place))
    for name, values, place in written:
        for number in place.tensors[place.tensors >= 0].unique().tolist():
            file, key = names[number]
            is_here = place.tensors == number
            stored = checkpoint[file][key].flatten()[place.positions[is_here]]
            if not torch.equal(stored, values[is_here].to(stored.dtype)):
                raise ModelError(
                    f"{name}: layers that share '{key}' in the library were trained apart"
                )


def _list_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the parameters and buffers that hold weights, by name."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            yield name, tensor


def _group_feed_forward(pruned: PrunedNode) -> list[list[Block]]:
    """Group the feed-forward blocks by their size, where no block of a group kept all of it."""
    groups: dict[int, list[Block]] = {}
    for block in pruned.dense.blocks:
        if block.kind.endswith("ffn"):
            groups.setdefault(block.units, []).append(block)
    return [blocks for size, blocks in groups.items() if 0 < _find_most_kept(pruned, blocks) < size]


def _find_most_kept(pruned: PrunedNode, blocks: Sequence[Block]) -> int:
    """Find the most units that one of some blocks kept."""
    return max(pruned.kept[block.name] for block in blocks)


def _write_smaller(
    smaller: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    *,
    pruned: PrunedNode,
    blocks: Sequence[Block],
    node: Node,
) -> bool:
    """Write a checkpoint with a smaller feed-forward size, and the number in its configuration.

    Returns:
        Whether the library has such a number, and loads and answers with it.
    """
    config_path = folder / SIZES_FILE
    if not config_path.is_file():
        return False
    text = config_path.read_text(encoding="utf-8")
    write_checkpoint_tensors(smaller, folder)
    for path in _list_size_paths(json.loads(text), blocks[0].units):
        config = json.loads(text)
        _set_value(config, path, value=_find_most_kept(pruned, blocks))
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        try:
            if _compare(load_model(node), pruned).passed:
                return True
        except ModelError:
            # The number is that of another part of the model.
            continue
    config_path.write_text(text, encoding="utf-8")
    return False


def _cut_feed_forward(
    checkpoint: Mapping[str, Mapping[str, Tensor]],
    pruned: PrunedNode,
    *,
    places: Mapping[str, WeightPlaces],
    blocks: Sequence[Block],
) -> dict[str, dict[str, Tensor]] | None:
    """Cut what none of some feed-forward blocks keeps out of a checkpoint.

    Returns:
        The smaller tensors; None where they are no rows or columns of the library's.
    """
    names = list_weight_tensors(checkpoint)
    masks: dict[int, Tensor] = {}
    for name, elements in _list_cut_elements(pruned, blocks):
        place = places[name]
        for number in place.tensors[elements].unique().tolist():
            file, key = names[number]
            mask = masks.setdefault(
                number, torch.zeros(checkpoint[file][key].numel(), dtype=torch.bool)
            )
            mask[place.positions[elements][place.tensors[elements] == number]] = True
    smaller = {file: dict(tensors) for file, tensors in checkpoint.items()}
    for number, mask in masks.items():
        file, key = names[number]
        tensor = checkpoint[file][key]
        cut = _cut_slices(tensor, mask.view(tensor.shape))
        if cut is None:
            return None
        smaller[file][key] = cut
    return smaller


def _list_cut_elements(pruned: PrunedNode, blocks: Sequence[Block]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over (name, mask [elements]) of the tensors that get smaller."""
    tensors = dict(_list_tensors(pruned.dense))
    most_kept = _find_most_kept(pruned, blocks)
    for block in blocks:
        rest = torch.arange(most_kept, block.units)
        for writer in block.writers:
            rows = list_writer_rows(block, writer, units=rest)
            for attribute in ("weight", "bias"):
                tensor = tensors.get(f"{writer.path}.{attribute}")
                if tensor is not None:
                    mask = torch.zeros(tensor.shape, dtype=torch.bool)
                    mask[rows] = True
                    yield f"{writer.path}.{attribute}", mask.flatten()
        for path in (block.reader, *block.extra_readers):
            mask = torch.zeros(tensors[f"{path}.weight"].shape, dtype=torch.bool)
            mask[:, list_feature_indices(block, rest)] = True
            yield f"{path}.weight", mask.flatten()


def _cut_slices(tensor: Tensor, mask: Tensor) -> Tensor | None:
    """Cut a tensor along the axis whose whole slices a mask marks; None where there is none."""
    for axis in range(tensor.ndim):
        slices = mask.movedim(axis, 0).flatten(1) if tensor.ndim > 1 else mask[:, None]
        is_cut = slices.all(1)
        if torch.equal(slices, is_cut[:, None].expand_as(slices)):
            kept = (~is_cut).nonzero().flatten()
            return tensor.index_select(axis, kept)
    return None


def _list_size_paths(
    config: Any, size: int, *, path: tuple[str, ...] = ()
) -> Iterator[Sequence[str]]:
    """Iterate over the places of a configuration where a feed-forward size may stand."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        # GPT-2 takes four times the width where none is given.
        if key in FEED_FORWARD_KEYS and value in (size, None):
            yield (*path, key)
        yield from _list_size_paths(value, size, path=(*path, key))


def _set_value(config: dict[str, Any], path: Sequence[str], *, value: int) -> None:
    """Set a value of a nested configuration, in place."""
    *outer, last = path
    for key in outer:
        config = config[key]
    config[last] = value
