"""An audio encoder on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from mmcompress.runtime.audio import (
    SILENCE_DECIBELS,
    AudioLike,
    compute_log_mel,
    is_silent,
    open_audio,
    split_sound,
)
from mmcompress.runtime.check_values import Rules, require_number, require_whole_number
from mmcompress.runtime.sessions import TimedSession
from mmcompress.runtime.text import Values

WINDOW_BATCH = 4
"""Windows that the model is given at once. One window of Whisper large takes 200 MB inside; more at
once are hardly faster on a CPU."""


class AudioEncoder:
    """A sound to embeddings, float32 [k, d], and tokens, float32 [j, n, w].

    A sound that is longer than the model's window is heard in k windows. Windows of silence have an
    embedding and no tokens, so that a generator writes nothing of them; j windows are left. A sound
    of silence alone also has `warnings`.
    """

    CONFIG_RULES: ClassVar[Rules] = {
        "features": {
            "mels": require_whole_number(1, 1024),
            "frames": require_whole_number(1, 60_000),
            "seconds": require_number(0.1, 600.0),
        }
    }
    """What the manifest may say of the configuration. A window has ten minutes at most."""

    def __init__(self, sessions: dict[str, TimedSession], config: Values, folder: Path):
        self.session = sessions["model"]
        self.options = config["features"]

    def __call__(self, audio: AudioLike) -> Values:
        """Encode a sound: a file, its bytes, or samples at 16 kHz."""
        windows = self._split(audio)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.session.outputs}
        for start in range(0, len(windows), WINDOW_BATCH):
            features = self._compute_features(windows[start : start + WINDOW_BATCH])
            results = self.session({"features": features})
            for name, result in zip(self.session.outputs, results, strict=True):
                parts[name].append(result)
        outputs: Values = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        audible = np.array([not is_silent(window) for window in windows])
        if "tokens" in outputs and not audible.all():
            outputs["tokens"] = outputs["tokens"][audible]
        if not audible.any():
            outputs["warnings"] = [
                "the sound is silent: no part of it reaches "
                f"{SILENCE_DECIBELS:g} dB of full scale, so nothing is written of it"
            ]
        return outputs

    def prepare(self, audio: AudioLike) -> np.ndarray:
        """Return the features [k, m, f] that the model is given."""
        return self._compute_features(self._split(audio))

    def _split(self, audio: AudioLike) -> list[np.ndarray]:
        """Return the samples of every window."""
        return split_sound(open_audio(audio), float(self.options["seconds"]))

    def _compute_features(self, windows: list[np.ndarray]) -> np.ndarray:
        """Return the features of windows [k, m, f]."""
        return np.stack([compute_log_mel(window, self.options) for window in windows])
