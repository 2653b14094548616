"""Every block of every model: units kept of the units there were. Cross-modal blocks are outlined."""

from __future__ import annotations

from mmcompress.graph.blocks import Block
from mmcompress.report.charts.svg import (
    build_svg,
    choose_color,
    draw_rectangle,
    draw_text,
    group_elements,
)
from mmcompress.results.records import Summary

LEFT = 96.0
"""Units left of the cells, for the names of the nodes."""

TOP = 18.0
"""Units above the first row."""

CELL_WIDTH = 74.0
"""Units of width of a cell."""

CELL_HEIGHT = 40.0
"""Units of height of a cell."""

CELL_STEP = 80.0
"""Units from one cell to the next."""

ROW_STEP = 74.0
"""Units from one row to the next."""


def draw_structure_map(summary: Summary) -> str:
    """Draw a row of cells for each node, filled by the share of units that is kept."""
    most_blocks = max(len(blocks) for blocks in summary.blocks.values())
    top = TOP
    elements: list[str] = []
    for i, (node, blocks) in enumerate(summary.blocks.items()):
        elements.append(draw_text(LEFT - 10, top + 24, text=node, css="strong", anchor="end"))
        for j, block in enumerate(blocks):
            left = LEFT + j * CELL_STEP
            elements.append(
                _draw_cell(
                    left, top, node=node, block=block, summary=summary, color=choose_color(i)
                )
            )
        top += ROW_STEP
    width = LEFT + most_blocks * CELL_STEP
    return build_svg(width, top, elements=elements, label="units kept in every block")


def _draw_cell(
    left: float, top: float, *, node: str, block: Block, summary: Summary, color: str
) -> str:
    """Draw the cell of one block, with its name and figures."""
    kept = summary.kept_units.get(node, {}).get(block.name, block.units)
    share = kept / block.units
    is_cross_modal = block.name in summary.cross_modal_reasons.get(node, {})
    middle = left + CELL_WIDTH / 2
    filled = CELL_HEIGHT * share
    elements = [
        draw_rectangle(left, top, width=CELL_WIDTH, height=CELL_HEIGHT, css="slot"),
        draw_rectangle(
            left, top + CELL_HEIGHT - filled, width=CELL_WIDTH, height=filled, fill=color
        ),
    ]
    if is_cross_modal:
        elements.append(
            draw_rectangle(left, top, width=CELL_WIDTH, height=CELL_HEIGHT, css="crossing")
        )
    figures = f"{kept}/{block.units}"
    figures_css = "on" if share > 0.6 else ""
    elements.append(draw_text(middle, top + 24, text=figures, css=figures_css, anchor="middle"))
    elements.append(
        draw_text(middle, top + 53, text=_shorten_name(block.name), css="small", anchor="middle")
    )
    title = f"{node}.{block.name}: {kept} of {block.units} kept"
    if is_cross_modal:
        title += " (cross-modal)"
    return group_elements(elements, title=title)


def _shorten_name(block_name: str) -> str:
    """Return the name of a block as it fits under its cell."""
    return block_name.replace("attention", "attn").replace("cross_attn", "cross")
