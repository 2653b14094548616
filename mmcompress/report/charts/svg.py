"""What all charts share: colours, scales from values to pixels, and the elements of an SVG.

A chart is text. It stands inside a page, whose style sheet knows the classes that are named here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
"""Colours of series, used in turn."""

WIDTH = 760.0
"""Units of width of a chart that fills the width of a page."""

TICKS = 5
"""Ticks of an axis."""

Point = tuple[float, float]
"""Units from the left edge and from the upper edge."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear scale from values to units of a chart."""

    low: float
    """The value that lies at `start`."""
    high: float
    """The value that lies at `end`. When it equals `low`, every value lies at `start`."""
    start: float
    """Units from the edge of the chart."""
    end: float
    """Units from the edge of the chart; less than `start` where the scale runs upwards."""

    def place(self, value: float) -> float:
        """Return the units from the edge at which a value lies."""
        if self.high == self.low:
            return self.start
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def list_ticks(self) -> list[float]:
        """Return values from the low end to the high end, equally far apart."""
        step = (self.high - self.low) / (TICKS - 1)
        return [self.low + step * i for i in range(TICKS)]


def choose_color(index: int) -> str:
    """Return the colour of a series by its number."""
    return PALETTE[index % len(PALETTE)]


def build_svg(
    width: float,
    height: float,
    *,
    elements: Sequence[str],
    label: str,
    attributes: Mapping[str, str] | None = None,
) -> str:
    """Build a chart of its elements.

    Args:
        width: Units of width. A page stretches the chart to its own width.
        height: Units of height.
        elements: Markup, from the back to the front.
        label: What the chart shows, for readers who don't see it.
        attributes: Further attributes of the root.
    """
    root = {
        **(attributes or {}),
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": label,
    }
    return _build_element("svg", root, content="".join(elements))


def draw_text(x: float, y: float, *, text: str, css: str = "", anchor: str = "start") -> str:
    """Draw a text whose base line starts, ends or is centred at a point."""
    attributes = {"x": x, "y": y, "text-anchor": anchor, "class": css}
    return _build_element("text", attributes, content=escape(text))


def draw_line(start: Point, end: Point, *, css: str = "", stroke: str = "", dash: str = "") -> str:
    """Draw a straight line."""
    attributes = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1], "class": css}
    return _build_element("line", {**attributes, "stroke": stroke, "stroke-dasharray": dash})


def draw_polyline(points: Sequence[Point], *, stroke: str) -> str:
    """Draw a line through some points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    attributes = {"points": path, "fill": "none", "stroke": stroke, "stroke-width": "1.5"}
    return _build_element("polyline", attributes)


def draw_rectangle(
    x: float,
    y: float,
    *,
    width: float,
    height: float,
    css: str = "",
    fill: str = "",
    title: str = "",
) -> str:
    """Draw a rectangle from its upper left corner; `title` is shown under the mouse."""
    attributes = {"x": x, "y": y, "width": width, "height": height, "class": css, "fill": fill}
    return _build_element("rect", attributes, content=_build_title(title))


def draw_circle(
    x: float,
    y: float,
    *,
    radius: float,
    css: str = "",
    fill: str = "",
    opacity: str = "",
    title: str = "",
) -> str:
    """Draw a circle around a point; `title` is shown under the mouse."""
    attributes = {"cx": x, "cy": y, "r": radius, "class": css, "fill": fill, "opacity": opacity}
    return _build_element("circle", attributes, content=_build_title(title))


def group_elements(elements: Sequence[str], *, title: str) -> str:
    """Group elements under one title, which is shown under the mouse."""
    return _build_element("g", {}, content=_build_title(title) + "".join(elements))


def _build_title(title: str) -> str:
    """Return the markup of a title; nothing for an empty one."""
    return f"<title>{escape(title)}</title>" if title else ""


def _build_element(tag: str, attributes: Mapping[str, str | float], *, content: str = "") -> str:
    """Return the markup of one element; empty attributes are left out."""
    parts = [tag]
    for name, value in attributes.items():
        text = value if isinstance(value, str) else f"{value:.1f}"
        if text:
            parts.append(f'{name}="{escape(text)}"')
    opening = " ".join(parts)
    return f"<{opening}>{content}</{tag}>" if content else f"<{opening}/>"
