"""What the latency predictor is made of, on whatever device it was measured: whole exports timed, the table, the fit.

A `Kit` is a folder that another device measures (it needs neither torch nor the models' libraries), `Readings` are the
JSON it gives back. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import DataError
from mmcompress.measure import table
from mmcompress.measure.apart import Job, load_requests, reloaded
from mmcompress.measure.latency import MOST, SECONDS, EndToEnd, Samples, Script, lasting, loads, quiet
from mmcompress.measure.machine import fingerprint, versions
from mmcompress.measure.predict import Affine, Placed, Predictor, Window, needs
from mmcompress.measure.table import Table
from mmcompress.records import Latency, read, write
from mmcompress.runtime.bundle import identity
from mmcompress.runtime.cpu import cpu
from mmcompress.runtime.sessions import session

ROUNDED = "rounded"
"""The folder of pipelines that the dense one is measured beside: in other precisions, and smaller ones."""
Progress = Callable[[str, float], None]
SILENT: Progress = lambda what, share: None


@dataclass(frozen=True)
class Call:
    """One graph of an export: its file, the inputs it gets in deployment (.npz), and its calls per request."""

    file: str
    feed: str
    calls: float


@dataclass(frozen=True)
class Export:
    """A node exported whole. `kept`: its units; `cut`: positions gone; `graphs`: what a request runs."""

    node: str
    precision: str
    kept: dict[str, int]
    cut: int
    params_m: float
    size_mb: float
    graphs: dict[str, Call]


@dataclass(frozen=True)
class Plan:
    """What has to be known of a device: blocks with their shapes, windows, precisions by node."""

    placed: dict[str, tuple[Placed, ...]]
    windows: dict[str, Window]
    precisions: dict[str, tuple[str, ...]]
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where branches run in parallel, the nodes that each waits for."""
    little: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """Units of the smaller pipelines by name and node: with a share of all blocks, and without some of them."""

    @property
    def aside(self) -> tuple[str, ...]:
        """The pipelines measured beside the dense one, by folder."""
        other = tuple(p for p in self.every_precision if p != "fp32")
        return other + tuple(small(name, p) for name in self.little for p in self.every_precision)

    @property
    def every_precision(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p for by in self.precisions.values() for p in by))

    def blocks(self) -> dict[str, list[tuple[Any, ...]]]:
        """Name, units, kind, widths and batch of every block by node, and its positions where those do not depend on
        how much a generator writes."""
        shape = lambda p: (*p.key[:3], p.key[5], p.key[3] if p.calls == 1 and not p.window else 0)
        return {n: [(p.name, p.units, *shape(p)) for p in row] for n, row in self.placed.items()}


def small(name: str, precision: str) -> str:
    """The folder of a smaller pipeline in a precision."""
    return f"{name}-{precision}"


@dataclass(frozen=True)
class Measured:
    """A pipeline end to end: latency, its nodes, the share spent inside models, session calls per request, and the p50
    of the milliseconds inside the sessions of each node."""

    latency: Latency
    nodes: dict[str, Latency]
    model_share: float
    calls: dict[str, float]
    inside: dict[str, float]

    @classmethod
    def of(cls, m: EndToEnd) -> Measured:
        return cls(m.latency, m.nodes, m.model_share, m.calls, m.inside)


def export_ms(e: Export, folder: Path, threads: int) -> float:
    """Milliseconds one request spends in the sessions of an export."""
    total = 0.0
    for call in e.graphs.values():
        run = session(folder / call.file, threads)
        used = {i.name for i in run.get_inputs()}
        with np.load(folder / call.feed, allow_pickle=False) as given:
            feed = {k: given[k] for k in given.files if k in used}
        total += call.calls * quiet(partial(run.run, None, feed), 5, 100, 0.4)
    return total


Shares = Mapping[str, Mapping[str, float]]
"""Pipeline (a precision, or a smaller one in it) -> node: its time over that of the dense one beside it."""


