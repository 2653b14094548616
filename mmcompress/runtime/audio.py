"""Sound as log-mel features, as Whisper reads it (Radford et al. 2022), in numpy.

Files are decoded in `sound_files.py`: a device that is given samples needs no library for sound.

Shapes: F frames of 10 ms, N samples of a window, K frequency bins, M mel bands.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmcompress.registry import resolve_entry
from mmcompress.runtime.samples import normalize_samples, unpack_rate

SAMPLE_RATE = 16_000
"""Samples per second that every sound is brought to."""

WINDOW = 400
"""Samples that one frame looks at: 25 ms."""

HOP = 160
"""Samples from one frame to the next: 10 ms."""

TOKENS_PER_SECOND = 50
"""Tokens that Whisper's encoder makes of a second of sound: each spans two frames, 20 ms."""

CUT_REGION_DIVISOR = 5
"""A long sound is cut in the last fifth of a window: earlier cuts would waste too much of it."""

CUT_QUIET_SAMPLES = SAMPLE_RATE // 10
"""Samples over which a spot must be quiet to be cut there: 100 ms, a short pause between words."""

SLANEY_BREAK_HZ = 1000.0
"""Hertz: below, the mel scale of Slaney (Auditory Toolbox, 1998) is linear, above logarithmic."""

SLANEY_HZ_PER_MEL = 200 / 3
"""Hertz per mel below the break."""

SLANEY_BREAK_MEL = 15
"""The break in mel."""

SLANEY_LOG_STEP = np.log(6.4) / 27
"""Natural logarithm of the frequency, per mel above the break."""

MIN_POWER = 1e-10
"""Power that counts as silence: a logarithm needs more than 0."""

DYNAMIC_RANGE = 8
"""Powers of ten below the loudest spot that are kept; Whisper was trained with as many."""

SILENCE_DECIBELS = -70.0
"""Decibels below full scale (RMS of a frame): a sound whose loudest frame lies below is silent.

Speech that quiet would have the last 4 of 16 bits. Recordings of a quiet room lie at -60 and above.
A model that never met silence writes "you" or a whole sentence of it. transformers has
`no_speech_threshold` against this; it asks the model, needs its first scores, and is off by
default.
"""

AudioLike = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | np.ndarray
    | Sequence[Any]
    | Mapping[str, Any]
)
"""A file, its bytes, an open file, or samples: an array or lists (`samples.normalize_samples`),
alone at 16 kHz or with their rate (`samples.unpack_rate`)."""


