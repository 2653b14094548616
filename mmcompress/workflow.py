"""The order of the stages, and nothing else: each is a function of another room, each leaves a record in the run folder.

profile -> evidence -> search -> fit -> compress -> measure -> summary
                         ^        |
                         +--------+  a measured miss corrects the prediction and the search goes on
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError
from mmcompress.records import Block, Candidate, Latency, Proof, Summary, Trial, build, plain, read, write
from mmcompress.spec.loader import load, load_space, parse_target
from mmcompress.spec.schema import Space, Spec, keys_of

Say = Callable[[str, str, float | None], None]
"""(stage, what, share done or None): progress for a person."""
SILENT: Say = lambda stage, what, share: None
AIM = 0.97
"""A structure is accepted when it measures at most this share of the target, before distillation."""
ATTEMPTS = 5
ROOT = Path(__file__).resolve().parent.parent


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


@dataclass
class Run:
    """A run folder with everything loaded. Heavy parts are made by `open_run`."""

    spec: Spec
    space: Space
    folder: Path
    say: Say
    models: dict[str, Any]
    pipeline: Any
    data: Any
    cross: dict[str, dict[str, str]]
    timings: dict[str, float]

    @property
    def blocks(self) -> dict[str, tuple[Block, ...]]:
        return {n: m.blocks for n, m in self.models.items()}

    def timed(self, stage: str) -> Any:
        return _Clock(self, stage)


class _Clock:
    def __init__(self, run: Run, stage: str):
        self.run, self.stage = run, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        spent = time.perf_counter() - self.start
        self.run.timings[self.stage] = self.run.timings.get(self.stage, 0.0) + spent
        write(self.run.folder / "timings.json", self.run.timings)


def default_space() -> Path:
    return ROOT / "search_spaces" / "joint.yaml"


def open_run(
    spec_path: str | Path, out: str | Path, space_path: str | Path | None = None,
    overrides: dict[str, Any] | None = None, resume: bool = False, say: Say = SILENT,
) -> Run:  # fmt: skip
    """Load and check everything a run needs. Without `resume` the folder must be new or empty.

    Raises `SpecError`, `DataError` or `ModelError`; nothing is written before all of it is checked.
    """
    spec = load(spec_path, overrides)
    space = load_space(space_path or default_space(), spec)
    folder = Path(out)
    say("load", f"{spec.name}: {len(spec.models())} models", None)
    from mmcompress.data import open_dataset
    from mmcompress.graph.modality import cross_modal
    from mmcompress.graph.pipeline import TorchPipeline
    from mmcompress.models.sources import load_models

    data = open_dataset(spec.data)
    for split in ("train", "val", "test", *spec.data.report):
        if split not in data.splits:
            raise DataError(f"data.report: '{spec.data.kind}' has no split '{split}' (known: {', '.join(data.splits)})")
        data.load(split, 1)
    models = load_models(spec)
    cross = cross_modal(spec, {n: m.blocks for n, m in models.items()})
    _claim(folder, spec, resume)
    timings = json.loads((folder / "timings.json").read_text()) if (folder / "timings.json").exists() else {}
    return Run(spec, space, folder, say, models, TorchPipeline(spec, models), data, cross, timings)


def _claim(folder: Path, spec: Spec, resume: bool) -> None:
    record = folder / "spec.json"
    if record.exists() and resume:
        if _decisive(read(Spec, record)) != _decisive(spec):
            raise DataError(f"{folder}: --resume, but the spec (or an override) has changed since; use a new --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; add --resume to go on with the run in it, or choose another --out")
    write(record, spec)


def _decisive(spec: Spec) -> Any:
    """The part of a spec that must not change between a run and its resumption: not where or how long it searches."""
    return plain(
        replace(spec, search=replace(spec.search, workers=1, trials=0, mutations=0, ray_address=None, executor="ray"))
    )


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
    proofs += _generation_proofs(run, run.models, run.folder / "baseline")
    require(proofs)
    say("profile", "measuring it end to end", 0.6)
    requests = [{"image": i} for i in run.data.load("val", 32, seed=1).images]
    dense = load_bundle(run.folder / "baseline", spec.measure.threads)
    m = end_to_end({"dense": dense}, requests, spec.measure.warmup, 64)["dense"]
    steps = {n: m.calls.get(f"{n}/step", 1.0) for n in run.models}
    counted = {n: count(model, steps[n], run.spec.nodes[n].candidates) for n, model in run.models.items()}
    modality = tuple(asdict(layer) for layer in layers(spec, run.blocks))
    return Profile(
        m.latency, m.nodes, m.model_share, m.calls, {n: c[0] for n, c in counted.items()},
        {n: c[1] for n, c in counted.items()}, {n: block_params(model) for n, model in run.models.items()},
        run.blocks, build_modality(modality), tuple(proofs),
    )  # fmt: skip


def build_modality(rows: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    return tuple({**r, "modalities": list(r["modalities"])} for r in rows)


def _generation_proofs(run: Run, models: dict[str, Any], bundle: Path, count: int = 12) -> list[Proof]:
    """Deployed generation against the library's own, for every generator, on real contexts."""
    from mmcompress.export.proofs import generation

    found: list[Proof] = []
    batch = run.pipeline.batch(run.data.load("val", count, seed=2))
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
        found = calibrated(run.spec, run.models, dense.calls, dense.latency_ms.p50, run.folder,
                           lambda what, share: run.say("device table", what, share))  # fmt: skip
    write(record, found)
    return found


