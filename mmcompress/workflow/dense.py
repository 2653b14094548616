"""Stages on the dense pipeline: profile, device table, evidence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmcompress.records import Block, Latency, Proof, read, write
from mmcompress.workflow.state import Run


@dataclass(frozen=True)
class Profile:
    """What is known of the dense pipeline on this machine."""

    latency_ms: Latency
    nodes: dict[str, Latency]
    model_share: float
    calls: dict[str, float]
    params: dict[str, int]
    macs: dict[str, int]
    block_params: dict[str, dict[str, int]]
    blocks: dict[str, tuple[Block, ...]]
    modality: tuple[dict[str, Any], ...]
    proofs: tuple[Proof, ...]


def profile(run: Run) -> Profile:
    """Export the dense pipeline with its proofs, measure it, and measure the device table. Cached in the run folder."""
    record = run.folder / "profile.json"
    if record.exists() and (run.folder / "baseline" / "manifest.json").exists():
        return read(Profile, record)
    with run.timed("profile"):
        found = _profile(run)
    write(record, found)
    return found


def _profile(run: Run) -> Profile:
    from mmcompress.export.bundle import write_bundle
    from mmcompress.export.proofs import require
    from mmcompress.graph.modality import layers
    from mmcompress.measure.counts import block_params, count
    from mmcompress.measure.latency import end_to_end
    from mmcompress.runtime import load as load_bundle

    say, spec = run.say, run.spec
    say("profile", "exporting the dense pipeline", 0.0)
    fp32 = dict.fromkeys(run.models, "fp32")
    proofs = write_bundle(spec, run.models, fp32, {}, run.folder / "baseline")
    proofs += generation_proofs(run, run.models, run.folder / "baseline")
    require(proofs)
    say("profile", "measuring it end to end", 0.6)
    requests = [{next(iter(run.spec.inputs)): i} for i in run.data.load("val", 32, seed=1).images]
    dense = load_bundle(run.folder / "baseline", spec.measure.threads)
    m = end_to_end({"dense": dense}, requests, spec.measure.warmup, spec.measure.rounds)["dense"]
    steps = {n: m.calls.get(f"{n}/step", 1.0) for n in run.models}
    counted = {n: count(model, steps[n], run.spec.nodes[n].candidates) for n, model in run.models.items()}
    modality = tuple({**asdict(x), "modalities": list(x.modalities)} for x in layers(spec, run.blocks))
    return Profile(
        m.latency,
        m.nodes,
        m.model_share,
        m.calls,
        {n: c[0] for n, c in counted.items()},
        {n: c[1] for n, c in counted.items()},
        {n: block_params(model) for n, model in run.models.items()},
        run.blocks,
        modality,
        tuple(proofs),
    )


def generation_proofs(run: Run, models: dict[str, Any], bundle: Path) -> list[Proof]:
    """Deployed generation against the library's own, for every generator, on real contexts."""
    from mmcompress.export.proofs import generation

    found: list[Proof] = []
    batch = run.pipeline.batch(run.data.load("val", max(1, min(12, run.spec.data.batch // 4)), seed=2))
    out = run.pipeline.run(models, batch)
    for node, kind in run.pipeline.kinds.items():
        if kind == "text_decoder":
            source = run.spec.nodes[node].inputs["context"].split(".")[0]
            files = {f.stem: f for f in (bundle / node).glob("*.onnx")}
            found += generation(node, models[node], files, bundle / node, out[source]["tokens"])
    return found


def predictor(run: Run, dense: Profile) -> Any:
    """The latency predictor: device table, calibrated node by node on whole exports. Cached in the run folder."""
    from mmcompress.measure.calibrate import calibrated
    from mmcompress.measure.predict import Predictor

    record = run.folder / "predictor.json"
    if record.exists():
        return read(Predictor, record)
    with run.timed("device table"):
        found = calibrated(
            run.spec,
            run.models,
            dense.calls,
            dense.latency_ms.p50,
            dense.model_share,
            run.folder,
            lambda what, share: run.say("device table", what, share),
        )
    write(record, found)
    return found


def evidence(run: Run) -> Any:
    """Importance of every unit and damage of every block, on training pairs. Cached in the run folder."""
    from mmcompress.prune.evidence import gather

    with run.timed("importance"):
        return gather(
            run.spec,
            run.pipeline,
            run.models,
            run.data,
            run.folder,
            lambda what, share: run.say("importance", what, share),
        )
