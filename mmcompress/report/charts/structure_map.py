"""Every block of every node: units kept of the units there were.

Cross-modal blocks are outlined, and say why they are cross-modal.
"""

from __future__ import annotations

import altair

from mmcompress.graph.blocks import Block
from mmcompress.report.charts.vega import (
    INK,
    LINE_COLOR,
    PAGE_WIDTH,
    SOFT_INK,
    Row,
    choose_color,
    layer_charts,
    make_chart,
    render_chart,
)
from mmcompress.results.records import Summary

CELLS_PER_ROW = 9
"""Cells of a row. A node with more blocks goes on in the next row."""

NAME_ROOM = 1.1
"""Cells of room left of the first one, for the names of the nodes."""

MAX_NAME_PIXELS = 80
"""Pixels of width of a name; longer ones are cut off."""

MAP_ROW_HEIGHT = 76
"""Pixels from one row to the next."""

CELL_WIDTH_SHARE = 0.92
"""Width of a cell / distance to the next."""

CELL_HEIGHT_SHARE = 0.4
"""Height of a cell / distance to the next row."""

FIGURES_PLACE = 0.52
"""Rows from the upper edge of a cell to its figures."""

BLOCK_NAME_PLACE = 0.71
"""Rows from the upper edge of a cell to its name."""


def draw_structure_map(summary: Summary) -> str:
    """Draw a cell for each block, filled by the share of its units that is kept."""
    cells: list[Row] = []
    names: list[Row] = []
    row = 0
    for node, blocks in summary.blocks.items():
        names.append({"left": -0.1, "top": row + CELL_HEIGHT_SHARE / 2, "name": node})
        for i, block in enumerate(blocks):
            if i and i % CELLS_PER_ROW == 0:
                row += 1
            cells.append(_make_cell(summary, node, block=block, row=row, column=i % CELLS_PER_ROW))
        row += 1
    chart = layer_charts(*_draw_cells(cells, summary, rows=row), _draw_names(names))
    sized = chart.properties(width=PAGE_WIDTH, height=MAP_ROW_HEIGHT * max(1, row))
    return render_chart(sized, label="units kept in every block")


def _make_cell(summary: Summary, node: str, *, block: Block, row: int, column: int) -> Row:
    """Return the row of one block: its place, how far it is filled, its texts."""
    kept = summary.kept_units.get(node, {}).get(block.name, block.units)
    reason = summary.cross_modal_reasons.get(node, {}).get(block.name)
    description = f"{node}.{block.name}: {kept} of {block.units} kept"
    if reason is not None:
        description += f" (cross-modal: {reason})" if reason else " (cross-modal)"
    bottom = row + CELL_HEIGHT_SHARE
    return {
        "node": node,
        "left": column,
        "middle": column + CELL_WIDTH_SHARE / 2,
        "right": column + CELL_WIDTH_SHARE,
        "top": row,
        "fill": bottom - CELL_HEIGHT_SHARE * kept / block.units,
        "bottom": bottom,
        "figures": f"{kept}/{block.units}",
        "figures_top": row + FIGURES_PLACE,
        "name": block.name.replace("attention", "attn").replace("cross_attn", "cross"),
        "name_top": row + BLOCK_NAME_PLACE,
        "is_cross_modal": reason is not None,
        "description": description,
    }


def _draw_cells(cells: list[Row], summary: Summary, *, rows: int) -> list[altair.Chart]:
    """Draw empty cells, what is kept of them, outlines, texts, and what the mouse meets."""
    chart = make_chart(cells)
    across = altair.Scale(domain=[-NAME_ROOM, CELLS_PER_ROW], nice=False)
    # Rows run downwards.
    down = altair.Scale(domain=[rows or 1, 0], nice=False)
    left = altair.X("left:Q", scale=across, axis=None)
    top = altair.Y("top:Q", scale=down, axis=None)
    fill = altair.Y("fill:Q", scale=down, axis=None)
    nodes = list(summary.blocks)
    color = altair.Color(
        "node:N",
        legend=None,
        scale=altair.Scale(domain=nodes, range=[choose_color(i) for i in range(len(nodes))]),
    )
    place = {"x": left, "x2": "right:Q", "y2": "bottom:Q"}
    outlines = make_chart([cell for cell in cells if cell["is_cross_modal"]])
    texts = {"x": altair.X("middle:Q", scale=across, axis=None)}
    return [
        chart.mark_rect(color=LINE_COLOR, aria=False).encode(y=top, **place),
        chart.mark_rect(aria=False).encode(y=fill, color=color, **place),
        outlines.mark_rect(filled=False, stroke=INK, strokeWidth=2.5, aria=False).encode(
            y=top, **place
        ),
        chart.mark_text(aria=False).encode(
            y=altair.Y("figures_top:Q", scale=down, axis=None), text="figures:N", **texts
        ),
        chart.mark_text(fontSize=11, color=SOFT_INK, limit=MAX_NAME_PIXELS, aria=False).encode(
            y=altair.Y("name_top:Q", scale=down, axis=None), text="name:N", **texts
        ),
        chart.mark_rect(fill="transparent").encode(y=top, description="description:N", **place),
    ]


def _draw_names(names: list[Row]) -> altair.Chart:
    """Draw the name of every node left of its cells."""
    text = make_chart(names).mark_text(
        align="right", fontWeight=600, limit=MAX_NAME_PIXELS, aria=False
    )
    named: altair.Chart = text.encode(x="left:Q", y="top:Q", text="name:N")
    return named
