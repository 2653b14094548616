"""An image encoder on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mmcompress.errors import DataError
from mmcompress.runtime.check_values import (
    Rules,
    allow_either,
    require_list,
    require_number,
    require_whole_number,
)
from mmcompress.runtime.images import preprocess_image
from mmcompress.runtime.sessions import TimedSession, split_rows
from mmcompress.runtime.text import Values

PIXELS = require_whole_number(1, 4096)
"""Pixels of a side: a picture of more would take seconds and gigabytes."""

MEAN = require_number(-1000.0, 1000.0)
"""Mean of a plane: in 0..1, or in 0..255 where a processor does not rescale."""

DEVIATION = require_number(1e-6, 1e6)
"""Standard deviation of a plane: pixels are divided by it."""


class ImageEncoder:
    """A picture to an embedding, float32 [1, d] of length 1, and tokens, float32 [1, n, w]."""

    CONFIG_RULES: ClassVar[Rules] = {
        "preprocess": {
            "size": allow_either(PIXELS, require_list(PIXELS, max_length=2)),
            "mean": allow_either(MEAN, require_list(MEAN, max_length=3)),
            "std": allow_either(DEVIATION, require_list(DEVIATION, max_length=3)),
        }
    }
    """What the manifest may say of the configuration."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.preprocessing = config["preprocess"]

    def __call__(self, image: Any) -> Values:
        """Encode a picture: a file, its bytes, an array, or pixels that are prepared already.

        Prepared ones are float32 [1, 3, height, width].
        """
        return self.answer_batch([{"image": image}])[0]

    def answer_batch(self, requests: Sequence[Values]) -> list[Values]:
        """Encode the pictures of several requests in one call: an `image` each."""
        pixels = [self.prepare(request["image"]) for request in requests]
        results = self.session({"pixels": np.concatenate(pixels)})
        return split_rows(self.session.outputs, results, counts=[len(rows) for rows in pixels])

    def prepare(self, image: Any) -> np.ndarray:
        """Return the pixels [1, 3, height, width] that the model is given."""
        if isinstance(image, np.ndarray) and image.ndim == 4:
            return self._check_prepared(image)
        return preprocess_image(image, self.preprocessing)[None]

    def _check_prepared(self, pixels: np.ndarray) -> np.ndarray:
        """Return prepared pixels as float32, or raise `DataError`."""
        size = self.preprocessing["size"]
        sides = size if isinstance(size, list) else [size, size]
        if list(pixels.shape[1:]) == [3, *sides] and np.issubdtype(pixels.dtype, np.floating):
            return pixels.astype(np.float32, copy=False)
        raise DataError(
            f"the given pixels are {pixels.dtype} {list(pixels.shape)}; prepared ones are float32"
            f" {[1, 3, *sides]}, and a picture is an array of three axes"
        )
