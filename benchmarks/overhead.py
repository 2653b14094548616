"""Where the wall time of a whole run goes: inside models, or around them.

    python benchmarks/overhead.py pipelines/clip_captioner.yaml --target 2x --seed 2 --out runs/overhead

The stack of the main thread is sampled twenty times a second. A sample counts as model work when it lies inside
torch, ONNX Runtime, a model library, or the closed-form repair; while the driver waits for what workers judge, the
share of it that they spent judging does (trials, and finalists on more pairs). A bundle that answers requests, to be
measured or judged, is model work too, and shown by itself where it is not inside a session here (what is measured is so
in processes of its own): its decoding loop, pre-processing and tokenizers are part of what is compressed. Everything
else (data, the search itself, files, start-up) is what the tool costs. Writes reports/overhead-NAME.md and prints it;
the second figure compares trials with exporting and measuring each structure. Trials are to run on Ray, as they do by
default.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "/torch/",
    "/onnxruntime/",
    "/transformers/",
    "/open_clip/",
    "/timm/",
    "/onnx/",
    "/safetensors/",
)
REPAIR, BUNDLE = "mmcompress/prune/refit.py", "mmcompress/runtime/pipeline.py"
WORK = ("model", "bundle")
EVERY = 0.05
SHORT = 5.0
"""Seconds that one structure could be measured in, to tell it from another."""


def kind(frame: object) -> str:
    """What a stack is busy with: model, bundle, waiting (for trials), data, search, or other."""
    files, called = [], []
    while frame is not None:
        code = frame.f_code  # type: ignore[attr-defined]
        files.append(code.co_filename)
        called.append(code.co_name)
        frame = frame.f_back  # type: ignore[attr-defined]
    inside = lambda part: any(part in f for f in files)
    names = set(called)
    if "apart" in names and inside("mmcompress/measure/apart.py"):
        return "apart"
    answering = any(name == "run" and BUNDLE in f for f, name in zip(files, called, strict=True))
    if any(m in files[0] or inside(f"site-packages{m}") for m in MODEL) or inside(REPAIR):
        return "start-up" if "<module>" in names and inside("importlib") else "model"
    if answering or (
        "_ask_bundles" in names and inside("concurrent/futures")
    ):  # bundles answer in threads
        return "bundle"
    if "settle" in names or (
        inside("concurrent/futures") and (inside("search/study") or "losses" in names)
    ):
        return "waiting"
    if inside("mmcompress/data/") or inside("runtime/images") or inside("runtime/audio"):
        return "data"
    if inside("mmcompress/search/") or inside("optuna"):
        return "search"
    return "start-up" if inside("importlib") else "other"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("spec")
    p.add_argument("--target", default="2x")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    began = time.perf_counter()
    from mmcompress.measure.latency import benchmark_in_subprocess as apart
    from mmcompress.measure.latency.bench import COMPARISON_SECONDS
    from mmcompress.run import targets as workflow
    from mmcompress.runtime.machine import describe_cpu
    from mmcompress.search.executors import RayExecutor
    from mmcompress.storage import read_record

    imported, main_thread = time.perf_counter() - began, threading.main_thread().ident
    found: Counter[tuple[str, str]] = Counter()
    stage, measured, done = ["load"], Counter(), threading.Event()

    def say(name: str, what: str, share: float | None) -> None:
        stage[0] = name
        measured[name == "fit" and what.startswith("measuring")] += 1

    asked, alone = Counter(), apart.benchmark_in_subprocess  # of processes that only measure

    def timed(job: apart.BenchmarkJob, folder: Path) -> object:
        started = time.perf_counter()
        seen = alone(job, folder)
        asked["wall"] += time.perf_counter() - started
        asked["work"] += read_record(apart.BenchmarkOutcome, folder / apart.OUTCOME_FILE).seconds
        return seen

    apart.benchmark_in_subprocess = timed
    submit, worked = RayExecutor.submit, Counter()

    def counted(self: RayExecutor, *given: object) -> object:
        future = submit(self, *given)  # type: ignore[arg-type]
        future.add_done_callback(
            lambda f: worked.update(seconds=0.0 if f.exception() else f.result()["seconds"])
        )
        return future

    RayExecutor.submit = counted  # type: ignore[method-assign,assignment]

    def sample() -> None:
        while not done.wait(EVERY):
            found[stage[0], kind(sys._current_frames().get(main_thread))] += 1

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    s = workflow.run(a.spec, a.out, overrides={"target": a.target, "seed": a.seed}, say=say)
    done.set()
    sampler.join()
    wall = time.perf_counter() - began
    seconds = Counter({k: n * (wall - imported) / sum(found.values()) for k, n in found.items()})
    workers = s.settings["search"]["workers"]
    waited = sum(v for (_, k), v in seconds.items() if k == "waiting")
    judged = min(waited, worked["seconds"] / workers)
    by = Counter({"start-up": imported})
    for (_, k), v in seconds.items():
        by[k] += v
    by["model"] += judged
    by["waiting"] -= judged
    by["bundle"] += by["apart"] * asked["work"] / max(asked["wall"], 1e-9)
    by["start-up"] += by.pop("apart", 0.0) * (1 - asked["work"] / max(asked["wall"], 1e-9))
    trials, each = s.search.trials / s.timings["search"] * 60, s.timings["fit"] / measured[True]
    short = max(each - COMPARISON_SECONDS, 0.0) + SHORT
    lines = [
        f"# Wall time of one whole run: {s.pipeline} at {a.target}",
        "",
        f"{wall:.0f} s on {describe_cpu()['name']}, {describe_cpu()['cores']} cores; {s.speedup:.2f}x measured.",
        "",
        "| | seconds | share |",
        "|---|---:|---:|",
        *(f"| {k} | {v:.1f} | {v / wall:.1%} |" for k, v in by.most_common()),
        "",
        f"Outside model work: **{1 - sum(by[k] for k in WORK) / wall:.1%}**. `bundle`: bundles that answer requests, "
        "outside their sessions; `waiting`: for trials, beyond what workers spent on them; `data`: drawing and "
        "preparing pairs; `start-up`: importing packages, and starting processes that measure.",
        "",
        f"Trials: {trials:.0f} a minute ({s.search.trials} in {s.timings['search']:.0f} s). Exporting and measuring a "
        f"structure took {each:.1f} s, {60 / each:.1f} a minute: **{trials * each / 60:.0f}x** as many. "
        f"With {SHORT:.0f} s of measuring instead of {COMPARISON_SECONDS:.0f} it would be {trials * short / 60:.0f}x.",
        "",
        "| stage | " + " | ".join(sorted({k for _, k in seconds})) + " |",
        "|---" * (1 + len({k for _, k in seconds})) + "|",
    ]
    kinds = sorted({k for _, k in seconds})
    for name in dict.fromkeys(st for st, _ in seconds):
        lines.append(f"| {name} | " + " | ".join(f"{seconds[name, k]:.1f}" for k in kinds) + " |")
    text = "\n".join([*lines, "", "Made by `python benchmarks/overhead.py`."]) + "\n"
    (ROOT / "reports" / f"overhead-{s.pipeline}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
