"""What an image processor of transformers does, as plain data for `runtime.images`.

transformers itself reads the file and fills in the defaults of the processor's class. So a new
version, an old file and a nested one need nothing here. What can't be followed is refused by the
name of its key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.processing_utils import ImagesKwargs

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext
from mmcompress.models.hub import describe_source, load_image_processor

PIXEL_METHODS = (
    "preprocess",
    "process_image",
    "convert_to_rgb",
    "resize",
    "center_crop",
    "rescale",
    "normalize",
    "pad",
    "_preprocess",
    "_prepare_image_like_inputs",
    "_preprocess_image_like_inputs",
)
"""Methods of a processor that make its pixels. A class with others of its own is not followed."""

INTERPOLATION_BY_NUMBER = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""The runtime's names of Pillow's filters, by the number that `resample` has."""

MAX_SIDE = 4096
"""Pixels of a side at most; more is a mistake, and would ask for gigabytes."""

Preprocessing = dict[str, Any]
"""Keys of `runtime.images.preprocess_image`."""


def read_preprocessing(context: LoadContext, model_sides: tuple[int, int]) -> Preprocessing:
    """Read how the image processor of a model prepares a picture.

    Args:
        context: Where the model is.
        model_sides: Height and width that the model was made for. They count where the processor
            resizes nothing.

    Returns:
        Keys of `runtime.images.preprocess_image`, with `size` as [height, width].

    Raises:
        ModelError: There is no processor, or it does something that is not followed here.
    """
    processor = load_image_processor(context)
    reader = _ProcessorReader(processor, describe_source(context))
    reader.refuse_other_classes()
    preprocessing: Preprocessing = {
        **reader.read_values(),
        **reader.read_resizing(),
        **reader.read_borders(),
    }
    preprocessing["size"] = reader.find_sides(preprocessing, model_sides)
    return preprocessing


