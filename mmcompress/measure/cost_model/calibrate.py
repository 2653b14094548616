"""Plan what to measure of a pipeline, export its nodes, and calibrate the predictor.

This is the torch side of the cost model: it cuts and exports models. What measures them needs no
torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mmcompress.export.onnx import export_node
from mmcompress.graph.blocks import Block, count_steps, count_units_after
from mmcompress.graph.references import (
    count_decode_steps,
    count_texts_per_request,
    find_source_nodes,
    find_token_source,
)
from mmcompress.graph.structure import KeptUnits, cut_each_block
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.fit_predictor import (
    NodeRatios,
    PipelineMeasurement,
    fit_predictor,
)
from mmcompress.measure.cost_model.plan import (
    DENSE_NAME,
    Export,
    GraphCall,
    MeasurementPlan,
    list_reference_bundles,
)
from mmcompress.measure.cost_model.predictor import (
    PositionWindow,
    Predictor,
    deploy_blocks,
    list_table_needs,
)
from mmcompress.models.base import ExportGraph, Model
from mmcompress.models.counts import count_params
from mmcompress.models.device import CPU, copy_to_device
from mmcompress.prune.surgery import copy_resized
from mmcompress.quantize.base import Precision, quantize_model
from mmcompress.registry import PRECISIONS
from mmcompress.runtime.bundle import read_manifest
from mmcompress.runtime.progress import StageProgress, scale_progress
from mmcompress.runtime.sessions import open_session
from mmcompress.spec.schema import Spec

EXPORT_SHARES = (1.0, 0.6, 0.3)
"""Shares of the units of every block: the structures that a node is exported at. The first one is
the whole node."""

LARGE_NODE_SHARES = (1.0, 0.3)
"""The same for a large node: one of its exports says as much as several of a small one."""

LARGE_NODE_PARAMS = 20e6
"""Parameters from which a node is large."""

SMALL_SHARE = 0.25
"""Share of the units of every block: the smaller pipeline that tells the scale of a node."""

THIN_SHARE = 0.6
"""Share of the units of the blocks that are left: the pipeline that tells what a block costs
besides its units."""

MEASURED_CUTS_PER_WINDOW = 3
"""Cuts of positions that the table is measured at, evenly spaced up to the largest one."""

STRUCTURES_FOLDER = "structures"
"""Folder of the cut exports that are timed whole; it is removed after the calibration."""

ROW_AXES = ("batch", "images")
"""Names of first axes that count texts, or contexts."""

TABLE_SHARE_OF_PROGRESS = 0.7
"""Share of the calibration that measuring the table takes, 0..1; whole exports take the rest."""


def keep_share_and_drop_blocks(model: Model, share: float) -> KeptUnits:
    """Choose a structure that keeps the same share of every block, and drops every other one that
    can be dropped.

    Args:
        model: The model.
        share: Share of the units to keep, 0..1.

    Returns:
        Units by block.
    """
    kept_units = cut_each_block(model.blocks, 1 - share)
    droppable_blocks = [block.name for block in model.blocks if block.drop]
    for name in droppable_blocks[::2]:
        kept_units[name] = 0
    return kept_units


def find_position_windows(
    models: Mapping[str, Model], largest_cut_shares: Mapping[str, float]
) -> dict[str, PositionWindow]:
    """Find the nodes whose positions can be cut.

    Args:
        models: The models, by node.
        largest_cut_shares: Largest share of positions that the search may cut, 0..1, by node.

    Returns:
        Windows by node, with the cuts that the table is measured at.
    """
    windows: dict[str, PositionWindow] = {}
    for node, share in largest_cut_shares.items():
        block = _find_positions_block(models[node])
        if block is None or share <= 0:
            continue
        cuts: set[int] = set()
        for i in range(1, MEASURED_CUTS_PER_WINDOW + 1):
            removed_steps = round(share * count_steps(block) * i / MEASURED_CUTS_PER_WINDOW)
            cuts.add(block.units - int(count_units_after(block, removed_steps)))
        windows[node] = PositionWindow(
            count=block.units, prefix_only=block.prefix_only, cuts=tuple(sorted(cuts - {0}))
        )
    return windows


def _find_positions_block(model: Model) -> Block | None:
    """Return the block whose units are positions, None where a model has none."""
    for block in model.blocks:
        if block.group == "tokens":
            return block
    return None


def plan_measurements(
    spec: Spec,
    models: Mapping[str, Model],
    *,
    calls: Mapping[str, float],
    largest_cut_shares: Mapping[str, float] = MappingProxyType({}),
    precisions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    measure_small_pipelines: bool = False,
) -> MeasurementPlan:
    """Plan what has to be measured of a device to predict a pipeline on it.

    Args:
        spec: The pipeline.
        models: The whole models, by node.
        calls: Session calls per request, by `node/graph`.
        largest_cut_shares: Largest share of positions that the search may cut, 0..1, by node.
        precisions: Precisions that the search may choose, by node; default: int8.
        measure_small_pipelines: Whether smaller pipelines are measured too; slow pipelines have no
            time for them.

    Returns:
        The plan, with every block at the shape that it runs at.
    """
    decode_steps = count_decode_steps(spec, calls)
    texts = count_texts_per_request(spec)
    windows = find_position_windows(models, largest_cut_shares)
    deployed = {}
    precisions_by_node: dict[str, tuple[str, ...]] = {}
    for node, model in models.items():
        deployed[node] = deploy_blocks(
            model.blocks,
            model.list_block_shapes(decode_steps[node], texts[node]),
            own_window=node if node in windows else "",
            context_window=_find_context_window(spec, models, node=node, windows=windows),
            batch=spec.measure.batch,
        )
        precisions_of_node = (DENSE_NAME, *precisions.get(node, ("int8",)))
        precisions_by_node[node] = tuple(dict.fromkeys(precisions_of_node))
    reads: dict[str, tuple[str, ...]] = {}
    if spec.measure.parallel:
        for node in spec.nodes:
            reads[node] = tuple(sorted(find_source_nodes(spec, node)))
    small_structures: dict[str, dict[str, KeptUnits]] = {}
    if measure_small_pipelines:
        small_structures = _choose_small_structures(models)
    return MeasurementPlan(
        deployed=deployed,
        windows=windows,
        precisions=precisions_by_node,
        reads=reads,
        small_structures=small_structures,
    )


def _find_context_window(
    spec: Spec,
    models: Mapping[str, Model],
    *,
    node: str,
    windows: Mapping[str, PositionWindow],
) -> str:
    """Return the node whose positions a node reads, where those can be cut; else an empty name."""
    source = find_token_source(spec, node)
    if source not in windows:
        return ""
    if not models[source].passes_positions:
        # a few queries read its positions: as many tokens come out whatever is cut
        return ""
    return source


def _choose_small_structures(models: Mapping[str, Model]) -> dict[str, dict[str, KeptUnits]]:
    """Choose the smaller pipelines that are measured: one with less of all blocks, one without some
    of them."""
    small_blocks: dict[str, KeptUnits] = {}
    thin: dict[str, KeptUnits] = {}
    for node, model in models.items():
        small_blocks[node] = cut_each_block(model.blocks, 1 - SMALL_SHARE)
        thin[node] = keep_share_and_drop_blocks(model, THIN_SHARE)
    return {"small": small_blocks, "thin": thin}


@dataclass(frozen=True, kw_only=True)
class _ExportStructure:
    """A structure that a node is exported at."""

    share: float
    """Share of the units of every block, 0..1."""
    cut: int = 0
    """Positions left out."""


@dataclass(frozen=True, kw_only=True)
class _FeedFile:
    """The inputs of one graph, as they come in deployment."""

    path: str
    """Relative to the folder of all exports."""
    calls: float
    """Calls per request."""
    arrays: dict[str, np.ndarray]
    """One array for each input of the graph, by name."""


def write_exports(
    spec: Spec,
    models: Mapping[str, Model],
    *,
    plan: MeasurementPlan,
    calls: Mapping[str, float],
    folder: Path,
    keep_files: bool = True,
) -> Iterator[Export]:
    """Write every node at a few structures, in each of its precisions.

    The whole nodes are not written: their graphs lie in the dense bundles of `folder`.

    Args:
        spec: The pipeline.
        models: The whole models, by node.
        plan: Precisions and windows of the nodes.
        calls: Session calls per request, by `node/graph`.
        folder: Holds the dense bundle and, in `QUANTIZED_FOLDER`, one for every other precision.
        keep_files: Whether the files of a structure stay. If not, they are removed when the next
            one is asked for.

    Yields:
        Exports, node by node; the whole node first.
    """
    other_precisions = [precision for precision in plan.every_precision if precision != DENSE_NAME]
    bundles = list_reference_bundles(folder, other_precisions)
    whole_files: dict[str, dict[str, dict[str, Path]]] = {}
    for precision in plan.every_precision:
        whole_files[precision] = _list_graph_files(bundles[precision])
    decode_steps = count_decode_steps(spec, calls)
    texts = count_texts_per_request(spec)
    for node, model in models.items():
        structures = _list_export_structures(model, plan.windows.get(node))
        for i, structure in enumerate(structures):
            kept_units = cut_each_block(
                model.blocks, 1 - structure.share, cut_positions=structure.cut
            )
            resized_model = copy_resized(copy_to_device(model, CPU), kept_units)
            structure_folder = folder / STRUCTURES_FOLDER / f"{node}-{i}"
            structure_folder.mkdir(parents=True)
            is_whole = i == 0
            fp32_files = {} if is_whole else export_node(resized_model, structure_folder)
            feeds = _write_feeds(
                resized_model,
                structure_folder,
                root=folder,
                decode_steps=decode_steps[node],
                texts=texts[node],
                batch=spec.measure.batch,
            )
            params_m = count_params(resized_model) / 1e6
            for precision in plan.precisions[node]:
                if is_whole:
                    files = whole_files[precision][node]
                else:
                    files = _quantize_files(fp32_files, precision, feeds=feeds)
                yield Export(
                    node=node,
                    precision=precision,
                    kept_units=kept_units,
                    cut_positions=structure.cut,
                    params_m=params_m,
                    size_mb=sum(file.stat().st_size for file in files.values()) / 1e6,
                    graphs=_list_graph_calls(files, feeds, root=folder),
                )
            if not keep_files:
                shutil.rmtree(structure_folder)


def _list_graph_files(bundle: Path) -> dict[str, dict[str, Path]]:
    """List the ONNX files of a bundle, by node and graph."""
    files: dict[str, dict[str, Path]] = {}
    for node, entry in read_manifest(bundle)["graph"]["nodes"].items():
        files[node] = {graph: bundle / name for graph, name in entry.get("files", {}).items()}
    return files


def _list_export_structures(model: Model, window: PositionWindow | None) -> list[_ExportStructure]:
    """List the structures that a node is exported at: the whole one first, one with positions cut
    last."""
    is_large = count_params(model) >= LARGE_NODE_PARAMS
    shares = LARGE_NODE_SHARES if is_large else EXPORT_SHARES
    structures = [_ExportStructure(share=share) for share in shares]
    if window is not None and window.cuts:
        middle_cut = window.cuts[len(window.cuts) // 2]
        structures.append(_ExportStructure(share=1.0, cut=middle_cut))
    return structures


def _write_feeds(
    model: Model,
    structure_folder: Path,
    *,
    root: Path,
    decode_steps: float,
    texts: int,
    batch: int,
) -> dict[str, _FeedFile]:
    """Write the inputs of every graph of a model, and return them by graph."""
    requests = model.make_example_requests(decode_steps, texts)
    feeds: dict[str, _FeedFile] = {}
    for name, graph in model.export_graphs().items():
        request = requests[name]
        arrays = {
            port: tensor.numpy() for port, tensor in zip(graph.inputs, request.inputs, strict=True)
        }
        arrays = _repeat_for_batch(arrays, graph, batch=batch)
        path = structure_folder / f"{name}.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]
        feeds[name] = _FeedFile(
            path=str(path.relative_to(root)), calls=request.calls, arrays=arrays
        )
    return feeds


def _repeat_for_batch(
    arrays: Mapping[str, np.ndarray], graph: ExportGraph, *, batch: int
) -> dict[str, np.ndarray]:
    """Repeat the inputs of a graph for a batch of requests, as the deployed node gives them.

    Args:
        arrays: Inputs of one request.
        graph: Says which first axis counts texts (`batch`) or contexts (`images`).
        batch: Requests that are answered together. What one request's texts share, those of a
            batch have one each.
    """
    if batch == 1:
        return dict(arrays)
    counted = [name for name in arrays if graph.dynamic_axes.get(name, {}).get(0) in ROW_AXES]
    rows = max((len(arrays[name]) for name in counted), default=1)
    repeated = dict(arrays)
    for name in counted:
        repeated[name] = np.repeat(arrays[name], batch * rows // len(arrays[name]), 0)
    return repeated


def _quantize_files(
    fp32_files: Mapping[str, Path], precision: str, *, feeds: Mapping[str, _FeedFile]
) -> dict[str, Path]:
    """Write the graphs of a node in a precision, and return their files by graph."""
    if precision == DENSE_NAME:
        return dict(fp32_files)
    files: dict[str, Path] = {}
    for graph, file in fp32_files.items():
        files[graph] = _quantize_file(file, precision, feed=feeds[graph].arrays)
    return files


def _quantize_file(file: Path, precision: str, *, feed: Mapping[str, np.ndarray]) -> Path:
    """Write a graph in a precision.

    One with static ranges is calibrated on inputs of the right shape: only its speed and its size
    matter.
    """
    calibration_feeds: list[dict[str, np.ndarray]] = []
    quantization: Precision = PRECISIONS.get(precision)
    if quantization.needs_calibration:
        input_names = {graph_input.name for graph_input in open_session(file, 0).get_inputs()}
        # an optimized graph may have lost an input that it did not use
        used_inputs = {name: array for name, array in feed.items() if name in input_names}
        calibration_feeds.append(used_inputs)
    quantized_file, _ = quantize_model(
        precision,
        file,
        target=file.with_suffix(f".{precision}.onnx"),
        feeds=calibration_feeds,
    )
    return quantized_file


def _list_graph_calls(
    files: Mapping[str, Path], feeds: Mapping[str, _FeedFile], *, root: Path
) -> dict[str, GraphCall]:
    """List what a request runs of an export, by graph."""
    graph_calls: dict[str, GraphCall] = {}
    for graph, file in files.items():
        graph_calls[graph] = GraphCall(
            file=str(file.relative_to(root)), feed=feeds[graph].path, calls=feeds[graph].calls
        )
    return graph_calls


def calibrate_predictor(
    spec: Spec,
    models: Mapping[str, Model],
    *,
    plan: MeasurementPlan,
    calls: Mapping[str, float],
    dense: PipelineMeasurement,
    node_ratios: NodeRatios,
    folder: Path,
    benchmarker: Benchmarker,
    progress: StageProgress,
) -> Predictor:
    """Measure the blocks that the table of this machine lacks and the whole exports, and fit the
    predictor.

    Args:
        spec: The pipeline.
        models: The whole models, by node.
        plan: What has to be measured.
        calls: Session calls per request, by `node/graph`.
        dense: The dense pipeline.
        node_ratios: What each node took in every other precision, and in smaller pipelines.
        folder: Holds the dense bundle and, in `QUANTIZED_FOLDER`, one for every other precision.
        benchmarker: Measures blocks and exports.
        progress: Called before every measurement.

    Returns:
        The predictor, not corrected yet.
    """
    table = benchmarker.complete_device_table(
        list_table_needs(plan.deployed, plan.windows),
        spec.measure.threads,
        precisions=plan.every_precision,
        progress=scale_progress(progress, start=0.0, end=TABLE_SHARE_OF_PROGRESS),
        provider=spec.measure.provider,
    )
    exports: list[Export] = []
    export_ms: list[float] = []
    # files of a run that was interrupted
    shutil.rmtree(folder / STRUCTURES_FOLDER, ignore_errors=True)
    for export in write_exports(
        spec, models, plan=plan, calls=calls, folder=folder, keep_files=False
    ):
        node_share = list(models).index(export.node) / len(models)
        progress(
            f"whole export of {export.node}, {export.precision}, "
            f"{export.params_m:.2f} M parameters",
            TABLE_SHARE_OF_PROGRESS + (1 - TABLE_SHARE_OF_PROGRESS) * node_share,
        )
        exports.append(export)
        milliseconds = benchmarker.time_export(
            export, folder, threads=spec.measure.threads, provider=spec.measure.provider
        )
        export_ms.append(milliseconds)
    shutil.rmtree(folder / STRUCTURES_FOLDER, ignore_errors=True)
    return fit_predictor(
        plan,
        table,
        exports=exports,
        export_ms=export_ms,
        dense=dense,
        node_ratios=node_ratios,
    )
