"""Whole exports of a pipeline's models, and the latency predictor that they and the device table make."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mmcompress.export.onnx import export_node
from mmcompress.graph.blocks import count_steps, cut_by_share, units_after
from mmcompress.graph.references import (
    decode_steps_by_node,
    source_nodes,
    split_reference,
    texts_per_request,
)
from mmcompress.graph.structure import KeptUnits
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.fit_predictor import (
    NodeRatios,
    PipelineMeasurement,
    fit_predictor,
)
from mmcompress.measure.cost_model.plan import QUANTIZED_FOLDER, Export, GraphCall, MeasurementPlan
from mmcompress.measure.cost_model.predictor import (
    PositionWindow,
    Predictor,
    deploy_blocks,
    list_table_needs,
)
from mmcompress.models.base import Model
from mmcompress.models.counts import count_params
from mmcompress.prune.surgery import copy_resized
from mmcompress.quantize.base import quantize_model
from mmcompress.registry import PRECISIONS
from mmcompress.runtime.bundle import read_manifest
from mmcompress.runtime.sessions import open_session
from mmcompress.spec.schema import Spec

EXPORT_SHARES, LARGE_NODE_PARAMS = (1.0, 0.6, 0.3), 20e6
"""Structures exported whole to calibrate a node: the share of units kept in every block. The first and the last will do
for a node of so many parameters, of which one export says as much as several of a small one."""


def keep_uniform_share(model: Model, share: float, *, cut: int = 0) -> KeptUnits:
    """The same share of every block, and all positions but `cut`."""
    kept_units: KeptUnits = {}
    for block in model.blocks:
        if block.group == "tokens":
            kept_units[block.name] = block.units - cut
        else:
            kept_units[block.name] = cut_by_share(block, 1 - share)
    return kept_units


def keep_share_and_drop_blocks(model: Model, share: float) -> KeptUnits:
    """The same share of every block, and every other one that may go is gone."""
    kept = keep_uniform_share(model, share)
    return kept | dict.fromkeys([b.name for b in model.blocks if b.drop][::2], 0)


def find_position_windows(
    models: Mapping[str, Model], shortest: Mapping[str, float]
) -> dict[str, PositionWindow]:
    """Positions that may be cut: `shortest` is the largest share of them, by node."""
    found = {}
    for n, share in shortest.items():
        if block := next((b for b in models[n].blocks if b.group == "tokens" and share > 0), None):
            cuts = {
                block.units - int(units_after(block, round(share * count_steps(block) * i / 3)))
                for i in (1, 2, 3)
            }
            found[n] = PositionWindow(
                count=block.units, ordered=block.prefix_only, cuts=tuple(sorted(cuts - {0}))
            )
    return found


def plan_measurements(
    spec: Spec,
    models: Mapping[str, Model],
    *,
    calls: Mapping[str, float],
    largest_cut_shares: Mapping[str, float] = MappingProxyType({}),
    precisions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    measure_small_pipelines: bool = False,
) -> MeasurementPlan:
    """Blocks at the shapes they run at. `calls`: session calls per request; `shortest`: see `windows_of`; `measure_small_pipelines`:
    whether smaller pipelines are measured as well."""
    decode, texts, windows = (
        decode_steps_by_node(spec, calls),
        texts_per_request(spec),
        find_position_windows(models, largest_cut_shares),
    )
    placed = {}
    for n, m in models.items():
        source = split_reference(spec.nodes[n].inputs.get("context", ""))[0]
        read = source if source in windows and getattr(models[source], "passes", True) else ""
        shapes = m.list_block_shapes(decode[n], texts[n])
        placed[n] = deploy_blocks(m.blocks, shapes, own=n if n in windows else "", context_of=read)
    used = {n: tuple(dict.fromkeys(("fp32", *precisions.get(n, ("int8",))))) for n in models}
    reads = (
        {n: tuple(sorted(source_nodes(spec, n))) for n in spec.nodes}
        if spec.measure.parallel
        else {}
    )
    little = {"small": {n: keep_uniform_share(m, 0.25) for n, m in models.items()}}
    little["thin"] = {n: keep_share_and_drop_blocks(m, 0.6) for n, m in models.items()}
    return MeasurementPlan(
        deployed=placed,
        windows=windows,
        precisions=used,
        reads=reads,
        small_structures=little if measure_small_pipelines else {},
    )


def write_exports(
    spec: Spec,
    models: Mapping[str, Model],
    *,
    plan: MeasurementPlan,
    calls: Mapping[str, float],
    folder: Path,
    keep_files: bool = True,
) -> Iterator[Export]:
    """Write every node at a few structures, in each of its precisions; whole it lies in the dense bundles of `folder`.

    Without `keep_files` the files of one structure are gone when the next is asked for.
    """
    bundles = {
        p: folder / ("baseline" if p == "fp32" else f"{QUANTIZED_FOLDER}/{p}")
        for p in plan.every_precision
    }
    nodes = {p: read_manifest(b)["graph"]["nodes"] for p, b in bundles.items()}
    decode, texts = decode_steps_by_node(spec, calls), texts_per_request(spec)
    for n, m in models.items():
        cuts = plan.windows[n].cuts if n in plan.windows else ()
        middle = ((1.0, cuts[len(cuts) // 2]),) if cuts else ()
        some = (
            EXPORT_SHARES
            if count_params(m) < LARGE_NODE_PARAMS
            else (EXPORT_SHARES[0], EXPORT_SHARES[-1])
        )
        for i, (share, cut) in enumerate((*((s, 0) for s in some), *middle)):
            kept = keep_uniform_share(m, share, cut=cut)
            small = copy_resized(m, kept)
            at, graphs = folder / "structures" / f"{n}-{i}", {}
            at.mkdir(parents=True)
            written = export_node(small, at) if i else {}
            requests = small.make_example_requests(decode[n], texts[n])
            for g, graph in small.export_graphs().items():
                feed = {k: v.numpy() for k, v in zip(graph.inputs, requests[g][0], strict=True)}
                np.savez(at / f"{g}.npz", **feed)  # type: ignore[arg-type]
                graphs[g] = (str((at / f"{g}.npz").relative_to(folder)), requests[g][1], feed)
            for p in plan.precisions[n]:
                files = (
                    written
                    if p == "fp32"
                    else {g: _rounded(f, p, feed=graphs[g][2]) for g, f in written.items()}
                )
                files = files or {g: bundles[p] / f for g, f in nodes[p][n]["files"].items()}
                size = sum(f.stat().st_size for f in files.values()) / 1e6
                found = {
                    g: GraphCall(str(f.relative_to(folder)), *graphs[g][:2])
                    for g, f in files.items()
                }
                yield Export(
                    node=n,
                    precision=p,
                    kept_units=kept,
                    cut_positions=cut,
                    params_m=count_params(small) / 1e6,
                    size_mb=size,
                    graphs=found,
                )
            if not keep_files:
                shutil.rmtree(at)


def _rounded(file: Path, precision: str, *, feed: Mapping[str, np.ndarray]) -> Path:
    """A graph in another precision; a static one sees inputs of the right shape: only speed and size count."""
    feeds = []
    if getattr(PRECISIONS.get(precision), "activations", "") == "static":
        used = {i.name for i in open_session(file, 0).get_inputs()}
        feeds = [{k: v for k, v in feed.items() if k in used}]
    return quantize_model(
        precision, file, target=file.with_suffix(f".{precision}.onnx"), feeds=feeds
    )[0]


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
    progress: Callable[[str, float], None],
) -> Predictor:
    """Measure on this machine what the table lacks and the exports, and fit (`readings.fitted`).

    `folder` holds the dense bundles: `baseline/`, and `rounded/` with one for every other precision.
    """
    threads = spec.measure.threads
    say = lambda what, share: progress(what, share * 0.7)
    wanted = list_table_needs(plan.deployed, plan.windows)
    found = benchmarker.complete_device_table(
        wanted, threads, precisions=plan.every_precision, progress=say
    )
    whole, ms = [], []
    shutil.rmtree(folder / "structures", ignore_errors=True)  # of a run that was cut off
    for e in write_exports(spec, models, plan=plan, calls=calls, folder=folder, keep_files=False):
        share = list(models).index(e.node) / len(models)
        progress(
            f"whole export of {e.node}, {e.precision}, {e.params_m:.2f} M parameters",
            0.7 + 0.3 * share,
        )
        whole.append(e)
        ms.append(benchmarker.time_export(e, folder, threads=threads))
    shutil.rmtree(folder / "structures", ignore_errors=True)
    return fit_predictor(
        plan, found, exports=whole, export_ms=ms, dense=dense, node_ratios=node_ratios
    )