def open_audio(source: AudioLike) -> np.ndarray:
    """Open a sound.

    Args:
        source: A file of any format that libsndfile reads, its bytes, an open file, or samples.

    Returns:
        Samples float32 at 16 kHz, mono, in -1..1.

    Raises:
        DataError: There is no such file, it is no sound, or samples are NaN or infinite.
        MissingPackage: soundfile or soxr is not installed.
    """
    if isinstance(source, str | os.PathLike):
        return _decode_sound(Path(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode_sound(bytes(source))
    if hasattr(source, "read"):
        return _decode_sound(source.read())
    values, rate = unpack_rate(source, default_rate=SAMPLE_RATE)
    samples = normalize_samples(values)
    if rate == SAMPLE_RATE:
        return samples
    resample = resolve_entry("mmcompress.runtime.sound_files:resample")
    resampled: np.ndarray = resample(samples, rate, new_rate=SAMPLE_RATE)
    return resampled


def _decode_sound(source: Path | bytes) -> np.ndarray:
    """Decode a sound by the optional libraries."""
    decode_sound = resolve_entry("mmcompress.runtime.sound_files:decode_sound")
    samples: np.ndarray = decode_sound(source, SAMPLE_RATE)
    return samples


def is_silent(samples: np.ndarray) -> bool:
    """Return whether no frame of a sound is louder than `SILENCE_DECIBELS`.

    The loudness of a frame is its standard deviation: an offset of a microphone is no sound.
    """
    if not len(samples):
        return True
    frame_count = len(samples) // WINDOW
    frames_FN = samples[: frame_count * WINDOW].reshape(frame_count, WINDOW)
    last_frame = samples[-WINDOW:]
    loudest = max(float(frames_FN.std(axis=1).max(initial=0)), float(last_frame.std()))
    return loudest < 10 ** (SILENCE_DECIBELS / 20)


def check_audio(path: Path) -> None:
    """Check a sound file by its header.

    Args:
        path: The file.

    Raises:
        DataError: There is no such file, or it is no sound.
        MissingPackage: soundfile or soxr is not installed.
    """
    check_header = resolve_entry("mmcompress.runtime.sound_files:check_header")
    check_header(path)


def split_sound(samples: np.ndarray, seconds: float) -> list[np.ndarray]:
    """Split a sound into pieces for a window, in order, with nothing left out.

    Args:
        samples: Samples at 16 kHz.
        seconds: Seconds of the longest piece.

    Returns:
        Pieces; each but the last ends at the quietest spot of the last fifth of the window.
    """
    limit = int(seconds * SAMPLE_RATE)
    pieces: list[np.ndarray] = []
    remaining_samples = samples
    while len(remaining_samples) > limit:
        cut = _find_quiet_spot(remaining_samples, limit)
        pieces.append(remaining_samples[:cut])
        remaining_samples = remaining_samples[cut:]
    return [*pieces, remaining_samples]


def _find_quiet_spot(samples: np.ndarray, limit: int) -> int:
    """Find the index of the quietest spot in the last fifth of the first `limit` samples."""
    region_start = limit - limit // CUT_REGION_DIVISOR
    loudness = np.abs(samples[region_start:limit])
    # the last fifth of a short window holds no stretch of that length
    stretch = max(1, min(CUT_QUIET_SAMPLES, len(loudness)))
    stretch_loudness = np.convolve(loudness, np.ones(stretch), mode="valid")
    quiet_start = region_start + int(stretch_loudness.argmin())
    # the middle of the quiet stretch
    return max(1, quiet_start + stretch // 2)


@lru_cache(maxsize=4)
def build_mel_filters(mels: int) -> np.ndarray:
    """Build triangular filters on Slaney's mel scale, each of unit area.

    Args:
        mels: Bands from 0 to 8 kHz.

    Returns:
        float64 [K, M], with 201 frequency bins.
    """
    highest_hz = SAMPLE_RATE / 2
    lowest_mel = _convert_to_mel(np.float64(0))
    highest_mel = _convert_to_mel(np.float64(highest_hz))
    edges = _convert_to_hz(np.linspace(lowest_mel, highest_mel, mels + 2))
    bins_K1 = np.linspace(0, highest_hz, WINDOW // 2 + 1)[:, None]
    widths = np.diff(edges)
    rising_KM = (bins_K1 - edges[:-2]) / widths[:-1]
    falling_KM = (edges[2:] - bins_K1) / widths[1:]
    triangles_KM = np.maximum(0, np.minimum(rising_KM, falling_KM))
    base_widths_M = edges[2:] - edges[:-2]
    filters_KM: np.ndarray = triangles_KM * (2 / base_widths_M)
    return filters_KM


def _convert_to_mel(hz: np.ndarray | np.float64) -> np.ndarray:
    """Convert hertz to Slaney's mel scale."""
    linear = hz / SLANEY_HZ_PER_MEL
    # the floor keeps 0 Hz, whose logarithm is not used, from warning
    positive_hz = np.maximum(hz, 1e-9)
    logarithm = np.log(positive_hz / SLANEY_BREAK_HZ)
    logarithmic = SLANEY_BREAK_MEL + logarithm / SLANEY_LOG_STEP
    return np.where(hz < SLANEY_BREAK_HZ, linear, logarithmic)


def _convert_to_hz(mel: np.ndarray) -> np.ndarray:
    """Convert Slaney's mel scale to hertz."""
    linear = mel * SLANEY_HZ_PER_MEL
    logarithmic = SLANEY_BREAK_HZ * np.exp(SLANEY_LOG_STEP * (mel - SLANEY_BREAK_MEL))
    return np.where(mel < SLANEY_BREAK_MEL, linear, logarithmic)


def compute_log_mel(samples: np.ndarray, config: Mapping[str, float]) -> np.ndarray:
    """Compute the features that Whisper reads.

    features = (max(m, max over all of m - 8) + 4) / 4, with m = log10 of the power in each mel
    band.

    Args:
        samples: Samples at 16 kHz; padded with silence or cut to the frames.
        config: `mels`: bands; `frames`: frames of 10 ms.

    Returns:
        float32 [M, F].
    """
    frames = int(config["frames"])
    sound = np.zeros(frames * HOP, np.float64)
    sound[: len(samples)] = samples[: len(sound)]
    padded_sound = np.pad(sound, WINDOW // 2, mode="reflect")
    hann_N = np.hanning(WINDOW + 1)[:-1]
    windows = np.lib.stride_tricks.sliding_window_view(padded_sound, WINDOW)
    pieces_FN = windows[::HOP][:frames]
    spectrum_FK = np.fft.rfft(pieces_FN * hann_N, axis=1)
    power_FK = np.abs(spectrum_FK) ** 2
    power_FM = power_FK @ build_mel_filters(int(config["mels"]))
    log_power_MF = np.log10(np.maximum(power_FM, MIN_POWER)).T
    audible_MF = np.maximum(log_power_MF, log_power_MF.max() - DYNAMIC_RANGE)
    features_MF: np.ndarray = ((audible_MF + 4) / 4).astype(np.float32)
    return features_MF
