"""Outputs of the teacher on disk: a run asks for the same draws of pairs again and again.

All trainings of a run draw the same pairs in the same order. These are the search for a learning
rate, short trainings, and the training of every artifact. The teacher's pass takes about half of a
training step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcompress.errors import DiskFull
from mmcompress.kinds.base import Outputs
from mmcompress.storage import replace_file

LARGEST_HALF = 60_000.0
"""Largest value that is kept in half precision, whose own limit is 65,504."""

NAME_SEPARATOR = "/"
"""Stands between the node and the output in the name of a tensor."""


@dataclass(kw_only=True)
class TeacherStore:
    """A folder with a file of outputs for every draw, in half precision.

    What is read differs from what was computed by the rounding. So a training reads what it has
    just written, too: it ends the same way whether a draw was known or not.
    """

    folder: Path
    """Where the files are."""
    max_bytes: int
    """Bytes that all files may take together. Draws beyond them are computed each time."""
    used_bytes: int = field(init=False, default=0)
    """Bytes that they take now."""

    def __post_init__(self) -> None:
        files = list(self.folder.glob("*.safetensors"))
        self.used_bytes = sum(file.stat().st_size for file in files)

    def read(self, draw: str) -> Outputs | None:
        """Return the outputs of a draw in float32; None where they are not kept.

        A damaged file is removed and counts as none.
        """
        file = self._locate(draw)
        if not file.exists():
            return None
        try:
            tensors = load_file(file)
        except SafetensorError:
            file.unlink(missing_ok=True)
            return None
        outputs: Outputs = {}
        for name, tensor in tensors.items():
            node_name, _, output_name = name.rpartition(NAME_SEPARATOR)
            is_half = tensor.dtype == torch.float16
            outputs.setdefault(node_name, {})[output_name] = tensor.float() if is_half else tensor
        return outputs

    def write(self, draw: str, outputs: Outputs) -> None:
        """Keep the outputs of a draw, when there is room for them."""
        tensors: dict[str, Tensor] = {}
        for node_name, node_outputs in outputs.items():
            for output_name, tensor in node_outputs.items():
                name = f"{node_name}{NAME_SEPARATOR}{output_name}"
                tensors[name] = _round_to_half(tensor).contiguous()
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.used_bytes + size > self.max_bytes:
            return
        try:
            with replace_file(self._locate(draw)) as unfinished:
                save_file(tensors, unfinished)
        except DiskFull:
            # The room that is left is for weights. What is not kept is computed again.
            self.max_bytes = 0
            return
        self.used_bytes += size

    def _locate(self, draw: str) -> Path:
        """Return the file of a draw."""
        return self.folder / f"{draw}.safetensors"


def _round_to_half(tensor: Tensor) -> Tensor:
    """Return a tensor of floats in half precision, unless it holds larger values."""
    if not tensor.is_floating_point() or float(tensor.abs().max()) > LARGEST_HALF:
        return tensor
    return tensor.to(torch.float16)
