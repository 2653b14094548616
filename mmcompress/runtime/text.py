"""Texts as token ids, and the type of what nodes exchange."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmcompress.errors import BundleError
from mmcompress.runtime.check_values import (
    Rules,
    check_text,
    either,
    list_of,
    optional,
    whole_number,
)

Values = dict[str, Any]
"""Named values of a node: its outputs by port, or its configuration in the manifest."""

TOKEN_ID = whole_number(-1, 2**31 - 1)
"""A token id; -1: no token."""

TEXT_RULES: Rules = {
    "context_length": whole_number(1, 8192),
    "pad": TOKEN_ID,
    "eos": optional(either(TOKEN_ID, list_of(TOKEN_ID, max_length=256))),
    "prompt": check_text,
}
"""What the manifest may say of the texts that a node reads."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer of the library `tokenizers`.

    Raises:
        BundleError: The file is missing or no tokenizer.
    """
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: not a tokenizer: {error}") from error


def pad_ids(rows: Sequence[Sequence[int]], length: int, *, pad: int, eos: int | None) -> np.ndarray:
    """Bring texts to one length.

    Args:
        rows: Token ids of each text.
        length: Tokens of every row. A text that is too long loses its last words, never its end
            token.
        pad: Token id that fills up short texts.
        eos: Token id that ends a text; None where the tokenizer ends texts in no such token.

    Returns:
        int64 [texts, length].
    """
    padded_rows: list[list[int]] = []
    for row in rows:
        ids = list(row)
        if len(ids) > length:
            ids = ids[:length] if eos is None else [*ids[: length - 1], eos]
        missing = length - len(ids)
        padded_rows.append(ids + [pad] * missing)
    return np.array(padded_rows, np.int64)


def add_prompt(texts: Sequence[str], config: Values) -> list[str]:
    """Return texts with what the model's `prompt` puts ahead of each."""
    prompt = config.get("prompt", "")
    return [f"{prompt}{text}" for text in texts]


def choose_padded_length(rows: Sequence[Sequence[int]], config: Values) -> int:
    """Choose the length that texts are padded to.

    Args:
        rows: Token ids of each text.
        config: Configuration of a text encoder: `context_length`, and `any_length` where it ignores
            padding.

    Returns:
        Tokens: the longest text where the encoder ignores padding, else its whole context.
    """
    context_length = int(config["context_length"])
    if not config.get("any_length"):
        return context_length
    longest = max((len(row) for row in rows), default=0)
    return min(max(1, longest), context_length)
