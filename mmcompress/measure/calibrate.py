"""Device table + whole exports -> the latency predictor of one pipeline on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from mmcompress.export.onnx import export_node
from mmcompress.graph.topology import decode_steps, split
from mmcompress.measure import table
from mmcompress.measure.counts import params
from mmcompress.measure.latency import quiet
from mmcompress.measure.machine import fingerprint
from mmcompress.measure.predict import Affine, Placed, Predictor, Window, needs, place
from mmcompress.models.base import Model
from mmcompress.models.packaged import cache_folder
from mmcompress.prune.allocation import after, steps
from mmcompress.prune.surgery import sliced
from mmcompress.quantize.precision import quantize
from mmcompress.records import Kept
from mmcompress.runtime.sessions import session
from mmcompress.spec.schema import Spec

SHARES = (1.0, 0.6, 0.3)
"""Structures exported whole to calibrate a node: the share of units kept in every block."""


def node_ms(model: Model, files: Mapping[str, Path], threads: int, decode_steps: float, beams: int) -> float:
    """Milliseconds one request spends in the sessions of a node."""
    total = 0.0
    graphs = model.graphs()
    for name, (inputs, calls) in model.requests(decode_steps, beams).items():
        run = session(files[name], threads)
        used = {i.name for i in run.get_inputs()}
        feed = {k: v.numpy() for k, v in zip(graphs[name].inputs, inputs, strict=True) if k in used}
        total += calls * quiet(partial(run.run, None, feed), 5, 100, 0.4)
    return total


def _rounded(
    model: Model, files: Mapping[str, Path], precision: str, decode_steps: float, beams: int
) -> dict[str, Path]:
    """The graphs of a node in another precision, calibrated on inputs of the right shape: only speed and size count."""
    graphs, out = model.graphs(), {}
    for g, (inputs, _) in model.requests(decode_steps, beams).items():
        feed = {k: v.numpy() for k, v in zip(graphs[g].inputs, inputs, strict=True)}
        used = {i.name for i in session(files[g], 0).get_inputs()}
        feeds = [{k: v for k, v in feed.items() if k in used}]
        out[g] = quantize(precision, files[g], files[g].with_suffix(f".{precision}.onnx"), feeds)
    return out


def uniform(model: Model, share: float, cut: int = 0) -> Kept:
    """The same share of every block, and all positions but `cut`."""
    some = lambda b: int(after(b, round((1 - share) * steps(b))))
    return {b.name: b.units - cut if b.group == "tokens" else some(b) for b in model.blocks}


def windows_of(models: Mapping[str, Model], shortest: Mapping[str, float]) -> dict[str, Window]:
    """Positions that may be cut: `shortest` is the largest share of them, by node."""
    found = {}
    for n, share in shortest.items():
        if block := next((b for b in models[n].blocks if b.group == "tokens" and share > 0), None):
            cuts = {block.units - int(after(block, round(share * steps(block) * i / 3))) for i in (1, 2, 3)}
            found[n] = Window(block.units, block.ordered, tuple(sorted(cuts - {0})))
    return found


def calibrated(
    spec: Spec,
    models: Mapping[str, Model],
    calls: Mapping[str, float],
    dense_ms: float,
    model_share: float,
    folder: Path,
    shortest: Mapping[str, float] = MappingProxyType({}),
    precisions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Predictor:
    """Measure what the table lacks, then fit base and scale per node and precision.

    `shortest`: the largest share of its positions that a node may lose; `calls`: session calls per request;
    `dense_ms`, `model_share`: p50 of the dense pipeline and the part of it spent in sessions. The prediction for the
    dense pipeline is exactly what was measured.
    """
    threads = spec.measure.threads
    placed: dict[str, tuple[Placed, ...]] = {}
    decode, windows = decode_steps(spec, calls), windows_of(models, shortest)
    for n, m in models.items():
        source = split(spec.nodes[n].inputs.get("context", ""))[0]
        read = source if source in windows and getattr(models[source], "passes", True) else ""
        shapes = m.shapes(decode[n], spec.nodes[n].candidates)
        placed[n] = place(m.blocks, shapes, n if n in windows else "", read)
    path = cache_folder() / f"device-{fingerprint(threads)}.json"
    used = {n: tuple(dict.fromkeys(("fp32", *precisions.get(n, ("int8",))))) for n in models}
    every = tuple(dict.fromkeys(p for by in used.values() for p in by))
    say = lambda what, share: progress(what, share * 0.7)
    found = table.measure(needs(placed, windows), threads, table.load_cached(path), say, every)
    table.store(path, found)
    draft = Predictor(found, placed, {}, 0.0, windows=windows)
    rows, affine, sizes, inside = found.lookup(), {}, {}, 0.0
    scratch = folder / "calibration"
    for i, (n, m) in enumerate(models.items()):
        raw: dict[str, list[float]] = {p: [] for p in used[n]}
        real: dict[str, list[float]] = {p: [] for p in used[n]}
        heavy: dict[str, list[float]] = {p: [] for p in used[n]}
        carried = []
        middle = ((1.0, windows[n].cuts[len(windows[n].cuts) // 2]),) if n in windows else ()
        for share, cut in (*((s, 0) for s in SHARES), *middle):
            progress(f"whole export of {n} at {share:.0%}", 0.7 + 0.3 * i / len(models))
            kept = uniform(m, share, cut)
            small = sliced(m, {b: torch.arange(k) for b, k in kept.items()})
            whole = export_node(small, scratch / n)
            carried.append(params(small) / 1e6)
            for p in used[n]:
                files = _rounded(small, whole, p, decode[n], spec.nodes[n].candidates) if p != "fp32" else whole
                raw[p].append(draft.raw(n, kept, p, rows, {n: cut}))
                real[p].append(node_ms(small, files, threads, decode[n], spec.nodes[n].candidates))
                heavy[p].append(sum(f.stat().st_size for f in files.values()) / 1e6)
        affine[n] = {p: Affine.fit(raw[p], real[p]) for p in used[n]}
        sizes[n] = {p: Affine.fit(carried, heavy[p]) for p in used[n]}
        inside += affine[n]["fp32"].base + affine[n]["fp32"].scale * raw["fp32"][0]  # the whole one
    shutil.rmtree(scratch, ignore_errors=True)
    # Inside a pipeline sessions find colder caches, and the machine may have been slower then than now: both show as
    # one factor between the dense pipeline's time in models and the sum of its sessions alone.
    slower = dense_ms * model_share / inside
    return Predictor(found, placed, affine, dense_ms * (1 - model_share) / slower, slower, windows, sizes)
