"""Stages on the dense pipeline: profile, device table, evidence."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmcompress.data.base import Pairs
from mmcompress.errors import DataError, SpecError
from mmcompress.records import Block, Latency, Proof, read, write
from mmcompress.spec.loader import targets
from mmcompress.workflow.state import Run, precisions_of


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
    record = run.shared / "profile.json"
    if record.exists() and (run.shared / "baseline" / "manifest.json").exists():
        return read(Profile, record)
    with run.timed("profile"):
        found = _profile(run)
    write(record, found)
    return found


def _profile(run: Run) -> Profile:
    from mmcompress.export.proofs import require
    from mmcompress.graph.modality import layers
    from mmcompress.graph.topology import decode_steps
    from mmcompress.measure.counts import block_params, count
    from mmcompress.measure.latency import end_to_end
    from mmcompress.runtime import load as load_bundle

    say, spec = run.say, run.spec
    say("profile", "exporting the dense pipeline", 0.0)
    fp32 = dict.fromkeys(run.models, "fp32")
    proofs = run.bundle(run.models, fp32, {}, run.shared / "baseline")
    proofs += generation_proofs(run, run.models, run.shared / "baseline")
    require(proofs)
    say("profile", "measuring it end to end", 0.6)
    dense = load_bundle(run.shared / "baseline", spec.measure.threads)
    m = end_to_end({"dense": dense}, run.requests(32), spec.measure.warmup, spec.measure.rounds)["dense"]
    steps = decode_steps(spec, m.calls)
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

    record = run.shared / "predictor.json"
    if record.exists():
        return read(Predictor, record)
    with run.timed("device table"):
        found = calibrated(
            run.spec,
            run.models,
            dense.calls,
            dense.latency_ms.p50,
            dense.model_share,
            run.shared,
            {n: _shortest(run, n) for n in run.models},
            precisions_of(run),
            lambda what, share: run.say("device table", what, share),
        )
    write(record, found)
    return found


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
    if "text_decoder" not in run.pipeline.kinds.values():
        raise DataError("data.labels: 'dense' needs a node of kind text_decoder")
    if not run.data.load("val", 1).names:
        raise DataError(f"data.labels: 'dense' needs a data kind of files, not '{run.spec.data.kind}'")
    run.data = Written(run.data, run.shared / "baseline", run.shared / "written.json")


def prepared(run: Run) -> tuple[Profile, Any, Any]:
    """Profile, latency predictor and evidence: all that does not depend on a target."""
    dense = profile(run)
    label(run)
    return dense, predictor(run, dense), evidence(run)


def one_target(run: Run) -> Run:
    """The run, if it has one target. Raises `SpecError`."""
    if len(targets(run.spec)) > 1:
        raise SpecError(f"target: one target, please, got '{run.spec.target}'")
    return run


def _shortest(run: Run, node: str) -> float:
    """The largest share of its positions that a node may lose: as the spec fixes it, or as far as the space goes."""
    prune, d = run.spec.nodes[node].prune, run.space.dimensions.get(f"nodes.{node}.prune.tokens")
    fixed = max(prune.tokens, prune.blocks.get("tokens", 0.0))
    return max(fixed, (d.high or 0.0) if d else 0.0)


def evidence(run: Run) -> Any:
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
        )
