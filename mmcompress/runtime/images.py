"""Pictures as pixel values, prepared in the same way for training and in deployment.

Shapes: C planes (red, green, blue), H height, W width.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmcompress.errors import DataError

ImageLike = str | Path | bytes | np.ndarray | Image.Image
"""A file, its bytes, an array uint8 [H, W, C], or an image of Pillow."""

LARGEST_PIXEL_VALUE = 255
"""Value of a byte that counts as 1."""

MAX_NAME_LENGTH = 200
"""Characters of a file name that a message shows: bytes by mistake given as a name may be
millions."""


def open_image(source: ImageLike) -> Image.Image:
    """Open a picture as RGB. Transparency falls on white.

    Args:
        source: A file, its bytes, an array, or an image.

    Returns:
        The picture in the mode RGB.

    Raises:
        DataError: There is no such file, or it is no picture.
    """
    try:
        image = _load_image(source)
    except FileNotFoundError as error:
        raise DataError(f"{source!s}: no such image") from error
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(f"{_describe_source(source, 'not a readable image')}") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        transparent_image = image.convert("RGBA")
        white_image = Image.new("RGBA", transparent_image.size, "white")
        return Image.alpha_composite(white_image, transparent_image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _load_image(source: ImageLike) -> Image.Image:
    """Load a picture in whatever mode it has."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return source
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    image = Image.open(file)
    # Pillow reads the header only; a damaged file shall fail here
    image.load()
    return image


def _describe_source(source: ImageLike, problem: str) -> str:
    """Write a message about a picture: its name, the problem, and the size of its file."""
    if isinstance(source, bytes | np.ndarray | Image.Image):
        return f"the given image: {problem}"
    name = str(source)[:MAX_NAME_LENGTH]
    if isinstance(source, str | Path) and Path(source).exists():
        size = Path(source).stat().st_size
        return f"{name}: {problem} ({size} bytes)"
    return f"{name}: {problem}"


def preprocess_image(source: ImageLike, config: Mapping[str, Any]) -> np.ndarray:
    """Prepare a picture for an image encoder.

    Args:
        source: A file, its bytes, an array, or an image.
        config: Keys of open_clip's `preprocess_cfg`. `size`: pixels of a side; `mean`, `std`: of a
            plane, in 0..1; `interpolation`: bicubic (default) or bilinear; `resize_mode`:
            "shortest" (default: the shorter side gets the size, the centre is kept), "longest" (the
            longer side, with a border) or "squash".

    Returns:
        float32 [C, size, size], with the mean 0 and the standard deviation 1 that the encoder was
        trained with.

    Raises:
        DataError: There is no such file, or it is no picture.
    """
    image = open_image(source)
    size = int(config["size"])
    if image.size != (size, size):
        is_bilinear = config.get("interpolation") == "bilinear"
        image = _resize_image(
            image,
            size,
            mode=config.get("resize_mode", "shortest"),
            resampling=Image.Resampling.BILINEAR if is_bilinear else Image.Resampling.BICUBIC,
        )
    # planes first: numpy is slow where the last axis has three entries
    planes_CHW = np.asarray(image).transpose(2, 0, 1)
    pixels_CHW = planes_CHW.astype(np.float32, order="C")
    means = np.broadcast_to(config["mean"], 3)
    deviations = np.broadcast_to(config["std"], 3)
    for plane_HW, mean, deviation in zip(pixels_CHW, means, deviations, strict=True):
        plane_HW -= np.float32(mean) * LARGEST_PIXEL_VALUE
        plane_HW /= np.float32(deviation) * LARGEST_PIXEL_VALUE
    return pixels_CHW


def _resize_image(
    image: Image.Image, size: int, *, mode: str, resampling: Image.Resampling
) -> Image.Image:
    """Bring a picture to a square of `size` pixels."""
    if mode == "squash":
        return image.resize((size, size), resampling)
    old_width, old_height = image.size
    side = min(old_width, old_height) if mode == "shortest" else max(old_width, old_height)
    scale = size / side
    width = max(1, round(old_width * scale))
    height = max(1, round(old_height * scale))
    resized_image = image.resize((width, height), resampling)
    # a negative edge lies outside the picture: there the crop adds a border
    left = (width - size) // 2
    top = (height - size) // 2
    return resized_image.crop((left, top, left + size, top + size))
