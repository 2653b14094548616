"""An audio encoder on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
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
from mmcompress.runtime.sessions import TimedSession, split_rows
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
        return self.answer_batch([{"audio": audio}])[0]

    def answer_batch(self, requests: Sequence[Values]) -> list[Values]:
        """Encode the sounds of several requests together: an `audio` each.

        The model is given as many windows at once as there are requests, and `WINDOW_BATCH` at
        least.
        """
        windows_by_request = [self._split(request["audio"]) for request in requests]
        windows = [window for own_windows in windows_by_request for window in own_windows]
        windows_at_once = max(WINDOW_BATCH, len(requests))
        parts: list[list[np.ndarray]] = []
        for start in range(0, len(windows), windows_at_once):
            features = self._compute_features(windows[start : start + windows_at_once])
            parts.append(self.session({"features": features}))
        results = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        counts = [len(own_windows) for own_windows in windows_by_request]
        answers = split_rows(self.session.outputs, results, counts=counts)
        for outputs, own_windows in zip(answers, windows_by_request, strict=True):
            _leave_out_silence_(outputs, own_windows)
        return answers

    def prepare(self, audio: AudioLike) -> np.ndarray:
        """Return the features [k, m, f] that the model is given."""
        return self._compute_features(self._split(audio))

    def _split(self, audio: AudioLike) -> list[np.ndarray]:
        """Return the samples of every window."""
        return split_sound(open_audio(audio), float(self.options["seconds"]))

    def _compute_features(self, windows: list[np.ndarray]) -> np.ndarray:
        """Return the features of windows [k, m, f]."""
        return np.stack([compute_log_mel(window, self.options) for window in windows])


def _leave_out_silence_(outputs: Values, windows: Sequence[np.ndarray]) -> None:
    """Leave the tokens of silent windows out of the outputs of a sound; tell of a silent sound."""
    audible = np.array([not is_silent(window) for window in windows])
    if "tokens" in outputs and not audible.all():
        outputs["tokens"] = outputs["tokens"][audible]
    if not audible.any():
        outputs["warnings"] = [
            "the sound is silent: no part of it reaches "
            f"{SILENCE_DECIBELS:g} dB of full scale, so nothing is written of it"
        ]
