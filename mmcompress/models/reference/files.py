"""Files as a library opens them, by functions that share nothing with the runtime.

A picture is opened by `transformers.image_utils.load_image`, a sound by
`transformers.audio_utils.load_audio`. In two cases a bundle departs from the library on purpose.
There the picture is changed by a formula of its own before the library's processor sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.audio_utils import load_audio
from transformers.image_utils import load_image

LIBRARY_SAMPLE_RATE = 16_000
"""Samples per second that speech models hear."""

DEEP_VALUE = 65535
"""Value of 16 bits that counts as 1."""

WHITE = 255
"""Value of a byte that counts as 1."""

ALPHA_ON_WHITE = "alpha on white"
"""Departure: the library drops transparency, and what lies under it appears."""

SCALED_TO_BYTES = "scaled to 8 bits"
"""Departure: the library clips values of more than 8 bits."""


@dataclass(frozen=True, kw_only=True)
class OpenedPicture:
    """A picture that a library's processor can be given."""

    picture: Image.Image
    """In the mode RGB, upright."""
    departure: str = ""
    """What was done otherwise than in the library, on purpose; empty for nothing."""


def open_picture(file: Path) -> OpenedPicture:
    """Open a picture as the library does, but for the wanted departures."""
    with Image.open(file) as opened:
        mode = opened.mode
        has_alpha = mode.lower() in ("rgba", "la", "pa") or "transparency" in opened.info
        if mode[0] in "IF":
            deep_picture = ImageOps.exif_transpose(opened)
            return OpenedPicture(picture=_scale_to_bytes(deep_picture), departure=SCALED_TO_BYTES)
        if has_alpha:
            transparent_picture = ImageOps.exif_transpose(opened)
            return OpenedPicture(picture=_blend(transparent_picture), departure=ALPHA_ON_WHITE)
    return OpenedPicture(picture=load_image(str(file)))


def _scale_to_bytes(picture: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits, or of floats in 0..1 or 0..255, with 8 bits."""
    values = np.asarray(picture, np.float64)
    if picture.mode != "F":
        shares = values / DEEP_VALUE
    elif values.min() >= 0 and values.max() <= 1:
        shares = values
    else:
        shares = values / WHITE
    grey = np.floor(shares.clip(0, 1) * WHITE + 0.5).astype(np.uint8)
    return Image.fromarray(np.stack([grey, grey, grey], axis=-1))


def _blend(picture: Image.Image) -> Image.Image:
    """Return color * opacity + white * (1 - opacity)."""
    values_HW4 = np.asarray(picture.convert("RGBA"), np.float64)
    opacity_HW1 = values_HW4[..., 3:] / WHITE
    blended_HW3 = values_HW4[..., :3] * opacity_HW1 + WHITE * (1 - opacity_HW1)
    return Image.fromarray(np.floor(blended_HW3 + 0.5).astype(np.uint8))


def open_sound(file: Path) -> np.ndarray:
    """Open a sound as the library does: float32 [n] at 16 kHz, the mean of the channels."""
    samples: np.ndarray = load_audio(
        str(file), sampling_rate=LIBRARY_SAMPLE_RATE, backend="soundfile"
    )
    return samples
