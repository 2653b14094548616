"""Every block of every node: units kept of the units there were.

Cross-modal blocks are outlined.
"""

from __future__ import annotations

from mmcompress.graph.blocks import Block
from mmcompress.report.charts.svg import (
    WIDTH,
    build_svg,
    choose_color,
    draw_rectangle,
    draw_text,
    group_elements,
    shorten_text,
)
from mmcompress.results.records import Summary

MAP_LEFT = 96.0
"""Units left of the cells, for the names of the nodes."""

MAP_TOP = 6.0
"""Units above the first row."""

CELLS_PER_ROW = 9
"""Cells of a row. A node with more blocks goes on in the next row."""

CELL_STEP = (WIDTH - MAP_LEFT) / CELLS_PER_ROW
"""Units from one cell to the next."""

CELL_WIDTH = CELL_STEP - 6
"""Units of width of a cell."""

CELL_HEIGHT = 30.0
"""Units of height of a cell."""

FIGURES_Y = CELL_HEIGHT + 15
"""Units from the upper edge of a cell to the base line of its figures."""

NAME_Y = CELL_HEIGHT + 29
"""Units from the upper edge of a cell to the base line of its name."""

MAP_ROW_STEP = 76.0
"""Units from one row to the next."""


def draw_structure_map(summary: Summary) -> str:
    """Draw a cell for each block, filled by the share of its units that is kept."""
    top = MAP_TOP
    elements: list[str] = []
    for i, (node, blocks) in enumerate(summary.blocks.items()):
        name = shorten_text(node, MAP_LEFT - 10)
        elements.append(draw_text(MAP_LEFT - 10, top + 20, text=name, css="strong", anchor="end"))
        for j, block in enumerate(blocks):
            column = j % CELLS_PER_ROW
            if j and column == 0:
                top += MAP_ROW_STEP
            elements.append(
                _draw_cell(
                    MAP_LEFT + column * CELL_STEP,
                    top,
                    node=node,
                    block=block,
                    summary=summary,
                    color=choose_color(i),
                )
            )
        top += MAP_ROW_STEP
    return build_svg(WIDTH, top, elements=elements, label="units kept in every block")


def _draw_cell(
    left: float, top: float, *, node: str, block: Block, summary: Summary, color: str
) -> str:
    """Draw the cell of one block, with its figures and its name below."""
    kept = summary.kept_units.get(node, {}).get(block.name, block.units)
    filled_height = CELL_HEIGHT * kept / block.units
    bottom = top + CELL_HEIGHT
    middle = left + CELL_WIDTH / 2
    title = f"{node}.{block.name}: {kept} of {block.units} kept"
    elements = [
        draw_rectangle(left, top, width=CELL_WIDTH, height=CELL_HEIGHT, css="slot"),
        draw_rectangle(
            left, bottom - filled_height, width=CELL_WIDTH, height=filled_height, fill=color
        ),
    ]
    if block.name in summary.cross_modal_reasons.get(node, {}):
        title += " (cross-modal)"
        elements.append(
            draw_rectangle(left, top, width=CELL_WIDTH, height=CELL_HEIGHT, css="crossing")
        )
    figures = f"{kept}/{block.units}"
    name = shorten_text(_abbreviate_name(block.name), CELL_STEP)
    elements.append(draw_text(middle, top + FIGURES_Y, text=figures, anchor="middle"))
    elements.append(draw_text(middle, top + NAME_Y, text=name, css="small", anchor="middle"))
    return group_elements(elements, title=title)


def _abbreviate_name(block_name: str) -> str:
    """Return the name of a block as it fits under its cell."""
    return block_name.replace("attention", "attn").replace("cross_attn", "cross")
