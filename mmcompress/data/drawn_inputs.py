"""`drawn`: pictures, sounds and texts that are made up, for an export without data of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from PIL import Image, ImageDraw
from pydantic import AfterValidator

from mmcompress.data.base import Pairs
from mmcompress.errors import DataError
from mmcompress.registry import INPUT_TYPES, resolve_entry
from mmcompress.runtime.audio import SAMPLE_RATE
from mmcompress.spec.schema import make_name_check

DEFAULT_DRAWN_INPUTS = 16
"""Inputs of a split that are loaded when no number is asked for."""

PICTURE_SIDES = (48, 400)
"""Shortest and longest side of a picture, in pixels."""

SHAPES_PER_PICTURE = 6
"""Ellipses and rectangles on a picture."""

SOUND_SECONDS = (0.5, 6.0)
"""Shortest and longest sound, in seconds."""

TONES_PER_SOUND = 5
"""Gliding tones in a sound, one after the other."""

SENTENCES = (
    "A red bicycle leans against a white wall.",
    "Two dogs run along the beach at sunset",
    "the quick brown fox jumps over the lazy dog",
    "Where is the nearest train station?",
    "Preheat the oven to 180 degrees, then bake for 25 minutes.",
    "An old man reads a newspaper in the park.",
    "THE MEETING STARTS AT NINE O'CLOCK!",
    "She sells sea shells by the sea shore; he doesn't.",
    "a close-up photo of a small bird on a branch",
    "Invoices are due within 30 days of receipt.",
    "Snow fell all night, and the roads were closed.",
    "What would you like to drink with your meal?",
    "The price went up by 3.5 % in the second quarter.",
    "A group of children plays football on a muddy field.",
    "Please call me back as soon as you can.",
    "Bright yellow flowers in a blue vase on a wooden table",
)
"""Texts of every kind that people write: statements, questions, captions, figures."""


@dataclass(frozen=True, kw_only=True)
class DrawnInputs:
    """Inputs without meaning, the same ones in every run. No pipeline can be judged by them."""

    modality: Annotated[str, AfterValidator(make_name_check(INPUT_TYPES))] = "image"
    """What the inputs are: see `mmcompress list inputs`."""
    splits: tuple[str, ...] = field(default=("train", "val", "test"), init=False)
    """Names of the splits."""

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Draw inputs of a split, each with one of a few sentences as its text.

        Raises:
            DataError: There is no such split.
        """
        if split not in self.splits:
            raise DataError(f"unknown split '{split}' (known: {', '.join(self.splits)})")
        number = DEFAULT_DRAWN_INPUTS if count is None else count
        draw_target = INPUT_TYPES.get(self.modality).draw
        draw = resolve_entry(draw_target) if draw_target else None
        inputs: list[Any] = []
        texts: list[str] = []
        for i in range(number):
            rng = np.random.default_rng([self.splits.index(split), seed, i])
            text = SENTENCES[int(rng.integers(len(SENTENCES)))]
            texts.append(text)
            inputs.append(draw(rng) if draw else text)
        return Pairs(inputs=inputs, texts=tuple(texts))


def draw_picture(rng: np.random.Generator) -> np.ndarray:
    """Return a picture of a colour gradient with shapes on it, uint8 [height, width, 3]."""
    height, width = (int(side) for side in rng.integers(*PICTURE_SIDES, size=2))
    corners = rng.integers(0, 256, size=(2, 2, 3)).astype(np.uint8)
    picture = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for _ in range(SHAPES_PER_PICTURE):
        left, right = sorted(int(x) for x in rng.integers(0, width, size=2))
        top, bottom = sorted(int(y) for y in rng.integers(0, height, size=2))
        color = tuple(int(value) for value in rng.integers(0, 256, size=3))
        draw = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        draw((left, top, right, bottom), fill=color)
    return np.asarray(picture)


def synthesize_sound(rng: np.random.Generator) -> np.ndarray:
    """Return gliding tones over soft noise, float32 [samples] at 16 kHz."""
    seconds = float(rng.uniform(*SOUND_SECONDS))
    samples = int(seconds * SAMPLE_RATE)
    sound = 0.01 * rng.standard_normal(samples)
    for part in np.array_split(np.arange(samples), TONES_PER_SOUND):
        start_hz, end_hz = rng.uniform(100, 3000, size=2)
        hz = np.linspace(start_hz, end_hz, len(part))
        phase = 2 * np.pi * np.cumsum(hz) / SAMPLE_RATE
        fade = np.sin(np.linspace(0, np.pi, len(part)))
        sound[part] += 0.3 * fade * np.sin(phase)
    return sound.astype(np.float32)
