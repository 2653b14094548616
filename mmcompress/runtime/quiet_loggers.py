"""Keeps a library from writing into the log while our own code runs, and leaves logging as it
was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence_logger(name: str) -> Iterator[None]:
    """Let a library tell errors alone while the block runs, or the function that this decorates.

    Args:
        name: The library's logger. Its level is the caller's own again afterwards.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)
