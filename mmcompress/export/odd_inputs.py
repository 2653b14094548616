"""Raw inputs for the proof of fidelity: those of the data, and odd ones that are made of them.

Odd ones have the shapes, modes, channels and lengths that people's files have. Each input has what
the library is given beside it. That is never made by the code that the bundle runs, but for the
places where a long sound is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from PIL import Image

from mmcompress.data.base import Pairs
from mmcompress.errors import ProofFailed
from mmcompress.models.reference.files import open_picture, open_sound
from mmcompress.runtime.audio import SAMPLE_RATE, split_sound

ORIENTATION_TAG = 0x0112
"""EXIF tag of how a camera was held."""

TURNED_LEFT = 6
"""Value of that tag for a picture that is to be turned by 90 degrees."""

MAX_ODD_SIDE = 640
"""Pixels of a side of an odd picture: ten files of a camera's size would take a minute."""

PALETTE_COLORS = 64
"""Colors of a palette whose colors differ in their opacity."""

DEEP_STEP = 250
"""Values of 16 bits for one of 8 in an odd picture: no scale that cuts bits off gives it back."""

LONG_TEXT_REPEATS = 60
"""Repeats that make a text longer than any context here."""

LONG_SOUND_WINDOWS = 2.5
"""Windows of the model in a sound that is longer than one."""

PHONE_RATE = 8_000
"""Samples per second of a telephone."""

PHONE_BAND_HZ = 3_400.0
"""Hertz: the highest tone that a telephone carries. Below half of its rate there is no other."""

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
    value: object
    """What the bundle is given: a file, samples or a text."""
    references: tuple[object, ...]
    """What the library is given: a picture, a text, or the samples of every window of a sound."""
    decoded: object = None
    """What the dataset makes of the file; None where `value` is no file of the data."""
    is_odd: bool = False
    """Whether it was made up. A library may refuse it, such as words without a token for them."""
    departure: str = ""
    """What the bundle does otherwise than the library, on purpose. It was done to the reference by
    another formula."""


@dataclass(frozen=True, kw_only=True)
class RawInputRequest:
    """What the raw inputs of a node are made of."""

    pairs: Pairs
    """Ordinary inputs and their texts."""
    folder: Path
    """Where the files of odd inputs are written."""
    deployed: object
    """The node of the bundle: some inputs depend on what it takes at once."""


class DeployedHearing(Protocol):
    """An encoder of sounds."""

    options: Mapping[str, float]
    """`seconds` that it hears at once, and others."""


def list_pictures(request: RawInputRequest) -> list[RawInput]:
    """Return the pictures of the data, and odd ones that are made of the first.

    The pictures are uint8 [h, w, 3], and their files count where they have any.
    """
    pairs = request.pairs
    raw_inputs: list[RawInput] = []
    for i, pixels in enumerate(pairs.inputs):
        name = f"input {i + 1}"
        if pairs.files:
            raw_inputs.append(_read_picture(name, pairs.files[i], decoded=pixels))
        else:
            picture = Image.fromarray(np.asarray(pixels, np.uint8))
            raw_inputs.append(RawInput(name=name, value=pixels, references=(picture,)))
    first = Image.fromarray(np.asarray(pairs.inputs[0], np.uint8))
    first.thumbnail((MAX_ODD_SIDE, MAX_ODD_SIDE))
    for name, file in _write_odd_pictures(first, request.folder).items():
        raw_inputs.append(_read_picture(name, file, is_odd=True))
    return raw_inputs


def _read_picture(
    name: str, file: Path, *, decoded: object = None, is_odd: bool = False
) -> RawInput:
    """Return a picture file: the bundle is given its path, the library opens it itself."""
    opened = open_picture(file)
    return RawInput(
        name=name,
        value=str(file),
        references=(opened.picture,),
        decoded=decoded,
        is_odd=is_odd,
        departure=opened.departure,
    )


