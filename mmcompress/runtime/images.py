"""Image file -> pixel values, the same on the training and the deployed side."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmcompress.errors import DataError

ImageLike = str | Path | bytes | np.ndarray | Image.Image


def open_image(source: ImageLike) -> Image.Image:
    """Any image as RGB; transparency falls on white. Raises `DataError` for what is no image."""
    try:
        if isinstance(source, np.ndarray):
            im = Image.fromarray(source)
        elif isinstance(source, Image.Image):
            im = source
        else:
            im = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            im.load()
    except FileNotFoundError as e:
        raise DataError(f"{source!s}: no such image") from e
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        Image.DecompressionBombError,
    ) as e:
        name = (
            str(source)[:200]
            if not isinstance(source, bytes | np.ndarray | Image.Image)
            else "the given image"
        )
        size = (
            f" ({Path(source).stat().st_size} bytes)"
            if isinstance(source, str | Path) and Path(source).exists()
            else ""
        )
        raise DataError(f"{name}: not a readable image{size}") from e
    if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
        rgba = im.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return im if im.mode == "RGB" else im.convert("RGB")


def preprocess_image(source: ImageLike, config: dict[str, Any]) -> np.ndarray:
    """float32 [3, size, size], resized and normalized as `config` says (keys of open_clip's `preprocess_cfg`).

    `resize_mode`: "shortest" (the shorter side to size, centre crop), "longest" (the longer side, padded) or "squash".
    """
    im, size = open_image(source), int(config["size"])
    if im.size != (size, size):
        resample = (
            Image.Resampling.BILINEAR
            if config.get("interpolation") == "bilinear"
            else Image.Resampling.BICUBIC
        )
        w, h = im.size
        mode = config.get("resize_mode", "shortest")
        if mode == "squash":
            im = im.resize((size, size), resample)
        else:
            scale = size / (min(w, h) if mode == "shortest" else max(w, h))
            w, h = max(1, round(w * scale)), max(1, round(h * scale))
            im = im.resize((w, h), resample)
            left, top = (w - size) // 2, (h - size) // 2
            im = im.crop((left, top, left + size, top + size))
    # planes first: numpy is slow where the last axis has three entries
    x = np.asarray(im).transpose(2, 0, 1).astype(np.float32, order="C")
    for plane, mean, std in zip(
        x, *(np.broadcast_to(config[k], 3) for k in ("mean", "std")), strict=True
    ):
        plane -= np.float32(mean) * 255
        plane /= np.float32(std) * 255
    return x
