"""Stages on the dense pipeline: profile, device table, evidence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError
from mmcompress.export.proofs import prove_generation, require_proofs
from mmcompress.graph.blocks import Block
from mmcompress.graph.modality import classify_layers
from mmcompress.graph.ports import kind_of
from mmcompress.graph.references import decode_steps_by_node, texts_per_request
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.latency.bench import GenerationTraces
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.models.counts import count_block_params, count_params_and_macs
from mmcompress.results.records import Proof
from mmcompress.runtime.bundle import BUNDLE_FORMAT, read_manifest
from mmcompress.stats import Latency
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

BENCH_REQUESTS = 64
"""Requests that pipelines are measured with."""


@dataclass(frozen=True, kw_only=True)
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
    record = run.shared.profile
    if record.exists() and run.shared.has_baseline():
        found = read_record(Profile, record)
        if found.device != run.device:
            raise DataError(
                f"{run.shared}: profiled on another device ({found.device}, this is {run.device}); use a new --out"
            )
        if read_manifest(run.shared.baseline)["format"] != BUNDLE_FORMAT:
            raise DataError(
                f"{run.shared}: profiled by an older mmcompress, which exported otherwise; use a new --out"
            )
        return found
    with run.time_stage("profile"):
        found = _profile(run)
    write_record(record, found)
    return found


def _profile(run: RunContext) -> Profile:

    say, spec = run.on_progress, run.spec
    say("profile", "exporting the dense pipeline", 0.0)
    fp32 = dict.fromkeys(run.models, "fp32")
    proofs = run.write_bundle(run.models, fp32, kept={}, folder=run.shared.baseline)
    proofs += prove_generators(run, run.models, bundle=run.shared.baseline)
    require_proofs(proofs)
    said: tuple[GenerationTraces, ...] = ()
    if run.device_readings:
        m = run.device_readings.baseline
    else:
        say("profile", "measuring it end to end", 0.6)
        how = (
            spec.measure.threads,
            run.load_requests(BENCH_REQUESTS),
            spec.measure.warmup,
            spec.measure.requests,
        )
        bundles = {"dense": run.shared.baseline}
        found = bench_repeated(bundles, *how, sittings=1, benchmark=run.bench.benchmark_bundles)[
            "dense"
        ].summarize()
        m, said = PipelineMeasurement.from_latency(found), found.traces
    steps, texts = decode_steps_by_node(spec, m.calls), texts_per_request(spec)
    counted = {
        n: count_params_and_macs(model, steps[n], beams=texts[n]) for n, model in run.models.items()
    }
    modality = tuple(
        {**asdict(x), "modalities": list(x.modalities)} for x in classify_layers(spec, run.blocks)
    )
    return Profile(
        latency_ms=m.latency,
        nodes=m.nodes,
        model_share=m.model_share,
        calls=m.calls,
        in_session_ms=m.in_session_ms,
        params={n: c[0] for n, c in counted.items()},
        macs={n: c[1] for n, c in counted.items()},
        block_params={n: count_block_params(model) for n, model in run.models.items()},
        blocks=run.blocks,
        modality=modality,
        proofs=tuple(proofs),
        device=run.device,
        traces=said,
    )


def prove_generators(
    run: RunContext, models: dict[str, Any], *, bundle: Path, aside: Path | None = None
) -> list[Proof]:
    """Deployed generation against the library's own, for every generator, on real contexts.

    `aside`: fp32 files of what is rounded in the bundle. Rounding aside, the loop must be exact.
    """

    found: list[Proof] = []
    batch = run.pipeline.collate(
        run.data.load("val", max(1, min(12, run.spec.data.batch // 4)), seed=2)
    )
    out = run.pipeline.forward_in_pieces(models, batch)
    for node in run.pipeline.order:
        if kind_of(run.spec.nodes[node].kind).writes_text:
            source = run.spec.nodes[node].inputs["context"].split(".")[0]
            fp32 = aside / node if aside and (aside / node).exists() else bundle / node
            files = {f.stem: f for f in fp32.glob("*.onnx")}
            found += prove_generation(
                node,
                models[node],
                files=files,
                folder=bundle / node,
                contexts=out[source]["tokens"],
            )
    return found
