"""Where the time of a request goes: one bar before and one after, to one scale."""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.report.charts.svg import (
    CHARACTER_WIDTH,
    WIDTH,
    LegendEntry,
    Scale,
    build_svg,
    choose_color,
    draw_legend,
    draw_line,
    draw_rectangle,
    draw_text,
)
from mmcompress.results.records import Side, Summary

NODE_BARS_LEFT = 64.0
"""Units left of the bars, for their names."""

NODE_BARS_RIGHT = 90.0
"""Units right of the longest bar, for its milliseconds."""

NODE_BARS_TOP = 26.0
"""Units above the first bar, for the target."""

NODE_BAR_HEIGHT = 34.0
"""Units of height of a bar."""

NODE_BAR_STEP = 48.0
"""Units from one bar to the next."""

LEGEND_Y = 140.0
"""Units from the upper edge to the base line of the legend."""

NODE_BARS_HEIGHT = 150.0
"""Units of height."""

TARGET_LABEL_WIDTH = 130.0
"""Units of width of the name of the target."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a bar."""

    name: str
    """The node, or what else takes the time."""
    milliseconds: float
    """Milliseconds of a request."""
    fill: str = ""
    """Colour of a node."""
    css: str = ""
    """Class of what is no node."""


def draw_node_bars(summary: Summary) -> str:
    """Draw the milliseconds of every node before and after, and the target as a line."""
    sides = {"before": summary.baseline, "after": summary.compressed}
    scale = _fit_scale(summary)
    bars: list[str] = []
    texts: list[str] = []
    for row, (name, side) in enumerate(sides.items()):
        top = NODE_BARS_TOP + row * NODE_BAR_STEP
        bars += _draw_bar(side, scale, top=top)
        texts += _draw_bar_texts(side, scale, name=name, top=top)
    # The line of the target lies under the texts, so that it crosses none of them out.
    elements = bars + _draw_target(summary.target.latency_ms, scale) + texts
    elements += draw_legend(NODE_BARS_LEFT, LEGEND_Y, entries=_list_legend(summary.baseline))
    return build_svg(
        WIDTH,
        NODE_BARS_HEIGHT,
        elements=elements,
        label="latency by node, before and after compression",
    )


def _fit_scale(summary: Summary) -> Scale:
    """Return the scale from milliseconds to units that holds both bars and the target."""
    longest = max(summary.baseline.latency_ms.p50, summary.target.latency_ms)
    for side in (summary.baseline, summary.compressed):
        # Branches that run at the same time add up to more than a request takes.
        node_ms = sum(node.latency_ms_p50 for node in side.nodes.values())
        longest = max(longest, side.latency_ms.p50, node_ms)
    return Scale(low=0.0, high=longest, start=NODE_BARS_LEFT, end=WIDTH - NODE_BARS_RIGHT)


def _list_parts(side: Side) -> list[Part]:
    """Return a part for each node, and one for the time outside of them."""
    parts: list[Part] = []
    outside_ms = side.latency_ms.p50
    for i, (name, node) in enumerate(side.nodes.items()):
        parts.append(Part(name=name, milliseconds=node.latency_ms_p50, fill=choose_color(i)))
        outside_ms -= node.latency_ms_p50
    if outside_ms > 0:
        parts.append(Part(name="outside the nodes", milliseconds=outside_ms, css="rest"))
    return parts


def _draw_bar(side: Side, scale: Scale, *, top: float) -> list[str]:
    """Draw the parts of one bar, one after the other."""
    elements: list[str] = []
    spent_ms = 0.0
    for part in _list_parts(side):
        start = scale.place(spent_ms)
        spent_ms += part.milliseconds
        elements.append(
            draw_rectangle(
                start,
                top,
                width=scale.place(spent_ms) - start,
                height=NODE_BAR_HEIGHT,
                css=part.css,
                fill=part.fill,
                title=f"{part.name}: {part.milliseconds:.2f} ms",
            )
        )
    return elements


def _draw_bar_texts(side: Side, scale: Scale, *, name: str, top: float) -> list[str]:
    """Draw the name of a bar, the milliseconds of parts that are wide enough, and the total."""
    y = top + NODE_BAR_HEIGHT / 2 + 4
    elements = [draw_text(NODE_BARS_LEFT - 10, y, text=name, anchor="end")]
    spent_ms = 0.0
    for part in _list_parts(side):
        start = scale.place(spent_ms)
        spent_ms += part.milliseconds
        end = scale.place(spent_ms)
        text = f"{part.milliseconds:.1f}"
        if part.fill and end - start > CHARACTER_WIDTH * len(text) + 8:
            middle = (start + end) / 2
            elements.append(draw_text(middle, y, text=text, css="on", anchor="middle"))
    end = scale.place(max(spent_ms, side.latency_ms.p50))
    total = f"{side.latency_ms.p50:.2f} ms"
    elements.append(draw_text(end + 8, y, text=total, css="strong halo"))
    return elements


def _draw_target(target_ms: float, scale: Scale) -> list[str]:
    """Draw the target as a line through both bars, with its name above them."""
    x = scale.place(target_ms)
    bottom = NODE_BARS_TOP + NODE_BAR_STEP + NODE_BAR_HEIGHT + 6
    line = draw_line((x, NODE_BARS_TOP - 6), (x, bottom), css="target")
    # The name starts at the line, or ends there where the right edge is near.
    anchor = "end" if x > WIDTH - TARGET_LABEL_WIDTH else "start"
    text = f"target {target_ms:.2f} ms"
    return [line, draw_text(x, NODE_BARS_TOP - 12, text=text, css="small", anchor=anchor)]


def _list_legend(side: Side) -> list[LegendEntry]:
    """Return the colours of the nodes, and of the time outside of them."""
    entries: list[LegendEntry] = []
    for i, name in enumerate(side.nodes):
        entries.append(LegendEntry(label=name, fill=choose_color(i)))
    entries.append(LegendEntry(label="outside the nodes", css="rest"))
    return entries
