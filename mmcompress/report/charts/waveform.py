"""A sound as its waveform: the loudest sample of each piece, mirrored at the middle."""

from __future__ import annotations

from collections.abc import Sequence

import altair

from mmcompress.report.charts.vega import Row, choose_color, make_chart, render_chart

WAVEFORM_WIDTH = 200
"""Pixels of width."""

WAVEFORM_HEIGHT = 36
"""Pixels of height."""

SILENT_HEIGHT = 0.02
"""Height of a silent piece, so that it is seen; the loudest one has 1."""


def draw_waveform(peaks: Sequence[float]) -> str:
    """Draw the waveform of a sound; nothing where there is none.

    Args:
        peaks: Loudest samples of the pieces of the sound, 0..1.
    """
    if not peaks:
        return ""
    loudest = max(max(peaks), 1e-6)
    rows: list[Row] = []
    for i, peak in enumerate(peaks):
        height = max(peak / loudest, SILENT_HEIGHT)
        rows.append({"piece": i, "low": -height, "high": height})
    bars = make_chart(rows).mark_bar(color=choose_color(0), aria=False)
    chart = bars.encode(
        x=altair.X("piece:O", axis=None),
        y=altair.Y("low:Q", axis=None, scale=altair.Scale(domain=[-1, 1])),
        y2="high:Q",
    )
    sized = chart.properties(width=WAVEFORM_WIDTH, height=WAVEFORM_HEIGHT)
    return render_chart(sized, label="waveform of the sound")
