"""Texts as token ids, and the type of what nodes exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmcompress.errors import BundleError
from mmcompress.runtime.check_values import (
    Rules,
    allow_either,
    check_text,
    require_list,
    require_whole_number,
)
from mmcompress.runtime.clean_text import CLEANERS

Values = dict[str, Any]
"""Named values of a node: its outputs by port, or its configuration in the manifest."""

TOKEN_ID = require_whole_number(-1, 2**31 - 1)
"""A token id; -1: no token."""

TEXT_RULES: Rules = {
    "context_length": require_whole_number(1, 8192),
    "pad": TOKEN_ID,
    "eos": allow_either(TOKEN_ID, require_list(TOKEN_ID, max_length=256)),
    "prompt": check_text,
    "clean": check_text,
    "pad_side": check_text,
    "truncation_side": check_text,
    "replaced_ids": require_list(require_list(TOKEN_ID, max_length=2), max_length=256),
}
"""What the manifest may say of the texts that a node reads."""


BATCHED_FROM = 17
"""Texts from which on the tokenizer's thread pool is used: for a few short texts it costs more than
it saves."""


def list_texts(text: str | list[str]) -> list[str]:
    """List the texts of a value that is one text or several."""
    return [text] if isinstance(text, str) else text


def parse_tokenizer(tokenizer_json: str) -> Tokenizer:
    """Make a tokenizer of the library `tokenizers` from JSON, without padding and truncation.

    Many a `tokenizer.json` holds the padding and truncation of its last use. Transformers sets both
    anew at each call, and so do the nodes.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer of the library `tokenizers`, without padding and truncation.

    Raises:
        BundleError: The file is missing or no tokenizer.
    """
    try:
        return parse_tokenizer(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise BundleError(f"{path}: not a tokenizer: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TokenizedTexts:
    """Some texts as a model reads them."""

    ids: np.ndarray
    """Token ids, int64 [texts, length]."""
    is_token: np.ndarray
    """Which positions are no padding, bool [texts, length]."""


class TextReader:
    """Turn texts into token ids, as the library of the model does.

    Args:
        tokenizer: A tokenizer without padding and truncation; changed in place.
        config: The node's entry in the manifest: `context_length` and `pad`; where needed, also
            `any_length`, `pad_side`, `truncation_side`, `prompt`, `clean` and `replaced_ids`.

    Raises:
        BundleError: `clean` names no known cleaning.
    """

    def __init__(self, tokenizer: Tokenizer, config: Values):
        self.tokenizer = tokenizer
        self.config = config
        clean_name = config.get("clean")
        if clean_name and clean_name not in CLEANERS:
            raise BundleError(f"clean: '{clean_name}' is unknown (known: {', '.join(CLEANERS)})")
        self.clean = CLEANERS.get(clean_name or "")
        # The tokenizer keeps its first and last tokens when it cuts a long text.
        direction = str(config.get("truncation_side", "right"))
        tokenizer.enable_truncation(int(config["context_length"]), direction=direction)

    def read(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenize texts, and pad them to one length.

        It is that of the longest text where the model ignores padding, else the whole context.
        """
        prompt = str(self.config.get("prompt", ""))
        prepared_texts = [prompt + text for text in texts]
        if self.clean is not None:
            prepared_texts = [self.clean(text) for text in prepared_texts]
        if len(prepared_texts) < BATCHED_FROM:
            encodings = [self.tokenizer.encode(text) for text in prepared_texts]
        else:
            encodings = self.tokenizer.encode_batch(prepared_texts)
        rows = [encoding.ids for encoding in encodings]
        length = choose_padded_length(rows, self.config)
        pads_left = self.config.get("pad_side") == "left"
        ids = np.full((len(rows), length), int(self.config["pad"]), np.int64)
        is_token = np.zeros(ids.shape, bool)
        for i, row in enumerate(rows):
            start = length - len(row) if pads_left else 0
            ids[i, start : start + len(row)] = row
            is_token[i, start : start + len(row)] = True
        for replaced_id, id_instead in self.config.get("replaced_ids", ()):
            ids[ids == replaced_id] = id_instead
        return TokenizedTexts(ids=ids, is_token=is_token)


def pad_ids(rows: Sequence[Sequence[int]], length: int, *, pad: int, eos: int) -> np.ndarray:
    """Bring texts to one length.

    Args:
        rows: Token ids of each text.
        length: Tokens of every row. A text that is too long loses its last words, never its end
            token.
        pad: Token id that fills up short texts.
        eos: Token id that ends a text.

    Returns:
        int64 [texts, length].
    """
    padded_rows: list[list[int]] = []
    for row in rows:
        ids = list(row)
        if len(ids) > length:
            ids = [*ids[: length - 1], eos]
        missing = length - len(ids)
        padded_rows.append(ids + [pad] * missing)
    return np.array(padded_rows, np.int64)


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
