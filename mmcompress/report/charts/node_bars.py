"""Where the time of a request goes: one bar before and one after, to one scale."""

from __future__ import annotations

import altair

from mmcompress.report.charts.vega import (
    LINE_COLOR,
    PAPER_COLOR,
    Row,
    choose_color,
    draw_target_line,
    fit_page_width,
    layer_charts,
    make_chart,
    make_label_axis,
    render_chart,
)
from mmcompress.results.records import Side, Summary

NODE_BARS_HEIGHT = 210
"""Pixels of height."""

OUTSIDE_NAME = "outside the nodes"
"""What takes time and is no node."""

MIN_NAMED_SHARE = 0.06
"""Share of the longest bar from which a part has room for its milliseconds."""

TOTAL_ROOM = 1.14
"""End of the axis / longest bar: the total stands right of its bar."""


def draw_node_bars(summary: Summary) -> str:
    """Draw the milliseconds of every node before and after, and the target as a line."""
    sides = {"before": summary.baseline, "after": summary.compressed}
    parts = [part for name, side in sides.items() for part in _list_parts(name, side)]
    ends_ms = [float(part["end"]) for part in parts] + [summary.target.latency_ms]
    longest_ms = max(*ends_ms, *(side.latency_ms.p50 for side in sides.values()))
    names = [*summary.baseline.nodes, OUTSIDE_NAME]
    colors = [choose_color(i) for i in range(len(names) - 1)] + [LINE_COLOR]
    x = altair.X(
        "start:Q",
        title="milliseconds of a request",
        scale=altair.Scale(domain=[0, TOTAL_ROOM * longest_ms or 1.0], nice=False),
    )
    y = altair.Y("side:N", sort=None, title=None, axis=make_label_axis(["before"]))
    bars = (
        make_chart(parts)
        .mark_bar(height=34)
        .encode(
            x=x,
            x2="end:Q",
            y=y,
            color=altair.Color("name:N", sort=None, scale=altair.Scale(domain=names, range=colors)),
            description="description:N",
        )
    )
    wide = [part for part in parts if float(part["ms"]) > MIN_NAMED_SHARE * longest_ms]
    figures = make_chart([part for part in wide if part["name"] != OUTSIDE_NAME])
    totals = make_chart(
        [_make_total(name, side, parts=parts) for name, side in sides.items()]
    ).encode(x="end:Q", y=y, text="figure:N")
    layers = [
        bars,
        *draw_target_line(
            summary.target.latency_ms, text=f"target {summary.target.latency_ms:.2f} ms"
        ),
        figures.mark_text(color="#fff", aria=False).encode(x="middle:Q", y=y, text="figure:N"),
        # The line of the target must not cross the total out.
        totals.mark_text(
            align="left", dx=8, fontWeight=600, stroke=PAPER_COLOR, strokeWidth=5, aria=False
        ),
        totals.mark_text(align="left", dx=8, fontWeight=600, aria=False),
    ]
    chart = fit_page_width(layer_charts(*layers), height=NODE_BARS_HEIGHT)
    return render_chart(chart, label="latency by node, before and after compression")


def _list_parts(side_name: str, side: Side) -> list[Row]:
    """Return a row for each node of a bar, and one for the time outside of them."""
    node_ms = {name: node.latency_ms_p50 for name, node in side.nodes.items()}
    outside_ms = side.latency_ms.p50 - sum(node_ms.values())
    # Branches that run at the same time add up to more than a request takes.
    if outside_ms > 0:
        node_ms[OUTSIDE_NAME] = outside_ms
    parts: list[Row] = []
    start = 0.0
    for name, milliseconds in node_ms.items():
        parts.append(
            {
                "side": side_name,
                "name": name,
                "ms": milliseconds,
                "start": start,
                "middle": start + milliseconds / 2,
                "end": start + milliseconds,
                "figure": f"{milliseconds:.1f}",
                "description": f"{name}, {side_name}: {milliseconds:.2f} ms",
            }
        )
        start += milliseconds
    return parts


def _make_total(side_name: str, side: Side, *, parts: list[Row]) -> Row:
    """Return the row of the total of a bar, which stands at its end."""
    ends = [float(part["end"]) for part in parts if part["side"] == side_name]
    end = max([side.latency_ms.p50, *ends])
    return {"side": side_name, "end": end, "figure": f"{side.latency_ms.p50:.2f} ms"}
