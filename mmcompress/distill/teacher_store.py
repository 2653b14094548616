"""Outputs of the teacher on disk: a run asks for the same pairs again and again.

All trainings of a run draw the same pairs in the same order. These are the search for a learning
rate, short trainings, and the training of every artifact. The teacher's pass takes about half of a
training step. Pairs from files are kept under their names, drawn ones under the name of their draw.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcompress.errors import DiskFull
from mmcompress.storage import replace_file

CompactOutputs = dict[str, Tensor]
"""What `compact_outputs` gives."""

MAX_PLAIN_NAME = 64
"""Letters of a name up to which the file is called by it."""


@dataclass(kw_only=True)
class TeacherStore:
    """A folder with a file of outputs for every draw or pair, in their compact form."""

    folder: Path
    """Where the files are."""
    max_bytes: int
    """Bytes that all files may take together. Draws beyond them are computed each time."""
    used_bytes: int = field(init=False, default=0)
    """Bytes that they take now."""
    largest_bytes: int = field(init=False, default=0)
    """Bytes of the largest of them."""

    def __post_init__(self) -> None:
        sizes = [file.stat().st_size for file in self.folder.glob("*.safetensors")]
        self.used_bytes = sum(sizes)
        self.largest_bytes = max(sizes, default=0)

    @property
    def has_room(self) -> bool:
        """Whether another file of the size of the largest one may be added."""
        return self.used_bytes + self.largest_bytes < self.max_bytes

    def holds(self, name: str) -> bool:
        """Return whether the outputs of a draw or a pair are kept."""
        return self._locate(name).exists()

    def read(self, name: str) -> CompactOutputs | None:
        """Return the outputs of a draw or a pair; None where they are not kept.

        A damaged file is removed and counts as none.
        """
        file = self._locate(name)
        if not file.exists():
            return None
        try:
            return load_file(file)
        except SafetensorError:
            file.unlink(missing_ok=True)
            return None

    def write(self, name: str, outputs: CompactOutputs) -> None:
        """Keep the outputs of a draw or a pair, when there is room for them."""
        size = sum(tensor.nbytes for tensor in outputs.values())
        if self.used_bytes + size > self.max_bytes:
            return
        try:
            with replace_file(self._locate(name)) as unfinished:
                save_file(outputs, unfinished)
        except DiskFull:
            # The room that is left is for weights. What is not kept is computed again.
            self.max_bytes = 0
            return
        self.used_bytes += size
        self.largest_bytes = max(self.largest_bytes, size)

    def _locate(self, name: str) -> Path:
        """Return the file of a draw or a pair. Names of pairs may be paths of any length."""
        is_plain = len(name) <= MAX_PLAIN_NAME and name.replace("-", "").isalnum()
        file_name = name if is_plain else hashlib.sha256(name.encode()).hexdigest()
        return self.folder / f"{file_name}.safetensors"
