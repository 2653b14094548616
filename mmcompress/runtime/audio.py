"""Sound file -> log-mel features as Whisper reads them (Radford et al. 2022), in numpy."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import DataError, MissingPackage

SAMPLE_RATE, WINDOW, HOP = 16_000, 400, 160


AudioLike = str | Path | bytes | np.ndarray
"""A file, its bytes, or samples at 16 kHz, mono, in -1..1."""


def open_audio(source: AudioLike) -> np.ndarray:
    """Any sound file as float32 samples at 16 kHz, mono. Raises `DataError` for what is no sound."""
    if isinstance(source, np.ndarray):
        return source.astype(np.float32)
    try:
        import soundfile
        import soxr
    except ImportError as e:
        raise MissingPackage("soundfile", "audio") from e
    name = "the given audio" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise DataError(f"{name}: no such sound file")
    try:
        samples, rate = soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else str(source),
            dtype="float32",
            always_2d=True,
        )
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as e:
        raise DataError(f"{name}: not readable sound: {e}") from e
    if not len(samples):
        raise DataError(f"{name}: holds no sound")
    mono = samples.mean(1)
    return (
        mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32)
    )


def check_audio(path: Path) -> None:
    """Read the header alone. Raises `DataError` as `open_audio` would."""
    try:
        import soundfile
    except ImportError as e:
        raise MissingPackage("soundfile", "audio") from e
    if not path.is_file():
        raise DataError(f"{path}: no such sound file")
    try:
        found = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise DataError(f"{path}: not readable sound ({path.stat().st_size} bytes): {e}") from e
    if not found.frames:
        raise DataError(f"{path}: holds no sound")


def split_sound(samples: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Pieces of at most `seconds`, in order, nothing left out; a cut falls on the quietest spot near the limit."""
    limit, pieces = int(seconds * SAMPLE_RATE), []
    while len(samples) > limit:
        tail = np.abs(samples[limit - limit // 5 : limit])
        heard = (
            np.convolve(tail, np.ones(SAMPLE_RATE // 10), mode="valid")
            if len(tail) >= SAMPLE_RATE // 10
            else tail
        )
        at = max(1, limit - limit // 5 + int(heard.argmin()) + SAMPLE_RATE // 20)
        pieces.append(samples[:at])
        samples = samples[at:]
    return [*pieces, samples]


@lru_cache(maxsize=4)
def build_mel_filters(mels: int) -> np.ndarray:
    """Triangles on Slaney's mel scale, each of unit area, [bins, mels]: 0 to 8 kHz over 201 frequency bins."""
    linear, step = 200 / 3, np.log(6.4) / 27
    to_mel = lambda f: np.where(
        f < 1000, f / linear, 15 + np.log(np.maximum(f, 1e-9) / 1000) / step
    )
    to_hz = lambda m: np.where(m < 15, m * linear, 1000 * np.exp(step * (m - 15)))
    edges = to_hz(np.linspace(to_mel(np.float64(0)), to_mel(np.float64(SAMPLE_RATE / 2)), mels + 2))
    bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - bins) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))


def compute_log_mel(samples: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Samples at 16 kHz -> float32 [mels, frames]; padded with silence or cut to `frames` of 10 ms."""
    frames = int(config["frames"])
    padded = np.zeros(frames * HOP, np.float64)
    padded[: len(samples)] = samples[: len(padded)]
    padded = np.pad(padded, WINDOW // 2, mode="reflect")
    window = np.hanning(WINDOW + 1)[:-1]
    pieces = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:frames]
    power = np.abs(np.fft.rfft(pieces * window, axis=1)) ** 2
    mel = np.log10(np.maximum(power @ build_mel_filters(int(config["mels"])), 1e-10)).T
    return ((np.maximum(mel, mel.max() - 8) + 4) / 4).astype(np.float32)