def aside(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The dense bundle and those measured beside it, by name."""
    return {"fp32": folder / "baseline", **{n: folder / ROUNDED / n for n in names}}


def beside(
    bundles: Mapping[str, Path],
    requests: Sequence[dict[str, Any]],
    said: Sequence[Script],
    dense_ms: float,
    threads: int | None,
    warmup: int,
    rounds: int,
    *,
    benchmark: Callable[[Job, Path], dict[str, Samples]] | None = None,
) -> dict[str, EndToEnd]:
    """Measure bundles in turn, all writing what the dense one `said` of the first requests."""
    some = few(requests, said, dense_ms)
    how = (warmup, rounds, said, lasting(dense_ms))
    found = reloaded(bundles, threads, some, *how, sittings=loads(dense_ms), benchmark=benchmark)
    return {n: s.summary() for n, s in found.items()}


def shares(found: Mapping[str, EndToEnd]) -> dict[str, dict[str, float]]:
    """Of pipelines measured in turn, what each node takes over the same in fp32, by precision."""
    of = lambda p, n: found[p].nodes[n].p50 / found["fp32"].nodes[n].p50
    return {p: {n: of(p, n) for n, ms in found["fp32"].inside.items() if ms > 0} for p in found if p != "fp32"}


def few(requests: Sequence[dict[str, Any]], said: Sequence[Script], dense_ms: float) -> list[dict[str, Any]]:
    """As many of the requests as there is time for, eight at least; of those whose answers are known."""
    return list(requests[: min(len(said), max(8, int(lasting(dense_ms) * 1e3 / dense_ms)))])


def fitted(
    plan: Plan, found: Table, exports: Sequence[Export], ms: Sequence[float], dense: Measured, beside: Shares
) -> Predictor:
    """Base and scale of every node and precision, from the table and whole exports of `ms` milliseconds each.

    The prediction for the `dense` pipeline is exactly what was measured, as a whole and node by node; `beside` holds
    every other precision, and small nodes, to what was measured of them inside a pipeline.
    """
    draft, rows = Predictor(found, plan.placed, {}, 0.0, windows=plan.windows, reads=plan.reads), found.lookup()
    affine: dict[str, dict[str, Affine]] = {}
    sizes: dict[str, dict[str, Affine]] = {}
    whole = {n: dense.nodes[n].p50 for n in plan.placed}
    # A decode loop moves a cache about that is as large as the structure: where smaller pipelines were measured, what
    # is spent around the sessions of a node is part of its fit; but the features of a sound do not shrink.
    apart = lambda n: not plan.little or (n in plan.windows and plan.windows[n].ordered)
    around = {n: max(whole[n] - dense.inside[n], 0.0) if apart(n) else 0.0 for n in plan.placed}
    for n in plan.placed:
        sizes[n], affine[n] = {}, {}
        for p in plan.precisions[n]:
            mine = [(e, t) for e, t in zip(exports, ms, strict=True) if e.node == n and e.precision == p]
            raw = [draft.raw(n, e.kept, p, rows, {n: e.cut}) for e, _ in mine]
            a = Affine.fit(raw, [t for _, t in mine], [draft.left(n, e.cut) for e, _ in mine])
            sizes[n][p] = Affine.fit([e.params_m for e, _ in mine], [e.size_mb for e, _ in mine])
            # Inside a pipeline sessions find colder caches, and the machine may have been slower then than now: both
            # show as a factor between the time in a node's sessions there and alone. The first export is the whole one.
            share = beside[p][n] if p != "fp32" else 1.0
            spent = lambda rate, n=n: rate * dense.nodes[n].p50 - around[n]
            affine[n][p] = a.times(max(spent(share), 1e-3) / (a.base + a.scale * raw[0]))
            less = [(by[n], beside[k][n]) for name, by in plan.little.items() if (k := small(name, p)) in beside]
            if less:  # points from inside a pipeline beat those from alone
                sums = [raw[0], *(draft.raw(n, kept, p, rows) for kept, _ in less)]
                left = [len(plan.placed[n]), *(sum(kept[x.name] > 0 for x in plan.placed[n]) for kept, _ in less)]
                rates = (share, *(rate for _, rate in less))
                affine[n][p] = Affine.within(sums, left, [max(spent(rate), 1e-3) for rate in rates]) or affine[n][p]
    return replace(draft, affine=affine, overhead_ms=dense.latency.p50 - draft.along(whole), sizes=sizes, around=around)


@dataclass(frozen=True)
class Kit:
    """`kit.json`: beside it lie `baseline/`, the same in every other precision in `rounded/`, `requests.npz`, and a
    folder for every structure that was exported."""

    pipeline: str
    threads: int
    warmup: int
    rounds: int
    plan: Plan
    exports: tuple[Export, ...]


@dataclass(frozen=True)
class Readings:
    """What a device measured of a kit: all that a search for it needs, wherever that runs."""

    device: str
    cpu: dict[str, Any]
    versions: dict[str, str]
    threads: int
    pipeline: str
    dense: str
    """Hash of the models of the dense bundle."""
    plan: Plan
    exports: tuple[Export, ...]
    export_ms: tuple[float, ...]
    beside: dict[str, dict[str, float]]
    """See `Shares`."""
    baseline: Measured
    table: Table

    def predictor(self) -> Predictor:
        return fitted(self.plan, self.table, self.exports, self.export_ms, self.baseline, self.beside)


@dataclass(frozen=True)
class Check:
    """Two bundles measured on a device, the same requests in turn. `dense` and `bundle`: hashes of their models."""

    device: str
    cpu: dict[str, Any]
    versions: dict[str, str]
    threads: int
    dense: str
    bundle: str
    baseline: Measured
    compressed: Measured


def open_kit(folder: Path) -> Kit:
    """Raises `DataError` for what is no kit."""
    if not (folder / "kit.json").is_file():
        raise DataError(
            f"{folder}: not a kit: it holds no kit.json (mmcompress device kit SPEC --out FOLDER makes one)"
        )
    return read(Kit, folder / "kit.json")


def measure_kit(folder: Path, progress: Progress = SILENT) -> Readings:
    """Measure a kit on this device: the dense pipeline, the device table, every export. Raises `DataError`."""
    kit = open_kit(folder)
    progress("the dense pipeline", 0.0)
    requests, alone = load_requests(folder), {"dense": folder / "baseline"}
    whole = reloaded(alone, kit.threads, requests, kit.warmup, kit.rounds, sittings=1)["dense"].summary()
    how = (kit.threads, kit.warmup, kit.rounds)
    rates = shares(beside(aside(folder, kit.plan.aside), requests, whole.said, whole.latency.p50, *how))
    say = lambda what, share: progress(what, 0.1 + 0.6 * share)
    wanted = needs(kit.plan.placed, kit.plan.windows)
    found = table.completed(wanted, kit.threads, say, kit.plan.every_precision)
    ms = []
    for i, e in enumerate(kit.exports):
        progress(f"whole export of {e.node}, {e.precision}", 0.7 + 0.3 * i / len(kit.exports))
        ms.append(export_ms(e, folder, kit.threads))
    facts = (fingerprint(kit.threads), cpu(), versions(), kit.threads)
    of = (kit.pipeline, identity(folder / "baseline"))
    return Readings(*facts, *of, kit.plan, kit.exports, tuple(ms), rates, Measured.of(whole), found)


def check_bundle(folder: Path, bundle: Path) -> Check:
    """Measure a bundle beside the dense one of a kit, on this device, as a run here measures its own."""
    kit = open_kit(folder)
    pair = {"dense": folder / "baseline", "new": bundle}
    how = (kit.warmup, MOST * kit.rounds, (), 2 * SECONDS, kit.rounds)
    found = [Measured.of(s.summary()) for s in reloaded(pair, kit.threads, load_requests(folder), *how).values()]
    facts = (fingerprint(kit.threads), cpu(), versions(), kit.threads)
    return Check(*facts, identity(folder / "baseline"), identity(bundle), *found)


def save(record: Readings | Check, path: Path) -> Path:
    return write(path, record)
