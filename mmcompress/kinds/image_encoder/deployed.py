"""An image encoder on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import DataError
from mmcompress.runtime.images import preprocess_image
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class ImageEncoder:
    """A picture to an embedding, float32 [1, d] of length 1, and tokens, float32 [1, n, w]."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.preprocessing = config["preprocess"]

    def __call__(self, image: Any) -> Values:
        """Encode a picture: a file, its bytes, an array, or pixels that are prepared already.

        Prepared ones are float32 [1, 3, height, width].
        """
        results = self.session({"pixels": self.prepare(image)})
        return dict(zip(self.session.outputs, results, strict=True))

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
