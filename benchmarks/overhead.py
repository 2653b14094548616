"""Measure where the wall time of a whole run goes: inside models, or around them.

    python benchmarks/overhead.py pipelines/clip_captioner.yaml --target 2x --seed 2 \\
        --out runs/overhead

The stack of the main thread is sampled twenty times a second. A sample counts as model work when it
lies inside torch, ONNX Runtime, a model library, or the closed-form repair. While the driver waits
for workers, the share of the waiting that they spent evaluating counts as model work (trials, and
finalists on more pairs).

A bundle that answers requests, to be measured or judged, is model work too. Its decoding loop,
pre-processing and tokenizers are part of what is compressed. The report shows it apart where it is
not inside a session of this process. What is measured runs in processes of its own. Everything else
(data, the search itself, files, start-up) is what the tool costs.

Writes reports/overhead-NAME.md and prints it. The second figure compares trials with exporting and
measuring each structure. Trials must run on Ray, as they do by default.
"""

from __future__ import annotations

import time

START = time.perf_counter()
"""Importing the package is a part of what the tool costs, so the clock starts before it."""

# ruff: noqa: E402
import argparse
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FrameType

from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.latency.bench import COMPARISON_SECONDS, Samples
from mmcompress.measure.latency.benchmark_in_subprocess import (
    OUTCOME_FILE,
    BenchmarkJob,
    BenchmarkOutcome,
)
from mmcompress.results.records import Summary
from mmcompress.run.run_targets import run
from mmcompress.runtime.machine import describe_cpu
from mmcompress.search.executors import TaskResult
from mmcompress.search.ray_executor import RayExecutor
from mmcompress.storage import read_record

IMPORT_SECONDS = time.perf_counter() - START

ROOT = Path(__file__).resolve().parents[1]
MODEL_LIBRARIES = (
    "/torch/",
    "/onnxruntime/",
    "/transformers/",
    "/open_clip/",
    "/timm/",
    "/onnx/",
    "/safetensors/",
)
"""Parts of paths: code that runs models."""
REPAIR_FILE = "mmcompress/prune/refit.py"
"""The closed-form repair of pruned weights."""
BUNDLE_FILE = "mmcompress/runtime/graph.py"
"""Its `run` answers a request."""
SUBPROCESS_FILE = "mmcompress/measure/latency/benchmark_in_subprocess.py"
"""Its function of the same name waits for a process that measures."""
FUTURES = "concurrent/futures"
"""Part of a path: waiting for threads or workers."""
SAMPLE_SECONDS = 0.05
"""Seconds between two samples of the stack."""
SHORT_SECONDS = 5.0
"""Seconds that one structure could be measured in, to tell it from another."""


def classify_stack(frame: FrameType | None) -> str:
    """Return what a stack is busy with.

    Args:
        frame: the innermost frame.

    Returns:
        `model`, `bundle`, `measuring` (waiting for a process that measures), `waiting` (for
        workers), `data`, `search`, `start-up` or `other`.
    """
    files: list[str] = []
    functions: list[str] = []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        functions.append(frame.f_code.co_name)
        frame = frame.f_back
    if not files:
        return "other"
    path = "\n".join(files)
    is_importing = "importlib" in path
    waits_for_future = FUTURES in path
    if "benchmark_in_subprocess" in functions and SUBPROCESS_FILE in path:
        return "measuring"
    is_in_library = any(library in files[0] for library in MODEL_LIBRARIES)
    is_below_library = any(f"site-packages{library}" in path for library in MODEL_LIBRARIES)
    if is_in_library or is_below_library or REPAIR_FILE in path:
        return "start-up" if is_importing and "<module>" in functions else "model"
    for file, function in zip(files, functions, strict=True):
        if function == "run" and BUNDLE_FILE in file:
            return "bundle"
    if waits_for_future and "_ask_bundles" in functions:
        # Bundles answer in threads of their own.
        return "bundle"
    is_searching = "mmcompress/search/search_session" in path or "mmcompress/search/study" in path
    if waits_for_future and (is_searching or "_wait_for_loss" in functions):
        return "waiting"
    if any(part in path for part in ("mmcompress/data/", "runtime/images", "runtime/audio")):
        return "data"
    if "mmcompress/search/" in path or "optuna" in path:
        return "search"
    return "start-up" if is_importing else "other"


class Recorder:
    """Collect what a run does while it runs."""

    def __init__(self) -> None:
        self.stage = "load"
        self.samples: Counter[tuple[str, str]] = Counter()
        """Samples by stage and kind of work."""
        self.measured_structures = 0
        """Structures that the stage `fit` exported and measured."""
        self.measuring_seconds = 0.0
        """Wall seconds of processes that measure, their start included."""
        self.answering_seconds = 0.0
        """Seconds of these processes without their start."""
        self.worker_seconds = 0.0
        """Seconds that workers spent evaluating, over all workers."""
        self.is_done = threading.Event()

    def report_progress(self, stage: str, message: str, share: float | None) -> None:
        """Note the stage; the stage `fit` announces every structure that it measures."""
        self.stage = stage
        if stage == "fit" and message.startswith("measuring"):
            self.measured_structures += 1

    def add_task(self, future: Future[TaskResult]) -> None:
        """Add the seconds of a task that a worker has finished."""
        if future.exception() is None:
            self.worker_seconds += future.result()["seconds"]

    def sample_stack(self) -> None:
        """Sample the stack of the main thread until the run is done."""
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        while not self.is_done.wait(SAMPLE_SECONDS):
            frame = sys._current_frames().get(main_thread)
            self.samples[self.stage, classify_stack(frame)] += 1


