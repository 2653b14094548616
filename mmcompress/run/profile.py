"""Stage: export the dense pipeline with proofs, and measure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmcompress.data.base import Dataset
from mmcompress.errors import DataError
from mmcompress.export.fidelity import prove_fidelity
from mmcompress.export.proofs import prove_generation, require_proofs
from mmcompress.graph.blocks import Block
from mmcompress.graph.modality import classify_layers
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import (
    count_decode_steps,
    count_texts_per_request,
    find_token_reference,
)
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.latency.bench import (
    BenchmarkOptions,
    GenerationTraces,
    PipelineLatency,
    Samples,
)
from mmcompress.measure.latency.bench_with_replay import (
    MIN_REPLAYED_REQUESTS,
    bench_with_replay,
)
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.models.base import Model
from mmcompress.models.counts import count_block_params, count_params_and_macs
from mmcompress.models.device import CPU, copy_to_device
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.results.records import Proof
from mmcompress.run.answers import try_metrics
from mmcompress.run.tell_fallbacks import tell_fallbacks
from mmcompress.runtime.bundle import BUNDLE_FORMAT, read_manifest
from mmcompress.runtime.progress import scale_progress
from mmcompress.stats import Latency
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

BENCH_REQUESTS = 64
"""Different requests that pipelines are measured with: generators write texts of many lengths."""

EXPORTED_SHARE = 0.4
"""Share of the profile that is done when all models are exported."""

MAX_GENERATION_PROOF_PAIRS = 12
"""Validation pairs at most that generation is proved on: the library's own loop is slow."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What is known of the dense pipeline. `profile.json`."""

    latency_ms: Latency
    """Milliseconds a request."""
    nodes: dict[str, Latency]
    """Milliseconds a request, by node."""
    model_share: float
    """Share of the time spent inside model sessions."""
    calls: dict[str, float]
    """Session calls a request by `node/graph`: 1, or the mean number of decode steps."""
    in_session_ms: dict[str, float]
    """p50 of the milliseconds in the sessions of each node."""
    params: dict[str, int]
    """Parameters by node."""
    macs: dict[str, int]
    """Multiply-accumulate operations a request, by node."""
    block_params: dict[str, dict[str, int]]
    """Parameters by node and block."""
    blocks: dict[str, tuple[Block, ...]]
    """The prunable blocks by node."""
    modality: tuple[dict[str, Any], ...]
    """One row for each layer: whether it is cross-modal, and why."""
    proofs: tuple[Proof, ...]
    """Proofs of the dense bundle."""
    device: str
    """Fingerprint of the device that the latencies are of."""
    traces: tuple[GenerationTraces, ...]
    """What generators write for every request it was measured with; structures replay it."""


def profile_pipeline(run: RunContext) -> Profile:
    """Export the dense pipeline with proofs and measure it, or read the profile on record.

    Args:
        run: The run, as `open_run` opens it.

    Returns:
        Latencies in milliseconds, parameters and operations by node, blocks, layers with their
        modality, and proofs. `profile.json` holds it.

    Raises:
        DataError: The profile on record is of another device, or of an older version.
        ProofFailed: The export differs from the models.
    """
    folder = run.shared
    if folder.profile.exists() and folder.has_baseline():
        profile = read_record(Profile, folder.profile)
        _check_profile(run, profile)
        return profile
    with run.time_stage("profile"):
        profile = _make_profile(run)
    write_record(folder.profile, profile)
    return profile


def _check_profile(run: RunContext, profile: Profile) -> None:
    """Raise `DataError` when a profile on record can't be used by this run."""
    if profile.device != run.device:
        raise DataError(
            f"{run.shared}: profiled on another device ({profile.device}, this is {run.device}); "
            "use a new --out"
        )
    if read_manifest(run.shared.baseline)["format"] != BUNDLE_FORMAT:
        raise DataError(
            f"{run.shared}: profiled by an older mmcompress, which exported otherwise; "
            "use a new --out"
        )


def measure_adopted_bundle(run: RunContext, proofs: Sequence[Proof]) -> Profile:
    """Measure a dense bundle that another run has exported and proved."""
    try_metrics(run, run.shared.baseline)
    return _measure_bundle(run, proofs)


def _make_profile(run: RunContext) -> Profile:
    """Export, prove and measure the dense pipeline."""
    run.on_progress("profile", "exporting the dense pipeline", 0.0)
    bundle = run.shared.baseline
    precision = dict.fromkeys(run.models, "fp32")
    tell = partial(run.on_progress, "profile")
    proofs = run.write_bundle(
        run.models,
        precision,
        kept={},
        folder=bundle,
        progress=scale_progress(tell, start=0.0, end=EXPORTED_SHARE),
    )
    tell("comparing generators with their models", EXPORTED_SHARE)
    proofs += prove_generators(run.pipeline, run.models, data=run.data, bundle=bundle)
    tell("comparing with the models' own libraries", 0.5)
    proofs += prove_fidelity(run.spec, bundle=bundle, data=run.data, on_progress=tell)
    require_proofs(proofs)
    tell_fallbacks(run, bundle, stage="profile")
    try_metrics(run, bundle)
    return _measure_bundle(run, proofs)


