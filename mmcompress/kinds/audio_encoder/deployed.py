"""TODO."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmcompress.runtime.audio import AudioLike, compute_log_mel, open_audio, split_sound
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values


class AudioEncoder:
    """audio -> embedding float32 [k, d], tokens float32 [k, n, w]; sound longer than the window makes k windows."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.model, self.config = sessions["model"], config["features"]

    def __call__(self, audio: AudioLike) -> Values:
        pieces = split_sound(open_audio(audio), float(self.config["seconds"]))
        features = np.stack([compute_log_mel(p, self.config) for p in pieces])
        return dict(zip(self.model.outputs, self.model({"features": features}), strict=True))
