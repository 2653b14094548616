"""Finds where the weights of a loaded model stand in the checkpoint that it was loaded from.

Families split, join and transpose the tensors of their libraries. So nothing is assumed about
names: the checkpoint is loaded again and again with numbers in place of its weights. What a layer
then holds says where it came from.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcompress.models.base import Model
from mmcompress.models.sources import load_model
from mmcompress.spec.schema import Node

DIGIT_BASE = 256
"""Numbers are loaded digit by digit: all whole numbers up to 256 are exact in bfloat16, too."""

Checkpoint = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the path of their file within the folder, and by name."""


@dataclass(frozen=True, kw_only=True)
class WeightPlaces:
    """Where the elements of one parameter or buffer stand in the checkpoint."""

    tensors: Tensor
    """Number of the tensor in `list_weight_tensors` [elements]; -1 where an element is none of the
    checkpoint's."""
    positions: Tensor
    """Index into the flattened tensor [elements]."""


def read_checkpoint_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read all tensors of a folder.

    Args:
        folder: The folder; files in folders within it are read too.

    Returns:
        Tensors by file and name.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors[path.relative_to(folder).as_posix()] = load_file(path)
    return tensors


def list_weight_tensors(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """List (file, name) of the tensors that hold weights, not whole numbers such as positions."""
    return [
        (file, name)
        for file, tensors in checkpoint.items()
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    ]


def find_weight_places(folder: Path, node: Node, *, scheme: str) -> dict[str, WeightPlaces]:
    """Find where every parameter and buffer of a node's model stands in a checkpoint.

    Args:
        folder: The folder of the checkpoint.
        node: The node that loads it.
        scheme: What stands before the folder in a source: `transformers:`, or nothing.

    Returns:
        The places, by the name of the parameter or buffer.

    Raises:
        ModelError: The folder can't be loaded.
    """
    checkpoint = read_checkpoint_tensors(folder)
    tensor_count = len(list_weight_tensors(checkpoint))
    largest = max(tensor.numel() for tensors in checkpoint.values() for tensor in tensors.values())

    def number_tensor(number: int, tensor: Tensor) -> Tensor:
        return torch.full(tensor.shape, float(number), dtype=torch.float64)

    def number_backwards(number: int, tensor: Tensor) -> Tensor:
        return torch.full(tensor.shape, float(tensor_count - number), dtype=torch.float64)

    def load(number: Callable[[int, Tensor], Tensor], limit: int) -> dict[str, Tensor]:
        return _load_numbers(folder, node, scheme=scheme, limit=limit, number=number)

    tensors = load(number_tensor, tensor_count)
    backwards = load(number_backwards, tensor_count)
    positions = load(_number_elements, largest)
    places: dict[str, WeightPlaces] = {}
    for name, numbers in tensors.items():
        # A constant of the library is the same each time, whatever the checkpoint holds.
        is_known = numbers + backwards[name] == tensor_count
        for values in (numbers, positions[name]):
            is_known &= (values >= 0) & (values == values.round())
        places[name] = WeightPlaces(
            tensors=torch.where(is_known, numbers, -1).long(),
            positions=torch.where(is_known, positions[name], 0).long(),
        )
    return places


def _number_elements(number: int, tensor: Tensor) -> Tensor:
    """Give every element of a tensor its own index."""
    return torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def _load_numbers(
    folder: Path,
    node: Node,
    *,
    scheme: str,
    limit: int,
    number: Callable[[int, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Load a checkpoint of numbers, one digit at a time.

    Returns:
        The numbers [elements] of every parameter and buffer, in float64.
    """
    numbers: dict[str, Tensor] = {}
    place_value = 1
    while place_value <= limit:
        model = _load_digit(folder, node, scheme=scheme, place_value=place_value, number=number)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            digit = place_value * tensor.detach().double().flatten()
            numbers[name] = numbers[name] + digit if name in numbers else digit
        place_value *= DIGIT_BASE
    return numbers


def _load_digit(
    folder: Path,
    node: Node,
    *,
    scheme: str,
    place_value: int,
    number: Callable[[int, Tensor], Tensor],
) -> Model:
    """Load a copy of a checkpoint whose weights are one digit of their numbers."""
    checkpoint = read_checkpoint_tensors(folder)
    numbered: dict[str, dict[str, Tensor]] = {file: dict(of) for file, of in checkpoint.items()}
    for i, (file, name) in enumerate(list_weight_tensors(checkpoint)):
        digits = (number(i, checkpoint[file][name]) // place_value) % DIGIT_BASE
        numbered[file][name] = digits.float()
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch) / folder.name
        shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("*.safetensors"))
        write_checkpoint_tensors(numbered, copied)
        return load_model(replace(node, source=f"{scheme}{copied}"))


def write_checkpoint_tensors(checkpoint: Checkpoint, folder: Path) -> None:
    """Write tensors to the files that they stand in."""
    for file, tensors in checkpoint.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # Transformers asks every file which library wrote its tensors.
        save_file(whole, path, metadata={"format": "pt"})