class TimedBenchmarker(Benchmarker):
    """Measure on this machine, and note how long processes that measure take."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        start = time.perf_counter()
        samples = super().benchmark_bundles(job, folder)
        self.recorder.measuring_seconds += time.perf_counter() - start
        outcome = read_record(BenchmarkOutcome, folder / OUTCOME_FILE)
        self.recorder.answering_seconds += outcome.seconds
        return samples


def count_worker_seconds(recorder: Recorder) -> None:
    """Let every task that goes to Ray add its seconds to a recorder."""
    submit = RayExecutor.submit

    def submit_and_count(
        executor: RayExecutor,
        evaluate: Callable[..., TaskResult],
        /,
        *args: object,
        **kwargs: object,
    ) -> Future[TaskResult]:
        future = submit(executor, evaluate, *args, **kwargs)
        future.add_done_callback(recorder.add_task)
        return future

    RayExecutor.submit = submit_and_count  # type: ignore[method-assign]


def split_wall_time(
    recorder: Recorder, seconds_by_sample: dict[tuple[str, str], float], *, workers: int
) -> dict[str, float]:
    """Split the wall seconds of a run by kind of work, most first.

    Args:
        recorder: what the run did.
        seconds_by_sample: seconds of the main thread by stage and kind of work.
        workers: workers of the search.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    seconds["start-up"] = IMPORT_SECONDS
    for (_, kind), kind_seconds in seconds_by_sample.items():
        seconds[kind] += kind_seconds
    evaluating = min(seconds["waiting"], recorder.worker_seconds / workers)
    seconds["model"] += evaluating
    seconds["waiting"] -= evaluating
    measuring = seconds.pop("measuring", 0.0)
    answering_share = recorder.answering_seconds / max(recorder.measuring_seconds, 1e-9)
    seconds["bundle"] += measuring * answering_share
    seconds["start-up"] += measuring * (1 - answering_share)
    return dict(sorted(seconds.items(), key=_get_seconds, reverse=True))


def _get_seconds(item: tuple[str, float]) -> float:
    """Return the seconds of a kind of work."""
    return item[1]


def compare_trials_with_measuring(summary: Summary, measured_structures: int) -> str:
    """Say how many trials fit into the time of exporting and measuring one structure."""
    search_seconds = summary.timings["search"]
    trials_per_minute = summary.search.trials / search_seconds * 60
    fit_seconds = summary.timings["fit"] / measured_structures
    short_seconds = max(fit_seconds - COMPARISON_SECONDS, 0.0) + SHORT_SECONDS
    return (
        f"Trials: {trials_per_minute:.0f} a minute ({summary.search.trials} in "
        f"{search_seconds:.0f} s). Exporting and measuring a structure took {fit_seconds:.1f} s, "
        f"{60 / fit_seconds:.1f} a minute: **{trials_per_minute * fit_seconds / 60:.0f}x** as many "
        f"trials. With {SHORT_SECONDS:.0f} s of measuring instead of {COMPARISON_SECONDS:.0f} it "
        f"would be {trials_per_minute * short_seconds / 60:.0f}x."
    )


def format_stages(seconds_by_sample: dict[tuple[str, str], float]) -> list[str]:
    """Format the seconds of the main thread as a table of stages and kinds of work."""
    kinds = sorted({kind for _, kind in seconds_by_sample})
    stages = dict.fromkeys(stage for stage, _ in seconds_by_sample)
    lines = [f"| stage | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for stage in stages:
        cells = [f"{seconds_by_sample.get((stage, kind), 0.0):.1f}" for kind in kinds]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return lines


def format_report(summary: Summary, recorder: Recorder, *, target: str, wall_seconds: float) -> str:
    """Format the report of a run."""
    seconds_per_sample = (wall_seconds - IMPORT_SECONDS) / sum(recorder.samples.values())
    seconds_by_sample = {
        sample: count * seconds_per_sample for sample, count in recorder.samples.items()
    }
    workers = summary.settings["search"]["workers"]
    seconds = split_wall_time(recorder, seconds_by_sample, workers=workers)
    outside_models = 1 - (seconds["model"] + seconds["bundle"]) / wall_seconds
    cpu = describe_cpu()
    lines = [
        f"# Wall time of one whole run: {summary.pipeline} at {target}",
        "",
        f"{wall_seconds:.0f} s on {cpu['name']}, {cpu['cores']} cores; "
        f"{summary.speedup:.2f}x measured.",
        "",
        "| | seconds | share |",
        "|---|---:|---:|",
    ]
    for kind, kind_seconds in seconds.items():
        lines.append(f"| {kind} | {kind_seconds:.1f} | {kind_seconds / wall_seconds:.1%} |")
    lines += [
        "",
        f"Outside model work: **{outside_models:.1%}**. `bundle`: bundles that answer requests, "
        "outside their sessions. `waiting`: for trials, beyond what workers spent on them. `data`: "
        "drawing and preparing pairs. `start-up`: importing packages, and starting processes that "
        "measure.",
        "",
        compare_trials_with_measuring(summary, recorder.measured_structures),
        "",
        *format_stages(seconds_by_sample),
        "",
        "Made by `python benchmarks/overhead.py`.",
    ]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec")
    parser.add_argument("--target", default="2x", help="target of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    recorder = Recorder()
    count_worker_seconds(recorder)
    sampler = threading.Thread(target=recorder.sample_stack, daemon=True)
    sampler.start()
    summary = run(
        arguments.spec,
        arguments.out,
        overrides={"target": arguments.target, "seed": arguments.seed},
        on_progress=recorder.report_progress,
        bench=TimedBenchmarker(recorder),
    )
    recorder.is_done.set()
    sampler.join()
    wall_seconds = time.perf_counter() - START
    text = format_report(summary, recorder, target=arguments.target, wall_seconds=wall_seconds)
    (ROOT / "reports" / f"overhead-{summary.pipeline}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
