"""Sound files, decoded by libsndfile (soundfile) and brought to another rate by soxr."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr

from mmcompress.errors import DataError, shorten
from mmcompress.runtime.samples import check_rate, check_samples

BLOCK_SAMPLES = 2**21
"""Samples of all channels that are decoded at once: 65 s of stereo at 16 kHz, 8 MB."""


CHUNK_FILES: dict[bytes, tuple[Literal["little", "big"], bytes]] = {
    b"RIFF": ("little", b"data"),
    b"RF64": ("little", b"data"),
    b"FORM": ("big", b"SSND"),
}
"""Kinds of files that are made of chunks (WAV, long WAV, AIFF), by their first bytes. Each has the
order of bytes in its numbers, and the name of the chunk with the samples."""

AU_START = b".snd"
"""First bytes of an AU file."""

LONG_LENGTHS_CHUNK = b"ds64"
"""The chunk that holds the lengths of a long WAV file: its other numbers have 32 bits."""

UNKNOWN_LENGTHS = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
"""Lengths that programs write who can't know them yet, such as those that write into a pipe."""

MAX_MISSING_BYTES = 64
"""Bytes that may lack behind what the header tells of: some programs count the header as sound."""


def find_missing_bytes(file: BinaryIO) -> int:
    """Return how many bytes of sound a WAV, AIFF or AU file lacks; 0 where that is unknown.

    libsndfile reads such files as far as they go and says nothing.
    """
    file.seek(0, os.SEEK_END)
    file_bytes = file.tell()
    file.seek(0)
    kind = file.read(4)
    if kind == AU_START:
        sound_start = int.from_bytes(file.read(4), "big")
        length = int.from_bytes(file.read(4), "big")
        return _count_missing(sound_start, length, file_bytes=file_bytes)
    long_length = 0
    order_and_name = CHUNK_FILES.get(kind)
    # behind the name stand the length of the file and the name of its kind
    start = 12
    while order_and_name and start + 8 <= file_bytes:
        byte_order, sound_chunk = order_and_name
        file.seek(start)
        name = file.read(4)
        length = int.from_bytes(file.read(4), byte_order)
        start += 8
        if name == LONG_LENGTHS_CHUNK:
            file.seek(start + 8)
            long_length = int.from_bytes(file.read(8), byte_order)
        if name == sound_chunk:
            return _count_missing(start, long_length or length, file_bytes=file_bytes)
        # chunks begin at even bytes
        start += length + length % 2
    return 0


def _count_missing(start: int, length: int, *, file_bytes: int) -> int:
    """Return how many bytes lack of a sound that has `length` bytes from `start` on."""
    missing = start + length - file_bytes
    if length in UNKNOWN_LENGTHS or missing <= MAX_MISSING_BYTES:
        return 0
    return missing


def _require_file(path: Path) -> None:
    """Raise `DataError` when there is no such file, or no file can have such a path."""
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long, or links in a circle
        is_file = False
    if not is_file:
        raise DataError(f"{shorten(repr(str(path))[1:-1])}: no such sound file")


def _refuse_cut_file(file: BinaryIO, name: str) -> None:
    """Raise `DataError` when a sound file holds less than its header says."""
    missing = find_missing_bytes(file)
    file.seek(0)
    if missing:
        raise DataError(
            f"{name}: cut short: {missing:,} bytes of sound are missing that its header tells of;"
            " copy or record it again"
        )


def decode_sound(source: Path | bytes, sample_rate: int) -> np.ndarray:
    """Decode a sound.

    Args:
        source: A file of any format that libsndfile reads, or its bytes.
        sample_rate: Samples per second of the result.

    Returns:
        Samples float32, mono, in -1..1.

    Raises:
        DataError: There is no such file, it is no sound or cut short, or samples are NaN or
            infinite.
    """
    file: io.BytesIO | str
    if isinstance(source, bytes):
        name = "the given audio"
        file = io.BytesIO(source)
        _refuse_cut_file(file, name)
    else:
        name = file = str(source)
        _require_file(source)
        with source.open("rb") as opened:
            _refuse_cut_file(opened, name)
    parts: list[np.ndarray] = []
    try:
        with soundfile.SoundFile(file) as sound:
            file_rate = check_rate(sound.samplerate, name=name)
            # an hour of many channels is never in memory as a whole
            block_frames = max(BLOCK_SAMPLES // sound.channels, 1)
            for block in sound.blocks(block_frames, dtype="float32", always_2d=True):
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
        DataError: There is no such file, or it is no sound or cut short.
    """
    _require_file(path)
    try:
        header = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        size = path.stat().st_size
        raise DataError(f"{path}: not readable sound ({size} bytes): {error}") from error
    with path.open("rb") as opened:
        _refuse_cut_file(opened, str(path))
    if not header.frames:
        raise DataError(f"{path}: holds no sound")


def write_mp3(samples: np.ndarray, rate: int) -> bytes:
    """Encode a sound as MP3, which browsers play.

    Args:
        samples: float32 [n], in -1..1.
        rate: Samples a second.
    """
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="MP3")
    return file.getvalue()
