"""Tokenizers as they lie beside weights: what of their files holds for a model here.

A `tokenizer.json` may pad and cut by itself, as all-MiniLM-L6-v2's does: every text then has 128
tokens. Texts are padded and cut by `mmcompress.runtime.text` alone, to the length that the model
reads.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, normalizers

from mmcompress.errors import ModelError

PROBE_TEXT = "a"
"""A text whose tokens are compared with and without special tokens."""


def disable_padding_and_truncation(tokenizer_json: str) -> str:
    """Return a tokenizer that neither pads nor cuts a text."""
    content: dict[str, Any] = json.loads(tokenizer_json)
    content["padding"] = None
    content["truncation"] = None
    return json.dumps(content, ensure_ascii=False)


def lower_case_first(tokenizer_json: str) -> str:
    """Return a tokenizer that lower-cases a text before anything else."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
    return str(tokenizer.to_str())


def find_added_end(tokenizer_json: str) -> int | None:
    """Return the token id that a tokenizer puts behind every text; None where it puts none.

    A text that is cut keeps this token, as it does in the library.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    plain: list[int] = tokenizer.encode(PROBE_TEXT, add_special_tokens=False).ids
    whole: list[int] = tokenizer.encode(PROBE_TEXT).ids
    if not whole or whole == plain or (plain and whole[-1] == plain[-1]):
        return None
    return int(whole[-1])


def find_padding_id(tokenizer_config: dict[str, Any], tokenizer_json: str) -> int | None:
    """Return the token id that the library pads texts with; None where its files name none.

    Args:
        tokenizer_config: `tokenizer_config.json`.
        tokenizer_json: The tokenizer.
    """
    token = tokenizer_config.get("pad_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return None
    number = Tokenizer.from_str(tokenizer_json).token_to_id(token)
    return None if number is None else int(number)


def check_vocabulary(tokenizer_json: str, vocabulary: int, *, source: str) -> None:
    """Check that a model has an embedding for every token that its tokenizer may give.

    Raises:
        ModelError: A token lies beyond the embedding.
    """
    if not vocabulary:
        return
    tokens: dict[str, int] = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    beyond = sorted((number, token) for token, number in tokens.items() if number >= vocabulary)
    if beyond:
        number, token = beyond[0]
        raise ModelError(
            f"{source}: the tokenizer has {len(beyond)} token(s) beyond the embedding of "
            f"{vocabulary}: the first is '{token}', id {number}. Resize the embedding and save the "
            "model again, or remove the token"
        )
