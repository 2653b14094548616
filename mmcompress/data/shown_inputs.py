"""Inputs as a report shows them: small enough to stand in its page, which loads nothing."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from mmcompress.registry import resolve_entry
from mmcompress.results.records import ShownInput
from mmcompress.runtime.audio import SAMPLE_RATE

THUMBNAIL_SIDE = 160
"""Pixels of the longer side of a picture: about 6 kB as JPEG."""

JPEG_QUALITY = 80
"""Quality of a picture, of 100."""

MAX_CLIP_SECONDS = 12.0
"""Seconds of a sound that can be played at most, from its start."""

MAX_CLIP_BYTES = 40_000
"""Bytes of such a clip at most; a longer one is shortened."""

SHORTENED_SHARE = 0.75
"""Share of a clip that is kept when it is too large."""

WAVEFORM_COLUMNS = 120
"""Columns of a waveform: each is the loudest sample of a piece of the sound."""


def show_picture(value: object) -> ShownInput:
    """Make a thumbnail of a picture, uint8 [height, width, 3]."""
    image = Image.fromarray(np.asarray(value)).convert("RGB")
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return ShownInput(media=_encode(file.getvalue(), "image/jpeg"))


def show_sound(value: object) -> ShownInput:
    """Make a clip that can be played, and its waveform, of a sound: float32 [n] at 16 kHz."""
    sound = np.asarray(value, np.float32)
    pieces = np.array_split(np.abs(sound), min(WAVEFORM_COLUMNS, max(len(sound), 1)))
    peaks = tuple(round(float(piece.max(initial=0.0)), 3) for piece in pieces)
    write_mp3 = resolve_entry("mmcompress.runtime.sound_files:write_mp3")
    shown_sound = sound[: int(MAX_CLIP_SECONDS * SAMPLE_RATE)]
    clip: bytes = write_mp3(shown_sound, SAMPLE_RATE)
    while len(clip) > MAX_CLIP_BYTES:
        shown_sound = shown_sound[: int(SHORTENED_SHARE * len(shown_sound))]
        clip = write_mp3(shown_sound, SAMPLE_RATE)
    return ShownInput(
        media=_encode(clip, "audio/mpeg"),
        peaks=peaks,
        seconds=len(sound) / SAMPLE_RATE,
        shown_seconds=len(shown_sound) / SAMPLE_RATE,
    )


def _encode(content: bytes, media_type: str) -> str:
    """Return a file as a URL that holds its content."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
