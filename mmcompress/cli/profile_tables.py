"""Measure the dense pipeline of a spec, and print it as tables. It takes torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mmcompress.cli.console import Progress, out
from mmcompress.graph.load_spec import load_spec
from mmcompress.measure.cost_model.predictor import DeployedBlock, Predictor
from mmcompress.run.begin_run import open_benchmarker
from mmcompress.run.check_records import set_damaged_shared_aside
from mmcompress.run.predictor import build_predictor
from mmcompress.run.profile import Profile, profile_pipeline
from mmcompress.run.run_facts import write_facts
from mmcompress.workspace.context import open_run
from mmcompress.workspace.hold_folder import hold_folder

MAX_SUM_ERROR = 0.3
"""Relative difference of the sum of the nodes' medians and the median of the whole from which on a
person is warned. Some percent are usual: medians do not add up exactly."""


def profile_spec(spec: str, place: str, *, overrides: dict[str, Any], resume: bool) -> None:
    """Measure the dense pipeline into a run folder, and print its nodes and blocks.

    Args:
        spec: The spec file.
        place: The run folder.
        overrides: Values by dotted key that replace those of the spec.
        resume: Whether the folder may hold a profile already.
    """
    asked_spec = load_spec(spec, overrides)
    with (
        Progress() as on_progress,
        hold_folder(place),
        open_benchmarker(asked_spec) as bench,
    ):
        run = open_run(
            spec,
            place,
            overrides=overrides,
            resume=resume,
            on_progress=on_progress,
            bench=bench,
        )
        set_damaged_shared_aside(run)
        write_facts(run)
        dense = profile_pipeline(run)
        predictor = build_predictor(run, dense)
    out.print(_make_node_table(dense))
    total = f"end to end p50 {dense.latency_ms.p50:.2f} ms, p95 {dense.latency_ms.p95:.2f} ms"
    out.print(f"{total}, {dense.model_share:.0%} inside models\n")
    if not run.spec.measure.parallel and not do_nodes_make_up_the_whole(dense):
        out.print(
            "[yellow]the nodes do not add up to the whole: the machine was busy or changed its "
            "speed. Profile again when it is calm[/yellow]\n",
            soft_wrap=True,
        )
    out.print(_make_block_table(dense, predictor))


def do_nodes_make_up_the_whole(dense: Profile) -> bool:
    """Return whether the latencies of the nodes add up to what the whole spends inside models."""
    nodes_ms = sum(latency.p50 for latency in dense.nodes.values())
    inside_ms = dense.model_share * dense.latency_ms.p50
    return abs(nodes_ms / inside_ms - 1) <= MAX_SUM_ERROR


def _make_node_table(dense: Profile) -> Table:
    """Return a row for every model."""
    table = Table("node", "parameters", "MACs", "p50", "share", box=None)
    for node, params in dense.params.items():
        p50 = dense.nodes[node].p50
        table.add_row(
            node,
            f"{params / 1e6:.2f} M",
            f"{dense.macs[node] / 1e6:.0f} M",
            f"{p50:.2f} ms",
            f"{p50 / dense.latency_ms.p50:.0%}",
        )
    return table


def _make_block_table(dense: Profile, predictor: Predictor) -> Table:
    """Return a row for every block, its latency in every precision, and why it is cross-modal."""
    precisions: list[str] = []
    for fits in predictor.fits.values():
        precisions += [precision for precision in fits if precision not in precisions]
    verdicts = {(row["node"], row["name"]): _describe_modality(row) for row in dense.modality}
    table = Table("block", "units", "parameters", box=None)
    for heading in (*precisions, "share", "modality"):
        table.add_column(heading)
    empty = [""] * len(precisions)
    for node, deployed_blocks in predictor.deployed.items():
        for block in dense.blocks[node]:
            if block.group == "tokens":
                row = [f"{node}.{block.name}", str(block.units), "", *empty, "", "unimodal"]
                table.add_row(*row)
        for deployed in deployed_blocks:
            row = _make_block_row(
                dense, predictor, node=node, block=deployed, precisions=precisions
            )
            table.add_row(*row, verdicts[node, deployed.name])
    for node, name in verdicts:
        if name == "projection":
            table.add_row(f"{node}.projection", "", "", *empty, "", verdicts[node, name])
    return table


def _make_block_row(
    dense: Profile,
    predictor: Predictor,
    *,
    node: str,
    block: DeployedBlock,
    precisions: Sequence[str],
) -> list[str]:
    """Return the row of one block, without its modality."""
    rows = predictor.table.index_rows()
    milliseconds: dict[str, float] = {}
    for precision in predictor.fits[node]:
        milliseconds[precision] = predictor.predict_block_ms(
            node, block, units=block.units, precision=precision, rows=rows
        )
    params = dense.block_params[node][block.name]
    cells = [f"{node}.{block.name}", str(block.units), f"{params / 1e3:.0f} k"]
    for precision in precisions:
        is_measured = precision in milliseconds
        cells.append(f"{milliseconds[precision]:.3f} ms" if is_measured else "")
    cells.append(f"{milliseconds['fp32'] / dense.latency_ms.p50:.1%}")
    return cells


def _describe_modality(row: dict[str, object]) -> str:
    """Return the verdict on a layer, with the reason when it is cross-modal."""
    if row["cross_modal"]:
        return f"[bold]cross-modal[/bold]: {row['reason']}"
    return "unimodal"
