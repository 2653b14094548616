"""Keeps freed memory in the process, where large buffers come and go."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD = -1
"""Option of glibc's `mallopt`: free bytes at the end of the heap from which they are given back."""

M_MMAP_THRESHOLD = -3
"""Option of glibc's `mallopt`: bytes from which a buffer is asked of the system each time."""

KEPT_BYTES = 2**30
"""Bytes of a buffer, and of free memory, that stay in the process."""


def keep_freed_memory() -> None:
    """Keep buffers of up to a gigabyte in the process when they are freed.

    By default glibc asks the system for every buffer of some megabytes anew, and the system clears
    it. That takes a fifth of the time where a tower allocates the same buffers for each input.
    Systems without glibc stay as they are.
    API: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(M_MMAP_THRESHOLD, KEPT_BYTES)
    set_option(M_TRIM_THRESHOLD, KEPT_BYTES)