class _ProcessorReader:
    """Reads one processor; every refusal names the source and the key.

    Args:
        processor: The processor, as the library loads it for Pillow.
        source: The name of its model, for messages.
    """

    def __init__(self, processor: Any, source: str):
        self.processor = processor
        self.place = f"{source}: image processor {type(processor).__name__.removesuffix('Pil')}"

    def refuse_other_classes(self) -> None:
        """Refuse a class that makes its pixels in a way of its own."""
        processor_class = type(self.processor)
        if processor_class is LlavaImageProcessorPil:
            return
        known_keys = ImagesKwargs.__annotations__
        class_keys = getattr(processor_class, "valid_kwargs", ImagesKwargs).__annotations__
        own_keys = [key for key in class_keys if key not in known_keys]
        is_plain = issubclass(processor_class, PilBackend)
        for name in PIXEL_METHODS:
            own_method = getattr(processor_class, name, None)
            is_plain = is_plain and own_method is getattr(PilBackend, name)
        if own_keys or not is_plain:
            keys = f" and its keys {', '.join(sorted(own_keys))}" if own_keys else ""
            raise self._refuse(
                f"its class{keys} can't be followed; resizing, cropping, scaling and normalizing"
                " as in CLIPImageProcessor or ViTImageProcessor can"
            )

    def _refuse(self, problem: str) -> ModelError:
        """Return the error about something that is not followed."""
        return ModelError(f"{self.place}: {problem}")

    def read_values(self) -> Preprocessing:
        """Read how the values of bytes become those of pixels."""
        processor = self.processor
        values: Preprocessing = {"mean": [0.0] * 3, "std": [1.0] * 3}
        if processor.do_normalize:
            values["mean"] = self._read_planes("image_mean")
            values["std"] = self._read_planes("image_std")
            if min(values["std"]) <= 0:
                raise self._refuse(f"image_std: {values['std']}; each must be above 0")
        scale = self._read_scale() if processor.do_rescale else 1.0
        # the runtime's default needs no key, and rounds in one way everywhere
        if scale != 1 / 255:
            values["scale"] = scale
        return values

    def _read_planes(self, key: str) -> list[float]:
        """Read three numbers, or one for all planes."""
        value = getattr(self.processor, key)
        try:
            numbers = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            numbers = np.array(np.nan)
        if numbers.shape not in ((), (3,)) or not np.isfinite(numbers).all():
            raise self._refuse(f"{key}: {value}; expected three numbers")
        return [float(number) for number in np.broadcast_to(numbers, 3)]

    def _read_scale(self) -> float:
        """Read the factor of the values of bytes."""
        factor = self.processor.rescale_factor
        if isinstance(factor, int | float) and 0 < factor < float("inf"):
            return float(factor)
        raise self._refuse(f"rescale_factor: {factor}; expected a number above 0")

    def read_resizing(self) -> Preprocessing:
        """Read how a picture is resized."""
        if not self.processor.do_resize:
            return {"resize_mode": "none"}
        resizing: Preprocessing = {"interpolation": self._read_interpolation()}
        size = self._read_size("size")
        shortest = size.get("shortest_edge")
        if shortest and set(size) <= {"shortest_edge", "longest_edge"}:
            resizing |= {"resize_mode": "shortest", "resize_to": shortest}
            if "longest_edge" in size:
                resizing["longest_side"] = size["longest_edge"]
        elif set(size) == {"height", "width"}:
            resizing |= {"resize_mode": "squash", "resize_to": [size["height"], size["width"]]}
        elif set(size) == {"max_height", "max_width"}:
            resizing |= {"resize_mode": "fit", "resize_to": [size["max_height"], size["max_width"]]}
        else:
            raise self._refuse(
                f"size: {size}; expected height and width, shortest_edge with or without"
                " longest_edge, or max_height and max_width"
            )
        return resizing

    def _read_interpolation(self) -> str:
        """Read the name of the filter."""
        number = self.processor.resample
        is_number = isinstance(number, int) and not isinstance(number, bool)
        if not is_number or not 0 <= number < len(INTERPOLATION_BY_NUMBER):
            raise self._refuse(f"resample: {number}; expected 0 to 5")
        return INTERPOLATION_BY_NUMBER[number]

    def _read_size(self, key: str) -> dict[str, int]:
        """Read a size as a mapping of what it names."""
        named_sides: dict[str, int] = dict(getattr(self.processor, key) or {})
        for name, side in named_sides.items():
            if not isinstance(side, int) or not 0 < side <= MAX_SIDE:
                raise self._refuse(f"{key}.{name}: {side}; expected 1 to {MAX_SIDE} pixels")
        return named_sides

    def _read_rectangle(self, key: str, switch: str) -> list[int]:
        """Read a size that must be a height and a width."""
        size = self._read_size(key)
        if set(size) != {"height", "width"}:
            raise self._refuse(f"{key}: {size or None} beside {switch}: true; name height, width")
        return [size["height"], size["width"]]

    def read_borders(self) -> Preprocessing:
        """Read what is cut off a picture and what is added around it."""
        processor = self.processor
        borders: Preprocessing = {"crop": None}
        if processor.do_center_crop:
            borders["crop"] = self._read_rectangle("crop_size", "do_center_crop")
            borders["crop_rounding"] = "down"
        if not processor.do_pad:
            return borders
        if isinstance(processor, LlavaImageProcessorPil):
            borders["square_color"] = [0, 0, 0]
            if processor.image_mean:
                means = self._read_planes("image_mean")
                borders["square_color"] = [int(mean * 255) for mean in means]
        elif processor.pad_size is not None:
            borders["pad_to"] = self._read_rectangle("pad_size", "do_pad")
        # else the library pads to the largest picture of a batch: one alone stays as it is
        return borders

    def find_sides(self, preprocessing: Preprocessing, model_sides: tuple[int, int]) -> list[int]:
        """Return [height, width] of what the processor gives, or refuse one without fixed sides."""
        resize_mode = preprocessing["resize_mode"]
        if "pad_to" in preprocessing:
            return list(preprocessing["pad_to"])
        if preprocessing["crop"] is not None:
            return list(preprocessing["crop"])
        if resize_mode == "squash":
            return list(preprocessing["resize_to"])
        if resize_mode == "none":
            return list(model_sides)
        is_square = "square_color" in preprocessing
        if is_square and resize_mode == "shortest" and "longest_side" not in preprocessing:
            return [preprocessing["resize_to"]] * 2
        raise self._refuse(
            f"size: {self._read_size('size')} without do_center_crop gives every picture sides of"
            " its own, and a compressed model takes one size. Set do_center_crop: true with"
            " crop_size, or size: {height, width}"
        )
