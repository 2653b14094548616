"""Sound files, decoded by libsndfile (soundfile) and brought to another rate by soxr."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile
import soxr

from mmcompress.errors import DataError
from mmcompress.runtime.samples import check_samples

BLOCK_FRAMES = 2**20
"""Frames decoded at once: 65 s at 16 kHz, 4 MB a channel."""


def decode_sound(source: Path | bytes, sample_rate: int) -> np.ndarray:
    """Decode a sound.

    Args:
        source: A file of any format that libsndfile reads, or its bytes.
        sample_rate: Samples per second of the result.

    Returns:
        Samples float32, mono, in -1..1.

    Raises:
        DataError: There is no such file, it is no sound, or samples are NaN or infinite.
    """
    file: io.BytesIO | str
    if isinstance(source, bytes):
        name = "the given audio"
        file = io.BytesIO(source)
    else:
        name = file = str(source)
        if not source.is_file():
            raise DataError(f"{name}: no such sound file")
    parts: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(file) as sound:
            file_rate = sound.samplerate
            # an hour of many channels is never in memory as a whole
            for block in sound.blocks(BLOCK_FRAMES, dtype="float32", always_2d=True):
                parts.append(block.mean(1))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise DataError(f"{name}: not readable sound: {error}") from error
    mono = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    check_samples(mono, name=name)
    return resample(mono, file_rate, new_rate=sample_rate)


def resample(samples: np.ndarray, rate: int, *, new_rate: int) -> np.ndarray:
    """Bring samples to another rate.

    Args:
        samples: float32 [n].
        rate: Samples per second.
        new_rate: Samples per second of the result.

    Returns:
        float32 [n * new_rate / rate], and never empty.
    """
    if rate == new_rate:
        return samples
    resampled: np.ndarray = soxr.resample(samples, rate, new_rate)
    if not len(resampled):
        # a sound that is shorter than one new sample
        return samples[:1].astype(np.float32)
    return resampled.astype(np.float32)


def check_header(path: Path) -> None:
    """Check a sound file by its header.

    Args:
        path: The file.

    Raises:
        DataError: There is no such file, or it is no sound.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such sound file")
    try:
        header = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        size = path.stat().st_size
        raise DataError(f"{path}: not readable sound ({size} bytes): {error}") from error
    if not header.frames:
        raise DataError(f"{path}: holds no sound")
