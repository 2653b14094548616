"""An image encoder on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.runtime.images import preprocess_image
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class ImageEncoder:
    """A picture to an embedding, float32 [1, d] of length 1, and tokens, float32 [1, n, w]."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.preprocessing = config["preprocess"]

    def __call__(self, image: Any) -> Values:
        """Encode a picture: a file, its bytes, an array, or pixels [1, 3, s, s] that are prepared
        already."""
        results = self.session({"pixels": self.prepare(image)})
        return dict(zip(self.session.outputs, results, strict=True))

    def prepare(self, image: Any) -> np.ndarray:
        """Return the pixels [1, 3, s, s] that the model is given."""
        if isinstance(image, np.ndarray) and image.ndim == 4:
            return image
        return preprocess_image(image, self.preprocessing)[None]
