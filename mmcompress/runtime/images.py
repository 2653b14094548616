"""Pictures as pixel values, prepared in the same way for training and in deployment.

A picture is opened as `transformers.image_utils.load_image` opens it, with two departures.
Transparency falls on white, and values of more than 8 bits are scaled, not clipped. What follows is
what the image processor of the model's library does; the configuration says it as plain data.

Shapes: C planes (red, green, blue), H height, W width.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mmcompress.errors import DataError
from mmcompress.runtime.text import Values

ImageLike = str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | Image.Image
"""A file, its bytes, an open file, an array [H, W] or [H, W, C], or an image of Pillow."""

UNIT_OVERSHOOT = 0.1
"""How far float values of a picture from 0 to 1 may lie beyond: resizing overshoots at edges."""

LARGEST_STANDARDIZED_VALUE = 8.0
"""Float values up to here with negative ones among them are no brightness from 0 to 255."""

LARGEST_PIXEL_VALUE = 255
"""Value of a byte that counts as 1."""

BYTE_STEP = 257
"""Values of 16 bits that one value of 8 bits stands for: 65535 / 255."""

MAX_NAME_LENGTH = 200
"""Characters of a file name that a message shows: bytes by mistake given as a name may be
millions."""

MAX_RESIZED_PIXELS = 2**24
"""Pixels up to which a picture is resized whole before the crop: 64 MiB in Pillow.

Above, as 20,000 x 1 pixels would be, only the part that is kept is computed. Pillow may then filter
rows and columns in the other order, which moves pixels by a few levels.
"""

MODE_BY_CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's name for an array of bytes with so many channels."""

ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
"""Modes of Pillow with transparency in a channel of its own."""

INTERPOLATIONS = {filter.name.lower(): filter for filter in Image.Resampling}
"""Pillow's filters by the names that a configuration has for them: bicubic, lanczos, and others."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for a file that it can't read."""


def open_image(source: ImageLike) -> Image.Image:
    """Open a picture as RGB, turned as its EXIF data says. Transparency falls on white.

    16-bit values are divided by 257. Float values are multiplied by 255 if all lie in 0..1, else
    clipped to 0..255.

    Args:
        source: A file, its bytes, an open file, an array, or an image.

    Returns:
        The picture in the mode RGB.

    Raises:
        DataError: There is no such file, or it is no picture.
    """
    try:
        if isinstance(source, np.ndarray):
            return _wrap_array(source).convert("RGB")
        if isinstance(source, Image.Image):
            return _turn_to_rgb(source)
        # closes a file of several frames, too, which Pillow otherwise keeps open
        with _open_file(source) as image:
            return _turn_to_rgb(image)
    except FileNotFoundError as error:
        raise DataError(f"{str(source)[:MAX_NAME_LENGTH]}: no such image") from error
    except DECODING_ERRORS as error:
        raise DataError(f"{_describe_source(source, 'not a readable image')}") from error
    except ValueError as error:
        raise DataError(f"{_describe_source(source, 'not a readable image')}: {error}") from error


def _open_file(source: str | os.PathLike[str] | bytes | BinaryIO) -> Image.Image:
    """Open a file in whatever mode it has; Pillow reads its header only."""
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str | os.PathLike):
        mode = os.stat(source).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError("a folder; name one image in it")
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            # Pillow would wait for a writer that may never come.
            raise OSError("a pipe or a device, no file")
        return Image.open(source)
    if hasattr(source, "read"):
        return Image.open(source)
    raise ValueError(
        f"a {type(source).__name__}; give a file, its bytes, an array, or an image of Pillow"
    )


def _turn_to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture upright, as RGB."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return _convert_to_rgb(image)


def _wrap_array(array: np.ndarray) -> Image.Image:
    """Return an array [H, W], [H, W, C] or [C, H, W] as an image of 8 bits."""
    if array.size == 0 or array.ndim not in (2, 3):
        raise ValueError(f"an array of shape {list(array.shape)}; expected [h, w] or [h, w, 3]")
    values = array if array.ndim == 3 else array[..., None]
    if values.shape[2] not in MODE_BY_CHANNELS:
        values = np.moveaxis(values, 0, 2)
    if values.shape[2] not in MODE_BY_CHANNELS:
        raise ValueError(f"an array of shape {list(array.shape)}; expected 1 to 4 channels")
    values_HWC = np.ascontiguousarray(_scale_to_bytes(values))
    height = values_HWC.shape[0]
    width = values_HWC.shape[1]
    mode = MODE_BY_CHANNELS[values_HWC.shape[2]]
    return Image.frombytes(mode, (width, height), values_HWC.tobytes())


