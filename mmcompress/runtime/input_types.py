"""The types of value that a pipeline may be given, and what each needs: one record a type.

`mmcompress.registry.INPUT_TYPES` names them. The other rooms ask a record for its functions, never
a type for its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOISE_IMAGE_SIZE = 224
"""Pixels: side of the picture of a request that says nothing."""

NOISE_SAMPLES = 32_000
"""Samples: the sound of a request that says nothing, two seconds at 16 kHz."""

NOISE_LOUDNESS = 0.1
"""Standard deviation of these samples, which lie in -1..1."""

NOISE_LETTERS = 40
"""Letters of the text of a request that says nothing."""


@dataclass(frozen=True, kw_only=True)
class InputType:
    """A type of value that a pipeline may be given.

    Every field names a function as `module:function`.
    """

    make_noise: str
    """Makes the value of a request that says nothing, of a `numpy.random.Generator`. A device calls
    it, so it imports no torch."""
    draw: str = ""
    """Makes a value for data of the kind `drawn`, of such a generator. Empty: the value is the text
    that stands beside it."""
    is_empty: str = ""
    """Tells whether a value holds nothing to answer, such as silence. Empty: every value holds
    something."""
    show: str = ""
    """Makes a `mmcompress.results.records.ShownInput` of a value, for a report. Empty: the value is
    not shown."""
    list_raw_inputs: str
    """Lists the raw inputs of the proof of fidelity: those of the data, and odd ones. It takes a
    `mmcompress.export.odd_inputs.RawInputRequest`."""


IMAGE = InputType(
    make_noise="mmcompress.runtime.input_types:make_noise_picture",
    draw="mmcompress.data.drawn_inputs:draw_picture",
    show="mmcompress.data.shown_inputs:show_picture",
    list_raw_inputs="mmcompress.export.odd_inputs:list_pictures",
)
"""A picture: a file, its bytes, or an array."""

AUDIO = InputType(
    make_noise="mmcompress.runtime.input_types:make_noise_sound",
    draw="mmcompress.data.drawn_inputs:synthesize_sound",
    show="mmcompress.data.shown_inputs:show_sound",
    is_empty="mmcompress.runtime.audio:is_silent",
    list_raw_inputs="mmcompress.export.odd_inputs:list_sounds",
)
"""A sound: a file, its bytes, or samples."""

TEXT = InputType(
    make_noise="mmcompress.runtime.input_types:make_noise_text",
    list_raw_inputs="mmcompress.export.odd_inputs:list_texts",
)
"""A text."""


def make_noise_picture(rng: np.random.Generator) -> np.ndarray:
    """Make a picture without meaning, uint8 [224, 224, 3]."""
    return rng.integers(0, 255, (NOISE_IMAGE_SIZE, NOISE_IMAGE_SIZE, 3), np.uint8)


def make_noise_sound(rng: np.random.Generator) -> np.ndarray:
    """Make two seconds of noise, float32 [n] at 16 kHz."""
    return rng.normal(0, NOISE_LOUDNESS, NOISE_SAMPLES).astype(np.float32)


def make_noise_text(rng: np.random.Generator) -> str:
    """Make letters without meaning, in words."""
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz "), NOISE_LETTERS)
    return "".join(letters)
