"""Whole exports of a pipeline's models, and the latency predictor that they and the device table make."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mmcompress.export.onnx import export_node
from mmcompress.graph.topology import decode_steps, sources, split, texts_read
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.counts import params
from mmcompress.measure.predict import Predictor, Window, needs, place
from mmcompress.measure.readings import ROUNDED, Call, Export, Measured, Plan, Shares, fitted
from mmcompress.models.base import Model
from mmcompress.prune.allocation import after, steps
from mmcompress.prune.surgery import resized
from mmcompress.quantize.precision import quantize
from mmcompress.records import Kept
from mmcompress.registry import PRECISIONS
from mmcompress.runtime.bundle import read_manifest
from mmcompress.runtime.sessions import session
from mmcompress.spec.schema import Spec

SHARES, LARGE = (1.0, 0.6, 0.3), 20e6
"""Structures exported whole to calibrate a node: the share of units kept in every block. The first and the last will do
for a node of so many parameters, of which one export says as much as several of a small one."""


def uniform(model: Model, share: float, cut: int = 0) -> Kept:
    """The same share of every block, and all positions but `cut`."""
    some = lambda b: int(after(b, round((1 - share) * steps(b))))
    return {b.name: b.units - cut if b.group == "tokens" else some(b) for b in model.blocks}


def thin(model: Model, share: float) -> Kept:
    """The same share of every block, and every other one that may go is gone."""
    kept = uniform(model, share)
    return kept | dict.fromkeys([b.name for b in model.blocks if b.drop][::2], 0)


def windows_of(models: Mapping[str, Model], shortest: Mapping[str, float]) -> dict[str, Window]:
    """Positions that may be cut: `shortest` is the largest share of them, by node."""
    found = {}
    for n, share in shortest.items():
        if block := next((b for b in models[n].blocks if b.group == "tokens" and share > 0), None):
            cuts = {block.units - int(after(block, round(share * steps(block) * i / 3))) for i in (1, 2, 3)}
            found[n] = Window(block.units, block.ordered, tuple(sorted(cuts - {0})))
    return found


def planned(
    spec: Spec,
    models: Mapping[str, Model],
    calls: Mapping[str, float],
    shortest: Mapping[str, float] = MappingProxyType({}),
    precisions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    small: bool = False,
) -> Plan:
    """Blocks at the shapes they run at. `calls`: session calls per request; `shortest`: see `windows_of`; `small`:
    whether smaller pipelines are measured as well."""
    decode, texts, windows = decode_steps(spec, calls), texts_read(spec), windows_of(models, shortest)
    placed = {}
    for n, m in models.items():
        source = split(spec.nodes[n].inputs.get("context", ""))[0]
        read = source if source in windows and getattr(models[source], "passes", True) else ""
        shapes = m.shapes(decode[n], texts[n])
        placed[n] = place(m.blocks, shapes, n if n in windows else "", read)
    used = {n: tuple(dict.fromkeys(("fp32", *precisions.get(n, ("int8",))))) for n in models}
    reads = {n: tuple(sorted(sources(spec, n))) for n in spec.nodes} if spec.measure.parallel else {}
    little = {"small": {n: uniform(m, 0.25) for n, m in models.items()}}
    little["thin"] = {n: thin(m, 0.6) for n, m in models.items()}
    return Plan(placed, windows, used, reads, little if small else {})


def exports(
    spec: Spec, models: Mapping[str, Model], plan: Plan, calls: Mapping[str, float], folder: Path, keep: bool = True
) -> Iterator[Export]:
    """Write every node at a few structures, in each of its precisions; whole it lies in the dense bundles of `folder`.

    Without `keep` the files of one structure are gone when the next is asked for.
    """
    bundles = {p: folder / ("baseline" if p == "fp32" else f"{ROUNDED}/{p}") for p in plan.every_precision}
    nodes = {p: read_manifest(b)["graph"]["nodes"] for p, b in bundles.items()}
    decode, texts = decode_steps(spec, calls), texts_read(spec)
    for n, m in models.items():
        cuts = plan.windows[n].cuts if n in plan.windows else ()
        middle = ((1.0, cuts[len(cuts) // 2]),) if cuts else ()
        some = SHARES if params(m) < LARGE else (SHARES[0], SHARES[-1])
        for i, (share, cut) in enumerate((*((s, 0) for s in some), *middle)):
            kept = uniform(m, share, cut)
            small = resized(m, kept)
            at, graphs = folder / "structures" / f"{n}-{i}", {}
            at.mkdir(parents=True)
            written = export_node(small, at) if i else {}
            requests = small.requests(decode[n], texts[n])
            for g, graph in small.graphs().items():
                feed = {k: v.numpy() for k, v in zip(graph.inputs, requests[g][0], strict=True)}
                np.savez(at / f"{g}.npz", **feed)  # type: ignore[arg-type]
                graphs[g] = (str((at / f"{g}.npz").relative_to(folder)), requests[g][1], feed)
            for p in plan.precisions[n]:
                files = written if p == "fp32" else {g: _rounded(f, p, graphs[g][2]) for g, f in written.items()}
                files = files or {g: bundles[p] / f for g, f in nodes[p][n]["files"].items()}
                size = sum(f.stat().st_size for f in files.values()) / 1e6
                found = {g: Call(str(f.relative_to(folder)), *graphs[g][:2]) for g, f in files.items()}
                yield Export(n, p, kept, cut, params(small) / 1e6, size, found)
            if not keep:
                shutil.rmtree(at)


def _rounded(file: Path, precision: str, feed: Mapping[str, np.ndarray]) -> Path:
    """A graph in another precision; a static one sees inputs of the right shape: only speed and size count."""
    feeds = []
    if getattr(PRECISIONS.get(precision), "activations", "") == "static":
        used = {i.name for i in session(file, 0).get_inputs()}
        feeds = [{k: v for k, v in feed.items() if k in used}]
    return quantize(precision, file, file.with_suffix(f".{precision}.onnx"), feeds)[0]


def calibrated(
    spec: Spec,
    models: Mapping[str, Model],
    plan: Plan,
    calls: Mapping[str, float],
    dense: Measured,
    beside: Shares,
    folder: Path,
    progress: Callable[[str, float], None] = lambda what, share: None,
    *,
    bench: Benchmarker,
) -> Predictor:
    """Measure on this machine what the table lacks and the exports, and fit (`readings.fitted`).

    `folder` holds the dense bundles: `baseline/`, and `rounded/` with one for every other precision.
    """
    threads = spec.measure.threads
    say = lambda what, share: progress(what, share * 0.7)
    wanted = needs(plan.placed, plan.windows)
    found = bench.complete_device_table(wanted, threads, precisions=plan.every_precision, progress=say)
    whole, ms = [], []
    shutil.rmtree(folder / "structures", ignore_errors=True)  # of a run that was cut off
    for e in exports(spec, models, plan, calls, folder, keep=False):
        share = list(models).index(e.node) / len(models)
        progress(f"whole export of {e.node}, {e.precision}, {e.params_m:.2f} M parameters", 0.7 + 0.3 * share)
        whole.append(e)
        ms.append(bench.time_export(e, folder, threads=threads))
    shutil.rmtree(folder / "structures", ignore_errors=True)
    return fitted(plan, found, whole, ms, dense, beside)
