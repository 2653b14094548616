"""Each kind of node as deployed: named inputs -> named outputs, one request (or a list of texts) at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmcompress.errors import BundleError

Values = dict[str, Any]


def load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: not a tokenizer: {e}") from e


def pad_ids(ids: list[list[int]], length: int, *, pad: int, eos: int) -> np.ndarray:
    """int64 [n, length]; what is too long loses its last words, never its end token."""
    rows = [r if len(r) <= length else [*r[: length - 1], eos] for r in ids]
    return np.array([[*r, *[pad] * (length - len(r))] for r in rows], np.int64)


def choose_padded_length(ids: list[list[int]], config: Values) -> int:
    """To what length texts are padded: the longest of them where the tower ignores padding, else its whole context."""
    whole = int(config["context_length"])
    return min(max(1, *map(len, ids)), whole) if config.get("any_length") else whole