def evidence(run: Run) -> Any:
    """Importance of every unit and damage of every block, on training pairs. Cached in the run folder."""
    from mmcompress.prune.evidence import gather

    with run.timed("importance"):
        return gather(run.spec, run.pipeline, run.models, run.data, run.folder,
                      lambda what, share: run.say("importance", what, share))  # fmt: skip


def budget(spec: Spec, dense_ms: float) -> float:
    kind, value = parse_target(spec.target)
    return dense_ms / value if kind == "speedup" else value


def problem(run: Run, ev: Any, predict: Any, budget_ms: float) -> Any:
    """The search problem: how overrides become a candidate."""
    from mmcompress.prune.allocation import allocate
    from mmcompress.registry import ALLOCATION
    from mmcompress.search.study import Problem

    base = plain(run.spec)
    policy = ALLOCATION.get(run.spec.prune.allocation)

    def resolve(overrides: dict[str, Any]) -> Candidate:
        data = _override(base, overrides)
        return allocate(build(Spec, data), run.blocks, run.cross, ev.curves, ev.scores, policy)

    allowed = {}
    for n in run.models:
        d = run.space.dimensions.get(f"nodes.{n}.precision")
        allowed[n] = tuple(d.choices) if d else ("fp32",)
    return Problem(run.space, run.blocks, resolve, predict, budget_ms, allowed)


