"""Sound files, decoded by libsndfile (soundfile) and brought to another rate by soxr."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile
import soxr

from mmcompress.errors import DataError


def decode_sound(source: str | Path | bytes, sample_rate: int) -> np.ndarray:
    """Decode a sound.

    Args:
        source: A file of any format that libsndfile reads, or its bytes.
        sample_rate: Samples per second of the result.

    Returns:
        Samples float32, mono, in -1..1.

    Raises:
        DataError: There is no such file, or it is no sound.
    """
    file: io.BytesIO | str
    if isinstance(source, bytes):
        name = "the given audio"
        file = io.BytesIO(source)
    else:
        name = file = str(source)
        if not Path(source).is_file():
            raise DataError(f"{name}: no such sound file")
    try:
        samples, file_rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise DataError(f"{name}: not readable sound: {error}") from error
    if not len(samples):
        raise DataError(f"{name}: holds no sound")
    mono: np.ndarray = samples.mean(1)
    if file_rate == sample_rate:
        return mono
    resampled: np.ndarray = soxr.resample(mono, file_rate, sample_rate)
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
