"""The characters of emoji by their names, as the package `emoji` lists them."""

from __future__ import annotations

from functools import lru_cache

import emoji


@lru_cache(maxsize=1)
def list_characters() -> dict[str, str]:
    """List the characters of every emoji by its English name."""
    characters: dict[str, str] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if "en" in entry:
            name = entry["en"].strip(":").replace("_", " ").lower()
            characters[name] = character
    return characters