def _override(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    data = json.loads(json.dumps(base))
    for dotted, value in overrides.items():
        keys = keys_of(dotted)
        at = data
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = value
    return data


def search(run: Run, ev: Any, predict: Any, budget_ms: float, extra: int = 0) -> list[Trial]:
    """Run (or go on with) the study of this run folder."""
    from mmcompress.prune.trial import evaluate, pack
    from mmcompress.registry import EXECUTORS
    from mmcompress.search import knapsack, study

    p = problem(run, ev, predict, budget_ms)
    with run.timed("search"):
        book = study.open_study(run.folder / "study.journal", run.spec.seed)
        splits = knapsack.candidates(run.blocks, run.cross, ev.curves, predict, budget_ms * 0.995,
                                     run.spec.prune.protection, p.precisions, ev.int8_damage)  # fmt: skip
        starts = [study.implied(p, c) for _, c in splits[:3]] + _plain_starts(p)
        batch = run.pipeline.batch(run.data.load("val", run.spec.data.choosing))
        s = run.spec.search
        threads = run.spec.measure.threads if s.executor == "inline" else 1
        context = pack(run.spec, ev.scores, ev.grams, batch, f"{run.folder.resolve()}:{run.spec.seed}", threads)
        executor = EXECUTORS.get(s.executor)(context, s.workers, s.ray_address)
        workers = 1 if s.executor == "inline" else s.workers
        try:
            return study.run(
                book, p, executor, evaluate, starts, s.trials + extra, s.mutations, workers, s.retries,
                run.spec.seed, lambda what, share: run.say("search", what, share),
            )  # fmt: skip
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _plain_starts(p: Any) -> list[dict[str, Any]]:
    """A uniform split and a text-heavy one, both with int8 where it is allowed."""
    starts = []
    for heavy in (False, True):
        point: dict[str, Any] = {}
        for path, d in p.space.dimensions.items():
            if d.choices:
                point[path] = "int8" if "int8" in d.choices else d.choices[0]
            elif path.endswith(".drop"):
                point[path] = 0
            elif path.startswith("nodes."):
                high = d.high or 0.0
                point[path] = min(high, 0.5 if not heavy else 0.2 if path.split(".")[1].startswith("v") else 0.7)
            else:
                point[path] = min(max(2.0, d.low or 0.0), d.high or 2.0)
        starts.append(point)
    return starts


def pruned(run: Run, ev: Any, candidate: Candidate, refit: bool) -> dict[str, Any]:
    """Fresh pruned models of a candidate, refitted in order on calibration pairs when asked."""
    from mmcompress.prune.refit import refit_
    from mmcompress.prune.trial import prune_node

    models = {n: prune_node(m, candidate.kept[n], ev.scores[n], None, 0.0) for n, m in run.models.items()}
    if refit:
        batch = run.pipeline.batch(run.data.load("train", run.spec.data.calibration))
        refit_(run.pipeline, models, run.models, batch, run.spec.prune.ridge)
    return models


@dataclass(frozen=True)
class Fitted:
    """The structure that will be distilled, with what was predicted and measured of it."""

    candidate: Candidate
    predicted_ms: float
    measured_ms: float
    target_ms: float
    reachable: bool
    attempts: tuple[dict[str, float], ...] = ()


def fit(run: Run, ev: Any, predict: Any, dense: Profile) -> Fitted:
    """Search, then measure the best structure before anything is trained; a miss corrects the prediction.

    Latency does not depend on the weights, so no time is lost on distilling what would miss the target.
    """
    from mmcompress.search.study import best

    record = run.folder / "fitted.json"
    if record.exists():
        return read(Fitted, record)
    attempts: list[dict[str, float]] = []
    nearest: tuple[float, Candidate, float, float] | None = None
    for attempt in range(ATTEMPTS):
        target_ms = budget(run.spec, dense.latency_ms.p50)
        trials = search(run, ev, predict, target_ms * AIM, extra=0 if attempt == 0 else 6 * attempt)
        trials = [replace(t, latency_ms=predict(t.candidate)) for t in trials]
        top = best(trials, target_ms * AIM)
        chosen = top or min(trials, key=lambda t: t.latency_ms, default=None)
        if chosen is None:
            break
        with run.timed("fit"):
            run.say("fit", f"measuring the best structure (predicted {chosen.latency_ms:.2f} ms)", None)
            measured, dense_ms = _measure_structure(run, ev, chosen.candidate)
        target_ms = budget(run.spec, dense_ms)
        attempts.append({"predicted_ms": chosen.latency_ms, "measured_ms": measured, "target_ms": target_ms})
        run.say("fit", f"measured {measured:.2f} ms, target {target_ms:.2f} ms", None)
        ratio = measured / target_ms
        if nearest is None or ratio < nearest[0] / nearest[3]:
            nearest = (measured, chosen.candidate, chosen.latency_ms, target_ms)
        if ratio <= AIM + 0.015:
            break
        if top is None and attempt > 0:
            break
        dense = replace(dense, latency_ms=replace(dense.latency_ms, p50=dense_ms))
        predict = replace(predict, correction=predict.correction * measured / chosen.latency_ms)
    if nearest is None:
        raise DataError("the search has no trial to choose from: every one failed (see study.journal)")
    measured, candidate, predicted, target_ms = nearest
    found = Fitted(candidate, predicted, measured, target_ms, measured <= target_ms, tuple(attempts))
    write(record, found)
    return found


def _measure_structure(run: Run, ev: Any, candidate: Candidate) -> tuple[float, float]:
    """(candidate, dense) p50 in ms of whole exports, interleaved."""
    from mmcompress.export.bundle import write_bundle
    from mmcompress.measure.latency import end_to_end
    from mmcompress.runtime import load as load_bundle

    folder = run.folder / "scratch"
    write_bundle(run.spec, pruned(run, ev, candidate, True), candidate.precision, candidate.kept, folder, prove=False)
    threads = run.spec.measure.threads
    pair = {"new": load_bundle(folder, threads), "dense": load_bundle(run.folder / "baseline", threads)}
    requests = [{"image": i} for i in run.data.load("val", 32, seed=1).images]
    found = end_to_end(pair, requests, run.spec.measure.warmup, 80)
    shutil.rmtree(folder, ignore_errors=True)
    return found["new"].latency.p50, found["dense"].latency.p50


def compress(run: Run, ev: Any, fitted: Fitted) -> tuple[dict[str, Any], list[Proof]]:
    """Prune with proof, refit, distill, and write the bundle. Weights are kept, so a resumed run does not train again."""
    from mmcompress.distill.trainer import distill_
    from mmcompress.export.bundle import load_weights, save_weights, write_bundle
    from mmcompress.export.proofs import require, surgery
    from mmcompress.prune.allocation import choose_units

    weights, c = run.folder / "weights", fitted.candidate
    with run.timed("prune"):
        units = {n: choose_units(c.kept[n], m.blocks, ev.scores[n]) for n, m in run.models.items()}
        batch = run.pipeline.batch(run.data.load("train", 16, seed=3))
        proofs = surgery(run.pipeline, run.models, units, batch)
        proofs += surgery(run.pipeline, run.models, _random_units(run), batch)
        require(proofs)
        run.say("prune", "masked == sliced proved; refitting", None)
        models = pruned(run, ev, c, run.spec.prune.refit and not (weights / "done").exists())
    with run.timed("distill"):
        if (weights / "done").exists():
            for n, m in models.items():
                load_weights(m, weights / f"{n}.safetensors")
        else:
            distill_(run.pipeline, models, run.models, run.data, run.spec.distill, run.spec.seed,
                     lambda what, share: run.say("distill", what, share), run.folder / "distill.json")  # fmt: skip
            save_weights(models, weights)
            (weights / "done").touch()
    with run.timed("export"):
        run.say("export", "ONNX, int8, proofs", None)
        found = write_bundle(run.spec, models, c.precision, c.kept, run.folder / "bundle")
        if all(p == "fp32" for p in c.precision.values()):
            found += _generation_proofs(run, models, run.folder / "bundle")
        else:
            found += _fp32_generation(run, models)
        proofs += require(found)
    return models, proofs


def _fp32_generation(run: Run, models: dict[str, Any]) -> list[Proof]:
    """Generation of the compressed structure at fp32: int8 rounding aside, the loop must be exact."""
    from mmcompress.export.onnx import export_node

    folder = run.folder / "scratch"
    for node, kind in run.pipeline.kinds.items():
        if kind == "text_decoder":
            export_node(models[node], folder / node)
            (folder / node / "tokenizer.json").write_text(models[node].tokenizer_json)
    found = _generation_proofs(run, models, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _random_units(run: Run) -> dict[str, dict[str, Any]]:
    """A random mixture of cuts, dropped sub-layers among them: surgery must be right for any structure."""
    import torch

    g = torch.Generator().manual_seed(run.spec.seed + 17)
    out: dict[str, dict[str, Any]] = {}
    for n, m in run.models.items():
        out[n] = {}
        for b in m.blocks:
            share = float(torch.rand(1, generator=g))
            keep = 0 if share < 0.15 else max(b.step, int(share * b.units) // b.step * b.step)
            out[n][b.name] = torch.sort(torch.randperm(b.units, generator=g)[:keep]).values
    return out


def run(
    spec_path: str | Path, out: str | Path, space: str | Path | None = None, overrides: dict[str, Any] | None = None,
    resume: bool = False, say: Say = SILENT,
) -> Summary:  # fmt: skip
    """Compress a pipeline to its target: the whole way. Returns the summary; the report is in `out`.

    Raises `SpecError`, `DataError`, `ModelError` for bad input and `ProofFailed` when an artifact is wrong. A target
    that is not met is no exception: `summary.target.met` says so.
    """
    began = time.perf_counter()
    r = open_run(spec_path, out, space, overrides, resume, say)
    dense = profile(r)
    predict = predictor(r, dense)
    ev = evidence(r)
    fitted = fit(r, ev, predict, dense)
    models, proofs = compress(r, ev, fitted)
    summary = summarize(r, dense, fitted, models, [*dense.proofs, *proofs], began)
    from mmcompress.report import write_report

    write_report(summary, r.folder)
    return summary


def summarize(
    r: Run, dense: Profile, fitted: Fitted, models: dict[str, Any], proofs: list[Proof], began: float
) -> Summary:
    """Measure both bundles interleaved, judge both on the full test split, and put everything in one record."""
    from mmcompress.measure.counts import count
    from mmcompress.measure.latency import end_to_end
    from mmcompress.measure.machine import commit, cpu, versions
    from mmcompress.metrics.pairs import retained
    from mmcompress.prune.allocation import ratios
    from mmcompress.records import Target
    from mmcompress.report.assemble import search_result, side, warnings
    from mmcompress.runtime import load as load_bundle
    from mmcompress.search.study import failures, finished, open_study

    spec, c = r.spec, fitted.candidate
    bundles = {"baseline": r.folder / "baseline", "compressed": r.folder / "bundle"}
    pipelines = {k: load_bundle(f, spec.measure.threads) for k, f in bundles.items()}
    with r.timed("measure"):
        r.say("measure", "baseline and compressed, interleaved", None)
        requests = [{"image": i} for i in r.data.load("val", 64, seed=1).images]
        measured = end_to_end(pipelines, requests, spec.measure.warmup, spec.measure.rounds)
    with r.timed("judge"):
        quality, samples = _judge(r, pipelines, "test")
        extra = {split: _judge(r, pipelines, split)[0] for split in spec.data.report}
    sides = {}
    for key, bundle in bundles.items():
        kept = c.kept if key == "compressed" else {n: {} for n in r.models}
        now = models if key == "compressed" else r.models
        counts = {
            n: count(m, measured[key].calls.get(f"{n}/step", 1.0), spec.nodes[n].candidates) for n, m in now.items()
        }
        share = {n: tuple(ratios({n: kept[n]}, r.blocks, r.cross, x) for x in (False, True)) for n in r.models}
        sides[key] = side(spec, bundle, measured[key], quality[key], counts, share)
    target_ms = budget(spec, measured["baseline"].latency.p50)
    p50 = measured["compressed"].latency.p50
    study = open_study(r.folder / "study.journal", spec.seed)
    trials = finished(study)
    result = search_result(trials, failures(study), target_ms, r.timings.get("search", 0.0))
    r.timings["total"] = sum(v for k, v in r.timings.items() if k != "total")
    summary = Summary(
        spec.name,
        Target(target_ms, measured["baseline"].latency.p50 / target_ms, p50 <= target_ms, spec.target),
        sides["baseline"], sides["compressed"], measured["baseline"].latency.p50 / p50,
        retained(quality["baseline"], quality["compressed"]), fitted.predicted_ms,
        ratios(c.kept, r.blocks, r.cross, False) or 0.0, ratios(c.kept, r.blocks, r.cross, True),
        c.kept, r.blocks, r.cross, tuple(proofs), result, tuple(trials), (), dict(r.timings), plain(spec), versions(),
        cpu(), spec.seed, commit(), "mmcompress " + " ".join(sys.argv[1:]), tuple(samples), extra,
    )  # fmt: skip
    summary = replace(summary, warnings=warnings(summary, fitted.attempts))
    write(r.folder / "summary.json", summary)
    return summary


def _judge(r: Run, pipelines: dict[str, Any], split: str) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Quality of each bundle over a whole split, and a few captions of both for the eye."""
    from mmcompress.metrics.pairs import ask, judge

    pairs, found, said = r.data.load(split), {}, {}
    for key, pipeline in pipelines.items():
        answers = ask(pipeline, pairs, lambda share, k=key: r.say("judge", f"{k} on {split}", share))  # type: ignore[misc]
        found[key], said[key] = judge(answers, r.spec.metrics), answers.captions
    samples = [
        {"reference": pairs.captions[i], **{k: v[i] for k, v in said.items()}} for i in range(min(8, len(pairs)))
    ]
    return found, samples
