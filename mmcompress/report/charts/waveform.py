"""A sound as its waveform: the loudest sample of each piece, mirrored at the middle."""

from __future__ import annotations

from collections.abc import Sequence

from mmcompress.report.charts.svg import build_svg, draw_rectangle

COLUMN_WIDTH = 2.0
"""Units from one column to the next."""

BAR_WIDTH = 1.4
"""Units of width of a column."""

WAVEFORM_HEIGHT = 40.0
"""Units of height."""

MIN_BAR_HEIGHT = 1.0
"""Units of height of a silent column, so that it is seen."""


def draw_waveform(peaks: Sequence[float]) -> str:
    """Draw the waveform of a sound; nothing where there is none.

    Args:
        peaks: Loudest samples of the pieces of the sound, 0..1.
    """
    if not peaks:
        return ""
    loudest = max(max(peaks), 1e-6)
    elements: list[str] = []
    for i, peak in enumerate(peaks):
        height = max(peak / loudest * WAVEFORM_HEIGHT, MIN_BAR_HEIGHT)
        top = (WAVEFORM_HEIGHT - height) / 2
        elements.append(draw_rectangle(i * COLUMN_WIDTH, top, width=BAR_WIDTH, height=height))
    return build_svg(
        len(peaks) * COLUMN_WIDTH,
        WAVEFORM_HEIGHT,
        elements=elements,
        label="waveform of the sound",
        attributes={"class": "waveform", "preserveAspectRatio": "none"},
    )
