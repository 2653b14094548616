"""An audio encoder on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.audio import AudioLike, compute_log_mel, open_audio, split_sound
from mmcompress.runtime.check_values import Rules, number, whole_number
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values

MAX_WINDOWS_AT_ONCE = 8
"""Windows of one call: an hour of sound in one would take gigabytes."""


class AudioEncoder:
    """A sound to embeddings, float32 [k, d], and tokens, float32 [k, n, w].

    A sound that is longer than the model's window is heard in k windows.
    """

    CONFIG_RULES: ClassVar[Rules] = {
        "features": {
            "mels": whole_number(1, 1024),
            "frames": whole_number(1, 60_000),
            "seconds": number(0.1, 600.0),
        }
    }
    """What the manifest may say of the configuration. A window has ten minutes at most."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.options = config["features"]

    def __call__(self, audio: AudioLike) -> Values:
        """Encode a sound: a file, its bytes, or samples at 16 kHz."""
        features = self.prepare(audio)
        parts = []
        for start in range(0, len(features), MAX_WINDOWS_AT_ONCE):
            parts.append(self.session({"features": features[start : start + MAX_WINDOWS_AT_ONCE]}))
        if len(parts) == 1:
            return dict(zip(self.session.outputs, parts[0], strict=True))
        joined = [np.concatenate(values) for values in zip(*parts, strict=True)]
        return dict(zip(self.session.outputs, joined, strict=True))

    def prepare(self, audio: AudioLike) -> np.ndarray:
        """Return the features [k, m, f] that the model is given."""
        windows = split_sound(open_audio(audio), float(self.options["seconds"]))
        return np.stack([compute_log_mel(window, self.options) for window in windows])