def _write_odd_pictures(ordinary_picture: Image.Image, folder: Path) -> dict[str, Path]:
    """Write variants of a picture, and return their files by what they are."""
    width, height = ordinary_picture.size
    grey_pixels = np.asarray(ordinary_picture.convert("L"))
    opacity = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    transparent = ordinary_picture.copy()
    transparent.putalpha(Image.fromarray(opacity))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = TURNED_LEFT
    color_opacity = bytes(i * 255 // (PALETTE_COLORS - 1) for i in range(PALETTE_COLORS))
    deep_picture = Image.fromarray(grey_pixels.astype(np.uint16) * np.uint16(DEEP_STEP))
    rows: list[tuple[str, str, Image.Image, dict[str, Any]]] = [
        ("portrait", "png", ordinary_picture.crop((0, 0, max(width // 3, 2), height)), {}),
        ("panorama", "png", ordinary_picture.crop((0, 0, width, max(height // 4, 2))), {}),
        ("grey", "png", ordinary_picture.convert("L"), {}),
        ("palette", "png", ordinary_picture.convert("P"), {}),
        ("CMYK", "jpg", ordinary_picture.convert("CMYK"), {}),
        ("turned by EXIF", "jpg", ordinary_picture, {"exif": exif}),
        ("RGBA", "png", transparent, {}),
        (
            "palette with alpha",
            "png",
            ordinary_picture.quantize(PALETTE_COLORS),
            {"transparency": color_opacity},
        ),
        ("16 bits", "png", deep_picture, {}),
        ("floats", "tiff", Image.fromarray(grey_pixels.astype(np.float32) / 255), {}),
    ]
    files: dict[str, Path] = {}
    for name, suffix, picture, options in rows:
        files[name] = folder / f"{name.replace(' ', '-')}.{suffix}"
        picture.save(files[name], **options)
    return files


def list_sounds(request: RawInputRequest) -> list[RawInput]:
    """Return the sounds of the data, and odd ones that are made of the first.

    The sounds are float32 [n] at 16 kHz, and their files count where they have any.
    """
    pairs = request.pairs
    window_seconds = float(cast(DeployedHearing, request.deployed).options["seconds"])
    raw_inputs: list[RawInput] = []
    for i, samples in enumerate(pairs.inputs):
        name = f"input {i + 1}"
        if pairs.files:
            windows = _split_whole(open_sound(pairs.files[i]), window_seconds)
            raw_inputs.append(
                RawInput(name=name, value=str(pairs.files[i]), references=windows, decoded=samples)
            )
        else:
            sound = np.asarray(samples, np.float32)
            windows = _split_whole(sound, window_seconds)
            raw_inputs.append(RawInput(name=name, value=sound, references=windows))
    longest = int(window_seconds * SAMPLE_RATE)
    first = np.asarray(pairs.inputs[0], np.float32)[:longest]
    first = np.resize(first, max(len(first), SAMPLE_RATE // 10))
    long_sound = np.resize(first, int(LONG_SOUND_WINDOWS * longest))
    stereo_sound = np.stack([first, 0.5 * first[::-1]], axis=1)
    phone_sound = _limit_to_phone_band(first)
    odd_sounds: dict[str, tuple[object, tuple[np.ndarray, ...]]] = {
        "a tenth of a second": (first[: SAMPLE_RATE // 10], (first[: SAMPLE_RATE // 10],)),
        "a full window": (np.resize(first, longest), (np.resize(first, longest),)),
        "a long sound": (long_sound, _split_whole(long_sound, window_seconds)),
        "silence": (np.zeros(longest // 2, np.float32), (np.zeros(longest // 2, np.float32),)),
        "two channels": (stereo_sound, ((stereo_sound[:, 0] + stereo_sound[:, 1]) / 2,)),
        # every second sample is this very sound at half the rate: no other resampler is needed
        "8 kHz": ((phone_sound[::2], PHONE_RATE), (phone_sound,)),
    }
    for name, (value, windows) in odd_sounds.items():
        raw_inputs.append(RawInput(name=name, value=value, references=windows, is_odd=True))
    return raw_inputs


def _split_whole(samples: np.ndarray, window_seconds: float) -> tuple[np.ndarray, ...]:
    """Return the windows of a sound. Where to cut is the bundle's choice; nothing may be lost.

    Raises:
        ProofFailed: The windows are not the sound.
    """
    windows = tuple(split_sound(samples, window_seconds))
    longest = max(len(window) for window in windows)
    is_whole = np.array_equal(np.concatenate(windows), samples)
    if not is_whole or longest > int(window_seconds * SAMPLE_RATE):
        raise ProofFailed("a long sound: its windows are not the whole sound, or too long")
    return windows


def _limit_to_phone_band(samples: np.ndarray) -> np.ndarray:
    """Return a sound of an even length that has no tone above the band, and fades in and out.

    The fade comes last: a sound that breaks off has tones of every height at its ends.
    """
    even_length = len(samples) - len(samples) % 2
    spectrum = np.fft.rfft(samples[:even_length].astype(np.float64))
    hertz = np.fft.rfftfreq(even_length, 1 / SAMPLE_RATE)
    spectrum[hertz > PHONE_BAND_HZ] = 0
    limited = np.fft.irfft(spectrum, even_length) * np.hanning(even_length)
    return limited.astype(np.float32)


def list_texts(request: RawInputRequest) -> list[RawInput]:
    """Return the texts of the data, and odd ones."""
    texts = request.pairs.texts
    raw_inputs: list[RawInput] = []
    for i, text in enumerate(texts):
        raw_inputs.append(RawInput(name=f"input {i + 1}", value=text, references=(text,)))
    long_text = " ".join([*texts[:1]] * LONG_TEXT_REPEATS)
    for text in (*ODD_TEXTS, long_text):
        name = repr(text if len(text) < 20 else f"{text[:17]}...")
        raw_inputs.append(RawInput(name=name, value=text, references=(text,), is_odd=True))
    return raw_inputs