def _scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Return values of any type as bytes."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(LARGEST_PIXEL_VALUE)
    if np.issubdtype(values.dtype, np.uint16):
        return np.rint(values / BYTE_STEP).astype(np.uint8)
    smallest = values.min()
    largest_value = values.max()
    if np.issubdtype(values.dtype, np.integer):
        if smallest < 0 or largest_value > LARGEST_PIXEL_VALUE:
            raise ValueError(
                f"{values.dtype} values from {smallest} to {largest_value}; give uint8 or uint16"
            )
        return values.astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"values of the type {values.dtype}; give uint8 or float32")
    if not np.isfinite(values).all():
        raise ValueError("values that are no finite numbers")
    is_unit = smallest >= -UNIT_OVERSHOOT and largest_value <= 1 + UNIT_OVERSHOOT
    if not is_unit and smallest < 0 and largest_value <= LARGEST_STANDARDIZED_VALUE:
        raise ValueError(
            f"{values.dtype} values from {smallest:.3g} to {largest_value:.3g}, as of a "
            "standardized picture; give uint8, or float32 from 0 to 1 or from 0 to 255"
        )
    factor = LARGEST_PIXEL_VALUE if is_unit else 1
    bounded_values: np.ndarray = np.clip(np.rint(values * factor), 0, LARGEST_PIXEL_VALUE)
    return bounded_values.astype(np.uint8)


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode as RGB."""
    if image.width == 0 or image.height == 0:
        raise ValueError(f"a picture of {image.width} x {image.height} pixels")
    if image.mode.startswith("I;16") or image.mode == "I":
        # 32-bit integers hold 16-bit pictures, whatever opened them
        values = np.clip(np.asarray(image), 0, np.iinfo(np.uint16).max).astype(np.uint16)
        transparent_value = image.info.get("transparency")
        if isinstance(transparent_value, int):
            values = np.where(values == transparent_value, np.iinfo(np.uint16).max, values)
        return _wrap_array(values).convert("RGB")
    if image.mode == "F":
        return _wrap_array(np.asarray(image)).convert("RGB")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        # Pillow converts premultiplied grey by its straight form only
        straight_image = image.convert("LA") if image.mode == "La" else image
        transparent_image = straight_image.convert("RGBA")
        white_image = Image.new("RGBA", transparent_image.size, "white")
        return Image.alpha_composite(white_image, transparent_image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _describe_source(source: ImageLike, problem: str) -> str:
    """Write a message about a picture: its name, the problem, and the size of its file."""
    if not isinstance(source, str | os.PathLike):
        return f"the given image: {problem}"
    name = str(source)[:MAX_NAME_LENGTH]
    try:
        size = os.stat(source).st_size
    except (OSError, ValueError):
        return f"{name}: {problem}"
    return f"{name}: {problem} ({size} bytes)"


def preprocess_image(source: ImageLike, config: Values) -> np.ndarray:
    """Prepare a picture for an image encoder.

    Args:
        source: A file, its bytes, an open file, an array, or an image.
        config: What to do, in this order. Sides are a number, or [height, width].

            - `square_color`: the border [red, green, blue] that first makes the picture a square.
            - `resize_mode`: "shortest" (default) brings the shorter side to `resize_to`, "longest"
              the longer one. "squash" brings both sides there. "fit" makes the picture as large as
              `resize_to` allows, "none" leaves it.
            - `resize_to`: `size` by default.
            - `longest_side`: pixels that the longer side keeps to, in the mode "shortest".
            - `interpolation`: a name of `INTERPOLATIONS`, bicubic by default.
            - `crop`: sides of the centre that is kept, with a border of `fill_color` (0) where the
              picture is smaller. By default `size` in the modes "shortest" and "longest"; None
              keeps all.
            - `crop_rounding`: where half a pixel goes: "even" (default, as torchvision) or "down"
              (as transformers).
            - `scale`: factor of the values of bytes, 1 / 255 by default.
            - `mean`, `std`: of a plane, in the units that `scale` gives.
            - `pad_to`: sides to fill up with zeros, at the right and at the bottom.
            - `size`: sides of what comes out.

    Returns:
        float32 [C, height, width], with the mean 0 and the standard deviation 1 that the encoder
        was trained with.

    Raises:
        DataError: There is no such file, it is no picture, or it comes out in another size.
    """
    image = open_image(source)
    original_size = image.size
    if config.get("square_color") is not None:
        image = _make_square(image, tuple(config["square_color"]))
    image = _resize_image(image, config)
    pixels_CHW = _standardize(image, config)
    if config.get("pad_to") is not None:
        pixels_CHW = _fill_up(pixels_CHW, _read_sides(config["pad_to"]))
    sides = _read_sides(config["size"])
    if pixels_CHW.shape[1:] != sides:
        raise DataError(
            f"{_describe_source(source, 'a picture')} of {original_size[0]} x {original_size[1]}"
            f" pixels becomes {pixels_CHW.shape[2]} x {pixels_CHW.shape[1]};"
            f" the model takes {sides[1]} x {sides[0]}, and its processor resizes to no fixed size"
        )
    return pixels_CHW


def _read_sides(value: int | list[int]) -> tuple[int, int]:
    """Return (height, width) of a number or a pair."""
    if isinstance(value, list | tuple):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def _make_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """Add a border of a color at the two longer sides."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resize_image(image: Image.Image, config: Values) -> Image.Image:
    """Bring a picture to its size, and keep the centre."""
    mode = config.get("resize_mode", "shortest")
    crops = mode in ("shortest", "longest")
    crop = config.get("crop", config["size"] if crops else None)
    size = _compute_resized_size(image, config)
    if crop is None:
        region = (0, 0, *size)
    else:
        crop_height, crop_width = _read_sides(crop)
        rounding = config.get("crop_rounding", "even")
        left = _find_crop_start(size[0] - crop_width, rounding)
        top = _find_crop_start(size[1] - crop_height, rounding)
        region = (left, top, left + crop_width, top + crop_height)
    resampling = INTERPOLATIONS[config.get("interpolation") or "bicubic"]
    return _resize_region(
        image, region, size=size, resampling=resampling, fill=int(config.get("fill_color") or 0)
    )


