"""Where the time of a request goes: one bar before and one after, to one scale."""

from __future__ import annotations

from mmcompress.report.charts.svg import (
    WIDTH,
    Scale,
    build_svg,
    choose_color,
    draw_line,
    draw_rectangle,
    draw_text,
)
from mmcompress.results.records import Side, Summary

LEFT = 96.0
"""Units left of the bars, for their names."""

RIGHT = 90.0
"""Units right of the longest bar, for its milliseconds."""

TOP = 10.0
"""Units above the first bar."""

BAR_HEIGHT = 34.0
"""Units of height of a bar."""

BAR_STEP = 48.0
"""Units from one bar to the next."""

MIN_LABEL_WIDTH = 60.0
"""Units of width from which on a part of a bar holds its name."""


def draw_node_bars(summary: Summary) -> str:
    """Draw the milliseconds of every node before and after, and the target as a line."""
    sides = {"before": summary.baseline, "after": summary.compressed}
    scale = _fit_scale(summary)
    elements: list[str] = []
    for row, (name, side) in enumerate(sides.items()):
        elements += _draw_bar(side, scale, name=name, top=TOP + row * BAR_STEP)
    target_x = scale.place(summary.target.latency_ms)
    elements.append(draw_line((target_x, 2), (target_x, 2 * BAR_HEIGHT + 34), css="target"))
    target_text = f"target {summary.target.latency_ms:.2f} ms"
    elements.append(draw_text(target_x + 4, 2 * BAR_HEIGHT + 46, text=target_text, css="small"))
    return build_svg(
        WIDTH,
        2 * BAR_HEIGHT + 54,
        elements=elements,
        label="latency by node before and after",
    )


def _fit_scale(summary: Summary) -> Scale:
    """Return the scale from milliseconds to units that holds both bars."""
    longest = summary.baseline.latency_ms.p50
    for side in (summary.baseline, summary.compressed):
        # Branches that run at the same time add up to more than a request takes.
        longest = max(longest, sum(node.latency_ms_p50 for node in side.nodes.values()))
    return Scale(low=0.0, high=longest, start=LEFT, end=WIDTH - RIGHT)


def _draw_bar(side: Side, scale: Scale, *, name: str, top: float) -> list[str]:
    """Draw the bar of one side: a part for each node, and one for the time outside of them."""
    text_y = top + BAR_HEIGHT / 2 + 4
    elements = [draw_text(LEFT - 10, text_y, text=name, anchor="end")]
    spent_ms = 0.0
    for i, (node_name, node) in enumerate(side.nodes.items()):
        start = scale.place(spent_ms)
        spent_ms += node.latency_ms_p50
        width = scale.place(spent_ms) - start
        elements.append(
            draw_rectangle(
                start,
                top,
                width=width,
                height=BAR_HEIGHT,
                fill=choose_color(i),
                title=f"{node_name}: {node.latency_ms_p50:.2f} ms",
            )
        )
        if width > MIN_LABEL_WIDTH:
            text = f"{node_name} {node.latency_ms_p50:.1f}"
            elements.append(
                draw_text(start + width / 2, text_y, text=text, css="on", anchor="middle")
            )
    outside_ms = side.latency_ms.p50 - spent_ms
    if outside_ms > 0:
        start = scale.place(spent_ms)
        elements.append(
            draw_rectangle(
                start,
                top,
                width=scale.place(side.latency_ms.p50) - start,
                height=BAR_HEIGHT,
                css="rest",
                title=f"around the models: {outside_ms:.2f} ms",
            )
        )
    end = scale.place(max(spent_ms, side.latency_ms.p50))
    elements.append(draw_text(end + 8, text_y, text=f"{side.latency_ms.p50:.2f} ms", css="strong"))
    return elements
