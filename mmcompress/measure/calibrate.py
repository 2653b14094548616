"""Device table + whole exports -> the latency predictor of one pipeline on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from mmcompress.export.onnx import export_node
from mmcompress.measure import table
from mmcompress.measure.latency import quiet
from mmcompress.measure.machine import fingerprint
from mmcompress.measure.predict import Affine, Placed, Predictor, needs, place
from mmcompress.models.base import Model
from mmcompress.models.packaged import cache_folder
from mmcompress.prune.allocation import after, steps
from mmcompress.prune.surgery import sliced
from mmcompress.quantize.dynamic import quantize
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


def uniform(model: Model, share: float) -> Kept:
    return {b.name: int(after(b, round((1 - share) * steps(b)))) for b in model.blocks}


def calibrated(
    spec: Spec,
    models: Mapping[str, Model],
    calls: Mapping[str, float],
    dense_ms: float,
    model_share: float,
    folder: Path,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Predictor:
    """Measure what the table lacks, then fit base and scale per node and precision.

    `calls`: session calls per request; `dense_ms`, `model_share`: p50 of the dense pipeline and the part of it spent in
    sessions. The prediction for the dense pipeline is exactly what was measured.
    """
    threads = spec.measure.threads
    placed: dict[str, tuple[Placed, ...]] = {}
    decode = {n: calls.get(f"{n}/step", 1.0) for n in models}
    for n, m in models.items():
        placed[n] = place(m.blocks, m.shapes(decode[n], spec.nodes[n].candidates))
    path = cache_folder() / f"device-{fingerprint(threads)}.json"
    found = table.measure(needs(placed), threads, table.load_cached(path), lambda w, s: progress(w, s * 0.7))
    table.store(path, found)
    draft = Predictor(found, placed, {}, 0.0)
    rows, affine, inside = found.lookup(), {}, 0.0
    scratch = folder / "calibration"
    for i, (n, m) in enumerate(models.items()):
        raw: dict[str, list[float]] = {p: [] for p in table.PRECISIONS}
        real: dict[str, list[float]] = {p: [] for p in table.PRECISIONS}
        for share in SHARES:
            progress(f"whole export of {n} at {share:.0%}", 0.7 + 0.3 * i / len(models))
            kept = uniform(m, share)
            small = sliced(m, {b: torch.arange(k) for b, k in kept.items()})
            files = export_node(small, scratch / n)
            for p in table.PRECISIONS:
                if p == "int8":
                    files = {g: quantize(f, f.with_suffix(".int8.onnx")) for g, f in files.items()}
                raw[p].append(draft.raw(n, kept, p, rows))
                real[p].append(node_ms(small, files, threads, decode[n], spec.nodes[n].candidates))
        affine[n] = {p: Affine.fit(raw[p], real[p]) for p in table.PRECISIONS}
        inside += affine[n]["fp32"].base + affine[n]["fp32"].scale * raw["fp32"][0]
    shutil.rmtree(scratch, ignore_errors=True)
    # Inside a pipeline sessions find colder caches, and the machine may have been slower then than now: both show as
    # one factor between the dense pipeline's time in models and the sum of its sessions alone.
    slower = dense_ms * model_share / inside
    return Predictor(found, placed, affine, dense_ms * (1 - model_share) / slower, slower)