def _compute_resized_size(image: Image.Image, config: Values) -> tuple[int, int]:
    """Return (width, height) of the whole picture after resizing, each at least 1."""
    mode = config.get("resize_mode", "shortest")
    width, height = image.size
    if mode == "none":
        return image.size
    target: int | list[int] = config.get("resize_to") or config["size"]
    target_height, target_width = _read_sides(target)
    if mode == "squash":
        return (target_width, target_height)
    if mode == "fit":
        ratio = min(target_height / height, target_width / width)
        return (max(1, int(width * ratio)), max(1, int(height * ratio)))
    if mode == "longest" or target_height != target_width:
        choose = max if mode == "longest" else min
        ratio = choose(height / target_height, width / target_width)
        return (max(1, round(width / ratio)), max(1, round(height / ratio)))
    shorter_side = target_height
    exact_side: float = shorter_side
    longest_side = config.get("longest_side")
    if longest_side and max(image.size) / min(image.size) * shorter_side > longest_side:
        exact_side = longest_side * min(image.size) / max(image.size)
        shorter_side = round(exact_side)
        if min(image.size) == shorter_side:
            return image.size
    longer_side = int(exact_side * max(image.size) / min(image.size))
    sides = (max(1, shorter_side), max(1, longer_side))
    return sides if width <= height else (sides[1], sides[0])


def _find_crop_start(surplus: int, rounding: str) -> int:
    """Return the first row or column of the centre; a negative one lies in the border.

    Args:
        surplus: Pixels of the picture that the centre does not have.
        rounding: "even", or "down".
    """
    if rounding == "down":
        return surplus // 2
    # torchvision rounds half a pixel to the even number, and a border to fewer pixels
    return round(surplus / 2) if surplus >= 0 else -(-surplus // 2)


def _resize_region(
    image: Image.Image,
    region: tuple[int, int, int, int],
    *,
    size: tuple[int, int],
    resampling: Image.Resampling,
    fill: int,
) -> Image.Image:
    """Return a region of a picture as it is after resizing.

    Args:
        image: The picture.
        region: Left, top, right and bottom after resizing; what lies outside becomes a border.
        size: Width and height of the whole picture after resizing.
        resampling: The filter.
        fill: The border's value in each plane.
    """
    left, top, right, bottom = region
    inner_left = max(left, 0)
    inner_top = max(top, 0)
    inner = (inner_left, inner_top, min(right, size[0]), min(bottom, size[1]))
    inner_size = (inner[2] - inner_left, inner[3] - inner_top)
    if size[0] * size[1] <= MAX_RESIZED_PIXELS:
        part = image if image.size == size else image.resize(size, resampling)
        part = part if inner == (0, 0, *size) else part.crop(inner)
    elif image.size == size:
        part = image.crop(inner)
    else:
        horizontal_scale = image.width / size[0]
        vertical_scale = image.height / size[1]
        box = (
            inner[0] * horizontal_scale,
            inner[1] * vertical_scale,
            inner[2] * horizontal_scale,
            inner[3] * vertical_scale,
        )
        part = image.resize(inner_size, resampling, box=box)
    if inner == region:
        return part
    canvas = Image.new("RGB", (right - left, bottom - top), (fill, fill, fill))
    canvas.paste(part, (inner_left - left, inner_top - top))
    return canvas


def _standardize(image: Image.Image, config: Values) -> np.ndarray:
    """Return the pixels of a picture with the mean 0 and the standard deviation 1."""
    # planes first: numpy is slow where the last axis has three entries
    planes_CHW = np.asarray(image).transpose(2, 0, 1)
    pixels_CHW = planes_CHW.astype(np.float32, order="C")
    scale = config.get("scale")
    unit = LARGEST_PIXEL_VALUE if scale is None else 1 / float(scale)
    means = np.broadcast_to(config["mean"], 3)
    deviations = np.broadcast_to(config["std"], 3)
    for plane_HW, mean, deviation in zip(pixels_CHW, means, deviations, strict=True):
        plane_HW -= np.float32(mean) * unit
        plane_HW /= np.float32(deviation) * unit
    return pixels_CHW


def _fill_up(pixels_CHW: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Add zeros at the right and at the bottom, up to a height and a width."""
    missing_rows = max(0, sides[0] - pixels_CHW.shape[1])
    missing_columns = max(0, sides[1] - pixels_CHW.shape[2])
    return np.pad(pixels_CHW, ((0, 0), (0, missing_rows), (0, missing_columns)))
