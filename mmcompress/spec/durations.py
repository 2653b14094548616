"""Times as a person writes and reads them: `2h`, `12 min`."""

from __future__ import annotations

import re

from mmcompress.errors import SpecError, shorten

UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}
"""Seconds of the units of a time."""

DURATION = re.compile(r"(?:\d+(?:\.\d+)?[hms])+")
"""A time in words: `2h`, `30m`, `5400s`, `1h30m`."""


def parse_max_time(text: str) -> float:
    """Return the seconds of a time such as `2h`, `30m`, `5400s` or `1h30m`.

    Raises:
        SpecError: It is none, or it is no time at all.
    """
    stripped = text.strip().lower()
    seconds = 0.0
    if DURATION.fullmatch(stripped):
        for number, unit in re.findall(r"([\d.]+)([hms])", stripped):
            seconds += float(number) * UNIT_SECONDS[unit]
    if seconds <= 0:
        raise SpecError(f"--max-time {shorten(text)}: expected a time such as 2h, 30m or 5400s")
    return seconds


def format_duration(seconds: float) -> str:
    """Return a time in words: `45 s`, `12 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
