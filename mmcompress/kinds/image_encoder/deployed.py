"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.runtime.images import preprocess_image
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class ImageEncoder:
    """image -> embedding float32 [1, d] of length 1, tokens float32 [1, n, w]."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.model, self.config = sessions["model"], config["preprocess"]

    def __call__(self, image: Any) -> Values:
        pixels = (
            image
            if isinstance(image, np.ndarray) and image.ndim == 4
            else preprocess_image(image, self.config)[None]
        )
        return dict(zip(self.model.outputs, self.model({"pixels": pixels}), strict=True))
