"""Stages on the dense pipeline: profile, device table, evidence."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcompress.data.base import Pairs
from mmcompress.errors import DataError
from mmcompress.measure.latency import Script
from mmcompress.measure.predict import Predictor
from mmcompress.measure.readings import ROUNDED, Plan, Readings
from mmcompress.records import Block, Latency, Proof, read, write
from mmcompress.registry import PRECISIONS
from mmcompress.runtime.bundle import FORMAT, read_manifest
from mmcompress.runtime.cpu import cpu
from mmcompress.workflow.state import Run, precisions_of

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

REQUESTS = 64
"""Requests that pipelines are measured with."""
WINDOWS = "windows.json"


@dataclass(frozen=True)
class Profile:
    """What is known of the dense pipeline on this machine."""

    latency_ms: Latency
    nodes: dict[str, Latency]
    model_share: float
    calls: dict[str, float]
    inside: dict[str, float]
    """p50 of the milliseconds in the sessions of each node."""
    params: dict[str, int]
    macs: dict[str, int]
    block_params: dict[str, dict[str, int]]
    blocks: dict[str, tuple[Block, ...]]
    modality: tuple[dict[str, Any], ...]
    proofs: tuple[Proof, ...]
    device: str
    """Fingerprint of the device that the latencies are of."""
    said: tuple[Script, ...]
    """What it writes of the requests it was measured with."""


def profile(run: Run) -> Profile:
    """Export the dense pipeline with its proofs, measure it, and measure the device table. Cached in the run folder."""
    record = run.shared / "profile.json"
    if record.exists() and (run.shared / "baseline" / "manifest.json").exists():
        found = read(Profile, record)
        if found.device != run.device:
            raise DataError(
                f"{run.shared}: profiled on another device ({found.device}, this is {run.device}); use a new --out"
            )
        if read_manifest(run.shared / "baseline")["format"] != FORMAT:
            raise DataError(f"{run.shared}: profiled by an older mmcompress, which exported otherwise; use a new --out")
        return found
    with run.timed("profile"):
        found = _profile(run)
    write(record, found)
    return found


def _profile(run: Run) -> Profile:
    from mmcompress.export.proofs import require
    from mmcompress.graph.modality import layers
    from mmcompress.graph.topology import decode_steps, texts_read
    from mmcompress.measure.apart import reloaded
    from mmcompress.measure.counts import block_params, count
    from mmcompress.measure.readings import Measured

    say, spec = run.say, run.spec
    say("profile", "exporting the dense pipeline", 0.0)
    fp32 = dict.fromkeys(run.models, "fp32")
    proofs = run.bundle(run.models, fp32, {}, run.shared / "baseline")
    proofs += generation_proofs(run, run.models, run.shared / "baseline")
    require(proofs)
    said: tuple[Script, ...] = ()
    if run.away:
        m = run.away.baseline
    else:
        say("profile", "measuring it end to end", 0.6)
        how = (spec.measure.threads, run.requests(REQUESTS), spec.measure.warmup, spec.measure.rounds)
        bundles = {"dense": run.shared / "baseline"}
        found = reloaded(bundles, *how, sittings=1, benchmark=run.bench.benchmark_bundles)["dense"].summary()
        m, said = Measured.of(found), found.said
    steps, texts = decode_steps(spec, m.calls), texts_read(spec)
    counted = {n: count(model, steps[n], texts[n]) for n, model in run.models.items()}
    modality = tuple({**asdict(x), "modalities": list(x.modalities)} for x in layers(spec, run.blocks))
    return Profile(
        m.latency,
        m.nodes,
        m.model_share,
        m.calls,
        m.inside,
        {n: c[0] for n, c in counted.items()},
        {n: c[1] for n, c in counted.items()},
        {n: block_params(model) for n, model in run.models.items()},
        run.blocks,
        modality,
        tuple(proofs),
        run.device,
        said,
    )


def generation_proofs(run: Run, models: dict[str, Any], bundle: Path, aside: Path | None = None) -> list[Proof]:
    """Deployed generation against the library's own, for every generator, on real contexts.

    `aside`: fp32 files of what is rounded in the bundle. Rounding aside, the loop must be exact.
    """
    from mmcompress.export.proofs import generation

    found: list[Proof] = []
    batch = run.pipeline.batch(run.data.load("val", max(1, min(12, run.spec.data.batch // 4)), seed=2))
    out = run.pipeline.run(models, batch)
    for node, kind in run.pipeline.kinds.items():
        if kind == "text_decoder":
            source = run.spec.nodes[node].inputs["context"].split(".")[0]
            fp32 = aside / node if aside and (aside / node).exists() else bundle / node
            files = {f.stem: f for f in fp32.glob("*.onnx")}
            found += generation(node, models[node], files, bundle / node, out[source]["tokens"])
    return found


def predictor(run: Run, dense: Profile) -> Predictor:
    """The latency predictor: device table, calibrated node by node on whole exports. Cached in the run folder.

    Of another device it is made from that one's readings.
    """
    from mmcompress.measure.calibrate import calibrated
    from mmcompress.measure.readings import Measured

    record = run.shared / "predictor.json"
    if record.exists():
        return read(Predictor, record)
    plan = plan_of(run, dense)
    with run.timed("device table"):
        if run.away:
            found = _read_away(run.away, plan)
        else:
            say = lambda what, share: run.say("device table", what, share)
            whole = Measured(dense.latency_ms, dense.nodes, dense.model_share, dense.calls, dense.inside)
            beside = _rounded_shares(run, plan, dense)
            found = calibrated(run.spec, run.models, plan, dense.calls, whole, beside, run.shared, say, bench=run.bench)
    write(record, found)
    return found


def _rounded_shares(run: Run, plan: Plan, dense: Profile) -> Any:
    """What the whole pipeline takes in every other precision that is searched, beside the dense one."""
    from mmcompress.measure import anchors
    from mmcompress.measure.readings import aside, beside, shares

    m = run.spec.measure
    run.say("device table", "the whole pipeline in other precisions", 0.0)
    _write_aside(run, plan, run.shared)
    if not plan.aside:
        return {}
    how = (dense.said, dense.latency_ms.p50, m.threads, m.warmup, m.rounds)
    bundles = aside(run.shared, plan.aside)
    found = beside(bundles, run.requests(REQUESTS), *how, benchmark=run.bench.benchmark_bundles)
    anchors.add(run.shared / WINDOWS, {p: found[p] for p in plan.every_precision})
    return shares(found)


def _write_aside(run: Run, plan: Plan, folder: Path) -> None:
    """The dense pipeline with every node that may be of a precision in it, and smaller ones in each."""
    from mmcompress.export.bundle import round_bundle
    from mmcompress.measure.readings import small
    from mmcompress.models.sources import connect
    from mmcompress.prune.surgery import resized

    of = lambda p: {n: p if p in known else "fp32" for n, known in plan.precisions.items()}
    others = [p for p in plan.every_precision if p != "fp32"]
    for p in others:
        round_bundle(run.shared / "baseline", run.models, of(p), folder / ROUNDED / p)
    for name, kept in plan.little.items():
        models = {n: resized(m, kept[n]) for n, m in run.models.items()}
        connect(run.spec, models)
        source = folder / ROUNDED / small(name, "fp32")
        run.bundle(models, dict.fromkeys(models, "fp32"), kept, source, prove=False)
        for p in others:
            round_bundle(source, models, of(p), folder / ROUNDED / small(name, p))


def plan_of(run: Run, dense: Profile) -> Plan:
    """What has to be known of a device to search on it."""
    from mmcompress.measure.calibrate import planned
    from mmcompress.measure.latency import spare

    shortest = {n: _shortest(run, n) for n in run.models}
    room = spare(dense.latency_ms.p50)
    return planned(run.spec, run.models, dense.calls, shortest, precisions_of(run), room)


def _read_away(readings: Readings, plan: Plan) -> Predictor:
    """The predictor of another device. Raises `DataError` when its readings lack what this run searches."""
    if readings.plan.blocks() != plan.blocks() or readings.plan.reads != plan.reads:
        raise DataError(
            "measure.device: these readings are of a pipeline with other models or blocks, or wired otherwise"
        )
    for n, wanted in plan.precisions.items():
        for p in wanted:
            flags = set(getattr(PRECISIONS.get(p), "flags", ()))
            for whose, have in (
                ("that device", readings.cpu["flags"]),
                ("this machine, which judges,", cpu()["flags"]),
            ):
                if flags and not flags & set(have):
                    raise DataError(
                        f"measure.device: '{n}' may be {p}, for which {whose} lacks {' or '.join(sorted(flags))}"
                    )
        if lacking := [p for p in wanted if p not in readings.plan.precisions[n]]:
            raise DataError(f"measure.device: '{n}' may be {lacking[0]}, which was not measured there")
    measured = {n: max(w.cuts) for n, w in readings.plan.windows.items()}
    if short := [n for n, w in plan.windows.items() if max(w.cuts) > measured.get(n, 0)]:
        raise DataError(f"measure.device: the space cuts more positions of '{short[0]}' than were measured there")
    return readings.predictor()


def write_kit(run: Run, folder: Path) -> Path:
    """A folder that another device measures: dense bundle, requests, whole exports, and what the table must hold."""
    from mmcompress.measure.apart import save_requests
    from mmcompress.measure.calibrate import exports
    from mmcompress.measure.readings import Kit

    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; choose another --out")
    dense, m = profile(run), run.spec.measure
    plan = plan_of(run, dense)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run.shared / "baseline", folder / "baseline")
    save_requests(folder, run.requests(REQUESTS))
    _write_aside(run, plan, folder)
    found = []
    for e in exports(run.spec, run.models, plan, dense.calls, folder):
        run.say("kit", f"{e.node}, {e.precision}, {e.params_m:.2f} M parameters", None)
        found.append(e)
    write(folder / "kit.json", Kit(run.spec.name, m.threads, m.warmup, m.rounds, plan, tuple(found)))
    return folder


@dataclass(frozen=True)
class Written:
    """A dataset with what the dense pipeline writes for its inputs, found out when asked for and kept in a file."""

    data: Any
    bundle: Path
    record: Path

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.data.splits)

    @property
    def gives(self) -> str:
        return str(self.data.gives)

    def load(self, split: str, count: int | None = None, seed: int = 0) -> Pairs:
        pairs = self.data.load(split, count, seed)
        if split not in ("train", "val"):
            return pairs
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        missing = [i for i, name in enumerate(pairs.names) if name not in known]
        if missing:
            pipeline = _loaded(self.bundle)
            kinds = {n: node["kind"] for n, node in pipeline.manifest["graph"]["nodes"].items()}
            generator = next(n for n, k in kinds.items() if k == "text_decoder")
            port = next(iter(pipeline.inputs))
            for i in missing:
                known[pairs.names[i]] = pipeline.run(**{port: pairs.inputs[i]})[generator]["text"]
            write(self.record, known)
        return replace(pairs, written=tuple(known[name] for name in pairs.names))


@lru_cache(maxsize=1)
def _loaded(bundle: Path) -> Any:
    from mmcompress.runtime import load as load_bundle

    return load_bundle(bundle)


def label(run: Run) -> None:
    """Where the spec says so, let generators learn from and be chosen by what the dense pipeline writes."""
    if run.spec.data.labels == "reference":
        return
    run.data = Written(run.data, run.shared / "baseline", run.shared / "written.json")


def prepared(run: Run) -> tuple[Profile, Predictor, Evidence]:
    """Profile, latency predictor and evidence: all that does not depend on a target."""
    dense = profile(run)
    label(run)
    predict, ev = predictor(run, dense), evidence(run)
    return dense, replace(predict, spared=ev.spared), ev


def _shortest(run: Run, node: str) -> float:
    """The largest share of its positions that a node may lose: as the spec fixes it, or as far as the space goes."""
    prune, d = run.spec.nodes[node].prune, run.space.dimensions.get(f"nodes.{node}.prune.tokens")
    fixed = max(prune.tokens, prune.blocks.get("tokens", 0.0))
    return max(fixed, (d.high or 0.0) if d else 0.0)


def evidence(run: Run) -> Evidence:
    """Importance of every unit and damage of every block, on training pairs. Cached in the run folder."""
    from mmcompress.prune.evidence import gather

    with run.timed("importance"):
        return gather(
            run.spec,
            run.pipeline,
            run.models,
            run.data,
            run.shared,
            lambda what, share: run.say("importance", what, share),
            precisions_of(run),
            {n: _shortest(run, n) for n in run.models},
        )
