"""What all charts share: colours, scales from values to pixels, and the elements of an SVG.

A chart is text. It stands inside a page, whose style sheet knows the classes that are named here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#72b7b2")
"""Colours of series, used in turn."""

WIDTH = 760.0
"""Units of width of a chart that fills the width of a page."""

CHARACTER_WIDTH = 7.0
"""Units of width of a character, on average and rather too many."""

MAX_TICKS = 7
"""Ticks of an axis at most; more of them would run into each other."""

ROUND_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
"""Steps between two ticks, times a power of ten."""

SWATCH_SIZE = 11.0
"""Units of a side of a square in a legend."""

Attributes = dict[str, str | float]
"""Attributes of an element; an empty text leaves the attribute out."""

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

    def list_ticks(self, max_count: int = MAX_TICKS) -> list[float]:
        """Return round values of the scale, equally far apart; its low end when it has no range.

        Args:
            max_count: Values at most; two at least.
        """
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        ticks = self._list_multiples(_choose_round_step(span / (max_count - 1)))
        if len(ticks) < 2:
            # One tick tells no distance.
            ticks = self._list_multiples(_choose_round_step(span / max_count))
        return ticks

    def _list_multiples(self, step: float) -> list[float]:
        """Return the multiples of a step that lie on the scale."""
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step)
        return [step * i for i in range(first, last + 1)]


def _choose_round_step(min_step: float) -> float:
    """Return the smallest round step that is not below `least`, which is above 0."""
    power = 10.0 ** math.floor(math.log10(min_step))
    for factor in ROUND_STEPS:
        if factor * power >= min_step * (1 - 1e-9):
            return factor * power
    return 10 * power


def format_ticks(values: Sequence[float], *, is_share: bool = False) -> list[str]:
    """Return the texts of the ticks of an axis, all with as many decimals as they need.

    Args:
        values: The ticks.
        is_share: Whether they are shares, written in percent.
    """
    shown_value = [100 * value for value in values] if is_share else list(values)
    unit = " %" if is_share else ""
    for decimals in range(6):
        if all(abs(round(value, decimals) - value) < 1e-9 for value in shown_value):
            break
    return [f"{value:.{decimals}f}{unit}" for value in shown_value]


def shorten_text(text: str, width: float) -> str:
    """Return a text that fits a width in units; what is cut off is marked by an ellipsis."""
    most_characters = max(2, int(width / CHARACTER_WIDTH))
    if len(text) <= most_characters:
        return text
    return text[: most_characters - 1] + "…"


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
    root: Attributes = {
        **(attributes or {}),
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-label": label,
    }
    return _build_element("svg", root, content="".join(elements))


def draw_text(x: float, y: float, *, text: str, css: str = "", anchor: str = "start") -> str:
    """Draw a text whose base line starts, ends or is centred at a point."""
    attributes: Attributes = {"x": x, "y": y, "text-anchor": anchor, "class": css}
    return _build_element("text", attributes, content=escape(text))


def draw_line(
    start: Point,
    end: Point,
    *,
    css: str = "",
    stroke: str = "",
    dash: str = "",
    opacity: str = "",
) -> str:
    """Draw a straight line."""
    attributes: Attributes = {
        "x1": start[0],
        "y1": start[1],
        "x2": end[0],
        "y2": end[1],
        "class": css,
        "stroke": stroke,
        "stroke-dasharray": dash,
        "opacity": opacity,
    }
    return _build_element("line", attributes)


def draw_polyline(points: Sequence[Point], *, stroke: str) -> str:
    """Draw a line through some points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    attributes: Attributes = {
        "points": path,
        "fill": "none",
        "stroke": stroke,
        "stroke-width": "1.5",
    }
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
    attributes: Attributes = {
        "x": x,
        "y": y,
        "width": width,
        "height": height,
        "class": css,
        "fill": fill,
    }
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
    attributes: Attributes = {
        "cx": x,
        "cy": y,
        "r": radius,
        "class": css,
        "fill": fill,
        "opacity": opacity,
    }
    return _build_element("circle", attributes, content=_build_title(title))


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    """One series of a legend."""

    label: str
    """Name of the series."""
    fill: str = ""
    """Its colour, where it has one of its own."""
    css: str = ""
    """Its class, where the style sheet gives the colour."""


def draw_legend(x: float, y: float, *, entries: Sequence[LegendEntry]) -> list[str]:
    """Draw a coloured square and a name for each series, in a line that starts at a point."""
    elements: list[str] = []
    for entry in entries:
        elements.append(
            draw_rectangle(
                x,
                y - SWATCH_SIZE + 1,
                width=SWATCH_SIZE,
                height=SWATCH_SIZE,
                css=entry.css,
                fill=entry.fill,
            )
        )
        text_x = x + SWATCH_SIZE + 5
        elements.append(draw_text(text_x, y, text=entry.label, css="small"))
        x = text_x + CHARACTER_WIDTH * len(entry.label) + 16
    return elements


def group_elements(elements: Sequence[str], *, title: str) -> str:
    """Group elements under one title, which is shown under the mouse."""
    return _build_element("g", {}, content=_build_title(title) + "".join(elements))


def _build_title(title: str) -> str:
    """Return the markup of a title; nothing for an empty one."""
    return f"<title>{escape(title)}</title>" if title else ""


def _build_element(tag: str, attributes: Attributes, *, content: str = "") -> str:
    """Return the markup of one element; empty attributes are left out."""
    parts = [tag]
    for name, value in attributes.items():
        text = value if isinstance(value, str) else f"{value:.1f}"
        if text:
            parts.append(f'{name}="{escape(text)}"')
    opening = " ".join(parts)
    return f"<{opening}>{content}</{tag}>" if content else f"<{opening}/>"