def _measure_bundle(run: RunContext, proofs: Sequence[Proof]) -> Profile:
    """Measure the dense bundle, and count what it consists of."""
    traces: tuple[GenerationTraces, ...] = ()
    if run.device_readings:
        measured = run.device_readings.baseline
    else:
        latency = _bench_dense(run)
        measured = PipelineMeasurement.from_latency(latency)
        traces = latency.traces
    decode_steps = count_decode_steps(run.spec, measured.calls)
    texts = count_texts_per_request(run.spec)
    params: dict[str, int] = {}
    macs: dict[str, int] = {}
    for node_name, model in run.models.items():
        params[node_name], macs[node_name] = count_params_and_macs(
            model, decode_steps[node_name], beams=texts[node_name]
        )
    block_params = {name: count_block_params(model) for name, model in run.models.items()}
    modality: list[dict[str, object]] = []
    for row in classify_layers(run.spec, run.blocks):
        modality.append({**asdict(row), "modalities": list(row.modalities)})
    return Profile(
        latency_ms=measured.latency,
        nodes=measured.nodes,
        model_share=measured.model_share,
        calls=measured.calls,
        in_session_ms=measured.in_session_ms,
        params=params,
        macs=macs,
        block_params=block_params,
        blocks=run.blocks,
        modality=tuple(modality),
        proofs=tuple(proofs),
        device=run.device,
        traces=traces,
    )


def load_bench_requests(run: RunContext) -> list[dict[str, object]]:
    """Load the requests that pipelines are measured with: enough for several different batches."""
    return run.load_requests(count_bench_batches(run) * run.spec.measure.batch)


def count_bench_batches(run: RunContext) -> int:
    """Count the different batches that pipelines are measured with; a batch may be one request."""
    return max(BENCH_REQUESTS // run.spec.measure.batch, MIN_REPLAYED_REQUESTS)


def _bench_dense(run: RunContext) -> PipelineLatency:
    """Measure the dense pipeline end to end."""
    run.on_progress("profile", "measuring it end to end", 0.6)
    samples = bench_repeated(
        {"dense": run.shared.baseline},
        load_bench_requests(run),
        options=BenchmarkOptions(
            warmup=run.spec.measure.warmup,
            max_requests=run.spec.measure.requests,
            threads=run.spec.measure.threads,
            batch=run.spec.measure.batch,
            loads=1,
        ),
        benchmark=run.bench.benchmark_bundles,
    )
    return samples["dense"].summarize()


def prove_generators(
    pipeline: TorchPipeline,
    models: Mapping[str, Model],
    *,
    data: Dataset,
    bundle: Path,
    fp32_folder: Path | None = None,
    max_pairs: int = MAX_GENERATION_PROOF_PAIRS,
) -> list[Proof]:
    """Compare the deployed generation of every generator with the library's own, on real contexts.

    Args:
        pipeline: The graph of the pipeline.
        models: The models in torch, by node.
        data: Its validation split gives the contexts.
        bundle: The bundle that was written of them.
        fp32_folder: The fp32 files of generators that are quantized in the bundle: the loop
            itself must be exact.
        max_pairs: Validation pairs at most.

    Returns:
        The proofs, failed ones included.
    """
    proofs: list[Proof] = []
    count = max(1, min(max_pairs, pipeline.batch_size // 4))
    batch = pipeline.collate(data.load("val", count, seed=2))
    outputs = pipeline.forward_in_pieces(models, batch)
    for node_name in pipeline.order:
        if not get_kind(pipeline.spec.nodes[node_name].kind).writes_text:
            continue
        tokens = find_token_reference(pipeline.spec, node_name)
        assert tokens
        folder = bundle / node_name
        if fp32_folder and (fp32_folder / node_name).exists():
            folder = fp32_folder / node_name
        proofs += prove_generation(
            node_name,
            copy_to_device(models[node_name], CPU),
            files={file.stem: file for file in folder.glob("*.onnx")},
            folder=bundle / node_name,
            contexts=outputs[tokens.node][tokens.port].to(CPU),
        )
    return proofs


def bench_beside_dense(
    run: RunContext,
    bundles: Mapping[str, Path],
    *,
    dense: Profile,
    max_requests: int,
    is_certain: Callable[[Mapping[str, Samples]], bool] | None = None,
) -> dict[str, Samples]:
    """Measure bundles in turn on the requests of a run, all writing what the dense one wrote.

    Args:
        run: The run.
        bundles: Folders of the bundles by name.
        dense: The profile of the dense pipeline.
        max_requests: Requests to each bundle at most.
        is_certain: Whether what was observed is enough; see `bench_with_replay`.

    Returns:
        What was observed of each bundle, by name.
    """
    measure = run.spec.measure
    return bench_with_replay(
        bundles,
        load_bench_requests(run),
        options=BenchmarkOptions(
            warmup=measure.warmup,
            max_requests=max_requests,
            traces=dense.traces,
            threads=measure.threads,
            batch=measure.batch,
        ),
        dense_ms=dense.latency_ms.p50,
        benchmark=run.bench.benchmark_bundles,
        is_certain=is_certain,
    )
