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
from mmcompress.measure.latency import GenerationTraces
from mmcompress.measure.predict import Predictor
from mmcompress.measure.readings import QUANTIZED_FOLDER, MeasurementPlan, Readings
from mmcompress.records import Block, Latency, Proof, read_record, write_record
from mmcompress.registry import PRECISIONS
from mmcompress.runtime.bundle import BUNDLE_FORMAT, read_manifest
from mmcompress.runtime.cpu import describe_cpu
from mmcompress.workflow.state import RunContext, list_precisions

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Sensitivity

BENCH_REQUESTS = 64
"""Requests that pipelines are measured with."""
REFERENCE_RUNS_FILE = "windows.json"


@dataclass(frozen=True)
class Profile:
    """What is known of the dense pipeline on this machine."""

    latency_ms: Latency
    nodes: dict[str, Latency]
    model_share: float
    calls: dict[str, float]
    in_session_ms: dict[str, float]
    """p50 of the milliseconds in the sessions of each node."""
    params: dict[str, int]
    macs: dict[str, int]
    block_params: dict[str, dict[str, int]]
    blocks: dict[str, tuple[Block, ...]]
    modality: tuple[dict[str, Any], ...]
    proofs: tuple[Proof, ...]
    device: str
    """Fingerprint of the device that the latencies are of."""
    traces: tuple[GenerationTraces, ...]
    """What it writes of the requests it was measured with."""


def profile_pipeline(run: RunContext) -> Profile:
    """Export the dense pipeline with its proofs, measure it, and measure the device table. Cached in the run folder."""
    record = run.shared / "profile.json"
    if record.exists() and (run.shared / "baseline" / "manifest.json").exists():
        found = read_record(Profile, record)
        if found.device != run.device:
            raise DataError(
                f"{run.shared}: profiled on another device ({found.device}, this is {run.device}); use a new --out"
            )
        if read_manifest(run.shared / "baseline")["format"] != BUNDLE_FORMAT:
            raise DataError(f"{run.shared}: profiled by an older mmcompress, which exported otherwise; use a new --out")
        return found
    with run.time_stage("profile"):
        found = _profile(run)
    write_record(record, found)
    return found


def _profile(run: RunContext) -> Profile:
    from mmcompress.export.proofs import require_proofs
    from mmcompress.graph.modality import classify_layers
    from mmcompress.graph.topology import decode_steps_by_node, texts_per_request
    from mmcompress.measure.apart import bench_repeated
    from mmcompress.measure.counts import count_block_params, count_params_and_macs
    from mmcompress.measure.readings import PipelineMeasurement

    say, spec = run.on_progress, run.spec
    say("profile", "exporting the dense pipeline", 0.0)
    fp32 = dict.fromkeys(run.models, "fp32")
    proofs = run.write_bundle(run.models, fp32, {}, run.shared / "baseline")
    proofs += prove_generators(run, run.models, run.shared / "baseline")
    require_proofs(proofs)
    said: tuple[GenerationTraces, ...] = ()
    if run.device_readings:
        m = run.device_readings.baseline
    else:
        say("profile", "measuring it end to end", 0.6)
        how = (spec.measure.threads, run.requests(BENCH_REQUESTS), spec.measure.warmup, spec.measure.requests)
        bundles = {"dense": run.shared / "baseline"}
        found = bench_repeated(bundles, *how, sittings=1, benchmark=run.bench.benchmark_bundles)["dense"].summarize()
        m, said = PipelineMeasurement.from_latency(found), found.traces
    steps, texts = decode_steps_by_node(spec, m.calls), texts_per_request(spec)
    counted = {n: count_params_and_macs(model, steps[n], texts[n]) for n, model in run.models.items()}
    modality = tuple({**asdict(x), "modalities": list(x.modalities)} for x in classify_layers(spec, run.blocks))
    return Profile(
        m.latency,
        m.nodes,
        m.model_share,
        m.calls,
        m.in_session_ms,
        {n: c[0] for n, c in counted.items()},
        {n: c[1] for n, c in counted.items()},
        {n: count_block_params(model) for n, model in run.models.items()},
        run.blocks,
        modality,
        tuple(proofs),
        run.device,
        said,
    )


