"""Odd inputs made from ordinary ones: shapes, modes and lengths that people's files have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmcompress.runtime.audio import SAMPLE_RATE

ORIENTATION_TAG = 0x0112
"""EXIF tag of how a camera was held."""

TURNED_LEFT = 6
"""Value of that tag for a picture that is to be turned by 90 degrees."""

LONG_TEXT_REPEATS = 60
"""Repeats that make a text longer than any context here."""

ODD_TEXTS = (
    "",
    "naïve café, 10 % günstiger – straße",
    "你好，世界 🙂🚲",
    "  spaces   before,  between and\tafter \n",
    "ALL CAPITALS!!! (and [brackets])",
)
"""Texts that tokenizers treat in different ways."""


@dataclass(frozen=True, kw_only=True)
class RawInput:
    """One input for the bundle and for the library."""

    name: str
    """What it is, for a person."""
    value: Any
    """What the bundle is given: a file, samples or a text."""
    reference: Any
    """What the library is given: a picture as PIL opens it, samples or a text."""
    is_odd: bool = False
    """Whether it was made up. A library may refuse it, such as words without a token for them."""


def list_pictures(pictures: Sequence[np.ndarray], folder: Path) -> list[RawInput]:
    """Return pictures, and odd ones that are made of the first.

    Args:
        pictures: uint8 [h, w, 3].
        folder: Where the files of odd ones are written.
    """
    raw_inputs: list[RawInput] = []
    for i, pixels in enumerate(pictures):
        picture = Image.fromarray(np.asarray(pixels, np.uint8))
        raw_inputs.append(RawInput(name=f"input {i + 1}", value=pixels, reference=picture))
    whole = Image.fromarray(np.asarray(pictures[0], np.uint8))
    width, height = whole.size
    odd_pictures: dict[str, tuple[Image.Image, str]] = {
        "portrait": (whole.crop((0, 0, max(width // 3, 2), height)), "png"),
        "panorama": (whole.crop((0, 0, width, max(height // 4, 2))), "png"),
        "grey": (whole.convert("L"), "png"),
        "palette": (whole.convert("P"), "png"),
        "CMYK": (whole.convert("CMYK"), "jpg"),
    }
    for name, (picture, suffix) in odd_pictures.items():
        file = folder / f"{name}.{suffix}"
        picture.save(file)
        raw_inputs.append(_open_for_library(name, file))
    turned = folder / "turned.jpg"
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = TURNED_LEFT
    whole.save(turned, exif=exif)
    raw_inputs.append(_open_for_library("turned by EXIF", turned))
    return raw_inputs


def _open_for_library(name: str, file: Path) -> RawInput:
    """Return a picture file, opened for the library as `transformers.image_utils.load_image` does.

    Alpha and pictures of 16 bits are left out: there the bundle departs from the library on
    purpose (`mmcompress.runtime.images`).
    """
    with Image.open(file) as opened:
        turned = Image.Image.getexif(opened).get(ORIENTATION_TAG) == TURNED_LEFT
        picture = opened.convert("RGB")
    if turned:
        picture = picture.transpose(Image.Transpose.ROTATE_270)
    return RawInput(name=name, value=str(file), reference=picture)


def list_sounds(sounds: Sequence[np.ndarray], window_seconds: float) -> list[RawInput]:
    """Return sounds no longer than a window of the model, and odd ones made of the first."""
    longest = int(window_seconds * SAMPLE_RATE)
    raw_inputs: list[RawInput] = []
    for i, samples in enumerate(sounds):
        cut = np.asarray(samples, np.float32)[:longest]
        raw_inputs.append(RawInput(name=f"input {i + 1}", value=cut, reference=cut))
    first = raw_inputs[0].value
    short = first[: SAMPLE_RATE // 10]
    full = np.resize(first, longest)
    raw_inputs.append(RawInput(name="a tenth of a second", value=short, reference=short))
    raw_inputs.append(RawInput(name="a full window", value=full, reference=full))
    return raw_inputs


def list_texts(texts: Sequence[str]) -> list[RawInput]:
    """Return texts, and odd ones."""
    raw_inputs = [
        RawInput(name=f"input {i + 1}", value=text, reference=text) for i, text in enumerate(texts)
    ]
    long_text = " ".join([*texts[:1]] * LONG_TEXT_REPEATS)
    for text in (*ODD_TEXTS, long_text):
        name = repr(text if len(text) < 20 else f"{text[:17]}...")
        raw_inputs.append(RawInput(name=name, value=text, reference=text, is_odd=True))
    return raw_inputs
