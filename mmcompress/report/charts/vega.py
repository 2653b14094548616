"""What all charts share: colours, the theme, and how a chart of Altair becomes text of a page.

vl-convert draws a chart without a browser. The text is an SVG that a page holds as it is, without a
script. Its colours come from the style sheet of the page, which knows light and dark.
API: https://altair-viz.github.io and https://github.com/vega/vl-convert
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import altair
import vl_convert

SERIES_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
"""Colours of series, used in turn."""

INK = "var(--ink, #1d2530)"
"""Colour of text. The second part is for a chart that stands in a file of its own."""

SOFT_INK = "var(--soft, #5b6877)"
"""Colour of text that stands back."""

LINE_COLOR = "var(--line, #d9dfe6)"
"""Colour of grids and of what is empty."""

PAPER_COLOR = "var(--paper, #fff)"
"""Colour of the ground, which a text on a line is surrounded by."""

TARGET_COLOR = "var(--bad, #b3382c)"
"""Colour of targets, and of the ring around what was chosen."""

TARGET_DASH = (5, 4)
"""Pixels drawn and left out of the line of a target."""

PAGE_WIDTH = 870
"""Pixels of width of a chart that fills the width of a page, with its axes."""

MIN_SHOWN_WIDTH = 700
"""Pixels of width below which a wide chart is scrolled and not made smaller, to stay legible."""

CHARACTER_WIDTH = 7.5
"""Pixels of width of a character of a label. The fonts of a reader may be wider than those that
vl-convert measures with."""

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
"""Namespace of the elements of a chart."""

THEME: dict[str, object] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "gridColor": LINE_COLOR,
        "domainColor": LINE_COLOR,
        "tickColor": LINE_COLOR,
        "labelColor": INK,
        "labelFontSize": 12,
        "labelLimit": 220,
        "titleColor": SOFT_INK,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
    "axisQuantitative": {"tickCount": 8},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": INK,
        "labelFontSize": 12,
        "labelLimit": 400,
        "columnPadding": 44,
        "symbolType": "square",
    },
    "text": {"color": INK, "fontSize": 12},
    "title": {
        "color": INK,
        "fontSize": 12,
        "subtitleColor": SOFT_INK,
        "anchor": "start",
        "frame": "group",
    },
    "rule": {"color": INK},
}
"""Configuration of every chart, in the words of Vega-Lite."""

Row = Mapping[str, str | float | bool]
"""One row of the data of a chart, by column."""


def make_chart(rows: Sequence[Row]) -> altair.Chart:
    """Make a chart over rows, which are written into it."""
    return altair.Chart(altair.InlineData(values=[dict(row) for row in rows]))


def layer_charts(*layers: altair.Chart) -> altair.LayerChart:
    """Lay charts over each other, from the back to the front, on the same axes."""
    return altair.LayerChart(layer=list(layers))


def choose_color(index: int) -> str:
    """Return the colour of a series by its number."""
    return SERIES_COLORS[index % len(SERIES_COLORS)]


def make_label_axis(labels: Sequence[str], *, grid: bool = False) -> altair.Axis:
    """Make an axis of names with room for the longest of them."""
    longest = max((len(label) for label in labels), default=0)
    return altair.Axis(
        ticks=False, domain=False, grid=grid, minExtent=min(220.0, CHARACTER_WIDTH * longest)
    )


def fit_page_width(chart: altair.LayerChart, *, height: float) -> altair.LayerChart:
    """Return a chart as wide as a page with its axes.

    Args:
        chart: The chart.
        height: Pixels of height, with axes and legend.
    """
    fit = altair.AutoSizeParams(type="fit", contains="padding")
    return chart.properties(width=PAGE_WIDTH, height=height, autosize=fit)


def draw_target_line(value: float, *, text: str) -> list[altair.Chart]:
    """Draw a dashed line at a value of the x axis, with its name above the plot."""
    chart = make_chart([{"value": value, "text": text}])
    line = chart.mark_rule(color=TARGET_COLOR, strokeDash=TARGET_DASH, aria=False)
    name = chart.mark_text(baseline="bottom", fontSize=11, color=SOFT_INK, aria=False)
    x = altair.X("value:Q")
    return [line.encode(x=x), name.encode(x=x, y=altair.value(-4), text="text:N")]


def render_chart(chart: altair.TopLevelMixin, *, label: str) -> str:
    """Return a chart as SVG.

    Every mark that describes itself shows its description under the mouse, and to readers that do
    not see the chart.

    Args:
        chart: The chart.
        label: What the chart shows.
    """
    specification = {**chart.to_dict(), "config": THEME}
    root = ElementTree.fromstring(vl_convert.vegalite_to_svg(specification))
    # A chart shrinks with its page, and is never stretched.
    width = float(root.attrib.pop("width"))
    del root.attrib["height"]
    root.set("style", f"max-width: {width:g}px; min-width: {min(width, MIN_SHOWN_WIDTH):g}px")
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", label)
    for element in root.iter():
        description = element.get("aria-label")
        is_mark = element.tag == f"{{{SVG_NAMESPACE}}}path"
        if is_mark and description:
            title = ElementTree.SubElement(element, f"{{{SVG_NAMESPACE}}}title")
            title.text = description
    ElementTree.register_namespace("", SVG_NAMESPACE)
    return ElementTree.tostring(root, encoding="unicode")