def prove_generators(run: RunContext, models: dict[str, Any], bundle: Path, aside: Path | None = None) -> list[Proof]:
    """Deployed generation against the library's own, for every generator, on real contexts.

    `aside`: fp32 files of what is rounded in the bundle. Rounding aside, the loop must be exact.
    """
    from mmcompress.export.proofs import prove_generation

    found: list[Proof] = []
    batch = run.pipeline.collate(run.data.load("val", max(1, min(12, run.spec.data.batch // 4)), seed=2))
    out = run.pipeline.forward_in_pieces(models, batch)
    for node, kind in run.pipeline.kinds.items():
        if kind == "text_decoder":
            source = run.spec.nodes[node].inputs["context"].split(".")[0]
            fp32 = aside / node if aside and (aside / node).exists() else bundle / node
            files = {f.stem: f for f in fp32.glob("*.onnx")}
            found += prove_generation(node, models[node], files, bundle / node, out[source]["tokens"])
    return found


def build_predictor(run: RunContext, dense: Profile) -> Predictor:
    """The latency predictor: device table, calibrated node by node on whole exports. Cached in the run folder.

    Of another device it is made from that one's readings.
    """
    from mmcompress.measure.calibrate import calibrate_predictor
    from mmcompress.measure.readings import PipelineMeasurement

    record = run.shared / "predictor.json"
    if record.exists():
        return read_record(Predictor, record)
    plan = plan_run_measurements(run, dense)
    with run.time_stage("device table"):
        if run.device_readings:
            found = _read_away(run.device_readings, plan)
        else:
            say = lambda what, share: run.on_progress("device table", what, share)
            whole = PipelineMeasurement(
                dense.latency_ms, dense.nodes, dense.model_share, dense.calls, dense.in_session_ms
            )
            beside = _rounded_shares(run, plan, dense)
            found = calibrate_predictor(
                run.spec, run.models, plan, dense.calls, whole, beside, run.shared, say, bench=run.bench
            )
    write_record(record, found)
    return found


def _rounded_shares(run: RunContext, plan: MeasurementPlan, dense: Profile) -> Any:
    """What the whole pipeline takes in every other precision that is searched, beside the dense one."""
    from mmcompress.measure import anchors
    from mmcompress.measure.readings import bench_with_replay, node_ratios, reference_bundles

    m = run.spec.measure
    run.on_progress("device table", "the whole pipeline in other precisions", 0.0)
    _write_aside(run, plan, run.shared)
    if not plan.reference_names:
        return {}
    how = (dense.traces, dense.latency_ms.p50, m.threads, m.warmup, m.requests)
    bundles = reference_bundles(run.shared, plan.reference_names)
    found = bench_with_replay(bundles, run.requests(BENCH_REQUESTS), *how, benchmark=run.bench.benchmark_bundles)
    anchors.append_reference_run(run.shared / REFERENCE_RUNS_FILE, {p: found[p] for p in plan.every_precision})
    return node_ratios(found)


def _write_aside(run: RunContext, plan: MeasurementPlan, folder: Path) -> None:
    """The dense pipeline with every node that may be of a precision in it, and smaller ones in each."""
    from mmcompress.export.bundle import quantize_bundle
    from mmcompress.measure.readings import small_pipeline_name
    from mmcompress.models.sources import set_context_lengths
    from mmcompress.prune.surgery import copy_resized

    of = lambda p: {n: p if p in known else "fp32" for n, known in plan.precisions.items()}
    others = [p for p in plan.every_precision if p != "fp32"]
    for p in others:
        quantize_bundle(run.shared / "baseline", run.models, of(p), folder / QUANTIZED_FOLDER / p)
    for name, kept in plan.small_structures.items():
        models = {n: copy_resized(m, kept[n]) for n, m in run.models.items()}
        set_context_lengths(run.spec, models)
        source = folder / QUANTIZED_FOLDER / small_pipeline_name(name, "fp32")
        run.write_bundle(models, dict.fromkeys(models, "fp32"), kept, source, prove=False)
        for p in others:
            quantize_bundle(source, models, of(p), folder / QUANTIZED_FOLDER / small_pipeline_name(name, p))


def plan_run_measurements(run: RunContext, dense: Profile) -> MeasurementPlan:
    """What has to be known of a device to search on it."""
    from mmcompress.measure.calibrate import plan_measurements
    from mmcompress.measure.latency import has_time_budget

    shortest = {n: _shortest(run, n) for n in run.models}
    room = has_time_budget(dense.latency_ms.p50)
    return plan_measurements(run.spec, run.models, dense.calls, shortest, list_precisions(run), room)


def _read_away(readings: Readings, plan: MeasurementPlan) -> Predictor:
    """The predictor of another device. Raises `DataError` when its readings lack what this run searches."""
    if readings.plan.blocks() != plan.blocks() or readings.plan.reads != plan.reads:
        raise DataError(
            "measure.readings: these readings are of a pipeline with other models or blocks, or wired otherwise"
        )
    for n, wanted in plan.precisions.items():
        for p in wanted:
            flags = set(getattr(PRECISIONS.get(p), "flags", ()))
            for whose, have in (
                ("that device", readings.cpu["flags"]),
                ("this machine, which judges,", describe_cpu()["flags"]),
            ):
                if flags and not flags & set(have):
                    raise DataError(
                        f"measure.readings: '{n}' may be {p}, for which {whose} lacks {' or '.join(sorted(flags))}"
                    )
        if lacking := [p for p in wanted if p not in readings.plan.precisions[n]]:
            raise DataError(f"measure.readings: '{n}' may be {lacking[0]}, which was not measured there")
    measured = {n: max(w.cuts) for n, w in readings.plan.windows.items()}
    if short := [n for n, w in plan.windows.items() if max(w.cuts) > measured.get(n, 0)]:
        raise DataError(f"measure.readings: the space cuts more positions of '{short[0]}' than were measured there")
    return readings.fit_predictor()


def write_kit(run: RunContext, folder: Path) -> Path:
    """A folder that another device measures: dense bundle, requests, whole exports, and what the table must hold."""
    from mmcompress.measure.apart import save_requests
    from mmcompress.measure.calibrate import write_exports
    from mmcompress.measure.readings import Kit

    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; choose another --out")
    dense, m = profile_pipeline(run), run.spec.measure
    plan = plan_run_measurements(run, dense)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run.shared / "baseline", folder / "baseline")
    save_requests(folder, run.requests(BENCH_REQUESTS))
    _write_aside(run, plan, folder)
    found = []
    for e in write_exports(run.spec, run.models, plan, dense.calls, folder):
        run.on_progress("kit", f"{e.node}, {e.precision}, {e.params_m:.2f} M parameters", None)
        found.append(e)
    write_record(folder / "kit.json", Kit(run.spec.name, m.threads, m.warmup, m.requests, plan, tuple(found)))
    return folder


@dataclass(frozen=True)
class TeacherLabelled:
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
            write_record(self.record, known)
        return replace(pairs, written=tuple(known[name] for name in pairs.names))


@lru_cache(maxsize=1)
def _loaded(bundle: Path) -> Any:
    from mmcompress.runtime import load_bundle as load_bundle

    return load_bundle(bundle)


def label_by_teacher(run: RunContext) -> None:
    """Where the spec says so, let generators learn from and be chosen by what the dense pipeline writes."""
    if run.spec.data.labels == "reference":
        return
    run.data = TeacherLabelled(run.data, run.shared / "baseline", run.shared / "written.json")


def prepare_run(run: RunContext) -> tuple[Profile, Predictor, Sensitivity]:
    """Profile, latency predictor and evidence: all that does not depend on a target."""
    dense = profile_pipeline(run)
    label_by_teacher(run)
    predict, ev = build_predictor(run, dense), measure_run_sensitivity(run)
    return dense, replace(predict, fp32_blocks=ev.fp32_blocks), ev


def _shortest(run: RunContext, node: str) -> float:
    """The largest share of its positions that a node may lose: as the spec fixes it, or as far as the space goes."""
    prune, d = run.spec.nodes[node].prune, run.space.dimensions.get(f"nodes.{node}.prune.tokens")
    fixed = max(prune.tokens, prune.blocks.get("tokens", 0.0))
    return max(fixed, (d.high or 0.0) if d else 0.0)


def measure_run_sensitivity(run: RunContext) -> Sensitivity:
    """Importance of every unit and damage of every block, on training pairs. Cached in the run folder."""
    from mmcompress.prune.evidence import gather_sensitivity

    with run.time_stage("importance"):
        return gather_sensitivity(
            run.spec,
            run.pipeline,
            run.models,
            run.data,
            run.shared,
            lambda what, share: run.on_progress("importance", what, share),
            list_precisions(run),
            {n: _shortest(run, n) for n in run.models},
        )
