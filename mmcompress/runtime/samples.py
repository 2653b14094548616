"""Samples as people have them, brought to one form: float32, mono, in -1..1, every one a number.

Integers are scaled as libsndfile scales them. The feature extractors of transformers take integers
as they are, which makes another sound of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmcompress.errors import DataError

INTEGER_SCALES = {"int8": 2**7, "int16": 2**15, "int32": 2**31}
"""What full scale is, by the type of the samples: libsndfile's own factors."""

UINT8_ZERO = 128
"""Silence in samples of type uint8, as WAV files of 8 bits store it; full scale is as much."""

MAX_CHANNELS = 32
"""Channels of a sound at most: an array with more along both axes is no sound."""

LOUDEST_SAMPLE = 100.0
"""Float samples beyond this are integers in another type: full scale is 1."""

HIGHEST_SAMPLE_RATE = 10**7
"""Samples per second at most; studios record at 192,000."""

RATE_KEYS = ("sampling_rate", "sample_rate", "rate")
"""Keys of a mapping that may hold the rate, as `datasets` and pipelines of transformers name it."""

ARRAY_KEYS = ("array", "raw", "samples")
"""Keys of a mapping that may hold the samples."""


def unpack_rate(source: object, *, default_rate: int) -> tuple[object, int]:
    """Separate samples from their rate, where both are given.

    Args:
        source: `(samples, rate)` as soundfile gives them, `(rate, samples)` as scipy does, a
            mapping as `datasets` does, or samples alone.
        default_rate: The rate of samples alone.

    Returns:
        The samples and their rate.

    Raises:
        DataError: A mapping lacks one of the two, or the rate is none.
    """
    if isinstance(source, Mapping):
        samples = [source[key] for key in ARRAY_KEYS if source.get(key) is not None]
        rates = [source[key] for key in RATE_KEYS if source.get(key) is not None]
        if not samples or not rates:
            raise DataError(
                "the given audio: a mapping needs samples "
                f"({', '.join(ARRAY_KEYS)}) and their rate ({', '.join(RATE_KEYS)}); "
                f"got {', '.join(str(key) for key in source)}"
            )
        return samples[0], check_rate(rates[0])
    if isinstance(source, tuple) and len(source) == 2:
        first, second = source
        if _has_samples(first) and isinstance(second, int | np.integer):
            return first, check_rate(second)
        if _has_samples(second) and isinstance(first, int | np.integer):
            return second, check_rate(first)
    return source, default_rate


def _has_samples(value: object) -> bool:
    """Return whether a value is an array or a list, and not one number."""
    return isinstance(value, list | tuple | np.ndarray) and len(np.shape(value)) > 0


def check_rate(rate: object, *, name: str = "the given audio") -> int:
    """Return a sample rate as a whole number.

    Args:
        rate: Samples a second, as a caller or a file says it.
        name: The sound, for the message.

    Raises:
        DataError: It is no number, or none that a sound can have.
    """
    is_number = isinstance(rate, int | float | np.integer | np.floating)
    if not is_number or not 0 < float(str(rate)) < HIGHEST_SAMPLE_RATE:
        raise DataError(f"{name}: {rate!r} is no sample rate")
    return round(float(str(rate)))


def normalize_samples(source: object) -> np.ndarray:
    """Bring samples to float32, mono, in -1..1.

    Of two axes, the shorter one holds the channels; of two equal ones, the second, as soundfile has
    it. Channels are averaged.

    Args:
        source: An array, or lists of numbers, [n], [n, channels] or [channels, n]. Floats lie in
            -1..1. Integers are scaled by the range of their type.

    Returns:
        float32 [n].

    Raises:
        DataError: They are no samples: the message says what is wrong.
    """
    try:
        values = np.asarray(source)
    except ValueError as error:
        raise DataError(f"the given audio: not an array of samples: {error}") from error
    scaled_samples = _scale(values)
    check_samples(scaled_samples, name="the given audio")
    return mix_channels(scaled_samples).astype(np.float32)


def check_samples(samples: np.ndarray, *, name: str) -> None:
    """Check that there are samples, and that each is a number.

    Args:
        samples: Floats of any shape.
        name: What they are, for the message.

    Raises:
        DataError: There is no sample, or one is NaN, infinite, or far beyond full scale.
    """
    if not samples.size:
        raise DataError(f"{name}: holds no sound")
    is_wrong = ~np.isfinite(samples)
    if is_wrong.any():
        first = int(is_wrong.reshape(-1).argmax())
        raise DataError(
            f"{name}: {int(is_wrong.sum())} of {samples.size} samples are not finite "
            f"(NaN, infinity), the first at {first}"
        )
    loudest = float(max(samples.max(), -samples.min()))
    if loudest > LOUDEST_SAMPLE:
        raise DataError(
            f"{name}: the loudest sample is {loudest:g}, but full scale is 1. Divide them by the "
            "range of the integers that they were (32768 for 16 bits)"
        )


def _scale(values: np.ndarray) -> np.ndarray:
    """Return samples as floats in -1..1, or raise `DataError` where their scale is unknown."""
    type_name = values.dtype.name
    if values.dtype.kind == "f":
        return values
    if type_name in INTEGER_SCALES:
        return values.astype(np.float64) / INTEGER_SCALES[type_name]
    if type_name == "uint8":
        return (values.astype(np.float64) - UINT8_ZERO) / UINT8_ZERO
    # numbers in a list become int64: -1, 0 and 1 mean the same as floats
    if values.dtype.kind in "iu" and values.size and np.abs(values).max() <= 1:
        return values.astype(np.float64)
    raise DataError(
        f"the given audio: samples of type {type_name} have no known scale: expected numbers, "
        "floats in -1..1, int16, int32 or uint8"
    )


def mix_channels(samples: np.ndarray) -> np.ndarray:
    """Return the mean of the channels [n].

    Args:
        samples: [n], [n, channels] or [channels, n]; see `normalize_samples`.

    Raises:
        DataError: They have another number of axes, or too many channels.
    """
    if samples.ndim == 1:
        return samples
    if samples.ndim != 2 or min(samples.shape) > MAX_CHANNELS:
        raise DataError(
            f"the given audio: a sound of shape {list(samples.shape)}: expected [n], "
            f"[n, channels] or [channels, n] with at most {MAX_CHANNELS} channels"
        )
    channel_axis = 0 if samples.shape[0] < samples.shape[1] else 1
    mono: np.ndarray = samples.mean(channel_axis)
    return mono
