"""Keeps ONNX Runtime's quantizers from writing into the log, and from setting it up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmcompress.runtime.quiet_loggers import silence_logger

NOISY_PACKAGE = "onnxruntime"
"""Its quantizers log through the root logger, and `matmul_nbits_quantizer` calls
`logging.basicConfig` when it is imported."""


@contextmanager
def quiet_quantizers() -> Iterator[None]:
    """Drop what ONNX Runtime logs below an error, and leave logging as it was found.

    Each call would advise a pre-processing that changes nothing here, and tell of every product.
    """
    root = logging.getLogger()
    # `logging.basicConfig` does nothing where the root logger has a handler. This one is what
    # logging falls back to without any, so other threads write what they always wrote.
    stand_in = None if root.handlers else logging.lastResort
    root.addFilter(_is_wanted)
    if stand_in is not None:
        root.addHandler(stand_in)
    try:
        with silence_logger(NOISY_PACKAGE):
            yield
    finally:
        if stand_in is not None:
            root.removeHandler(stand_in)
        root.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    """Return whether a message is an error, or comes from elsewhere."""
    return record.levelno >= logging.ERROR or NOISY_PACKAGE not in Path(record.pathname).parts
