"""Measure what it costs to hand out trials: on Ray, and in a long study.

    python benchmarks/scheduling.py > reports/scheduling.md    about five minutes

Trials sleep for a second, so that all other time is that of scheduling: of the sampler, the journal,
and Ray. 1, 4, 16 and 64 trials run at a time in processes that import neither torch nor ONNX
Runtime. 256 run at a time in one process, for 256 processes may not fit into the memory. Then a
study grows to 10,000 trials. Run it with nothing else on the machine.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from mmcompress.graph.blocks import Block, count_steps, count_units_after
from mmcompress.graph.structure import Candidate
from mmcompress.runtime.machine import describe_cpu
from mmcompress.search.executors import TaskResult, call_task
from mmcompress.search.problem import SearchProblem
from mmcompress.search.ray_executor import RayExecutor
from mmcompress.search.search_session import SearchEffort, SessionInputs, run_study
from mmcompress.search.study import open_study
from mmcompress.spec.space import Dimension, Space

SLEEP_SECONDS = 1.0
"""Seconds that a trial takes on its worker."""
WORKERS = (1, 4, 16, 64)
"""Trials at a time in processes of their own."""
MANY_WORKERS = 256
"""Trials at a time in one process."""
MAX_START_SECONDS = 240.0
"""Seconds that all processes may take to start."""
START_LOOK_SECONDS = 0.25
"""Seconds after which a process looks again whether all others are up."""
MAX_MEASURED_TRIALS = 2560
"""Trials that are measured at most, for one number of workers."""
MAX_SECONDS_OF_TRIALS = 40
"""About how many seconds each number of workers is measured."""
LONG_STUDY = 10_000
"""Trials of the long study."""
FIRST_MARK = 1_000
"""Trials after which the size of its journal is noted first."""
NODES = ("vision", "text", "captioner", "speech")
"""Models of the pipeline that is searched."""
UNITS = 4096
"""Units of a block."""
STEP = 4
"""Units that are cut at once."""
BYTES_PER_MB = 1e6
"""To print megabytes."""


def make_problem() -> SearchProblem:
    """Make a search over four models of three blocks each, which is predicted by its units."""
    blocks = {node: tuple(make_block(str(i)) for i in range(3)) for node in NODES}
    dimensions = {f"nodes.{node}.prune.ffn": Dimension(low=0.0, high=0.9) for node in NODES}
    for node in NODES:
        dimensions[f"nodes.{node}.precision"] = Dimension(choices=("fp32", "int8"))

    def resolve(overrides: Mapping[str, Any]) -> Candidate:
        kept: dict[str, dict[str, int]] = {}
        for node, node_blocks in blocks.items():
            share = float(overrides.get(f"nodes.{node}.prune.ffn", 0.0))
            kept[node] = {}
            for block in node_blocks:
                steps = round(share * count_steps(block))
                kept[node][block.name] = int(count_units_after(block, steps))
        precision = {node: str(overrides.get(f"nodes.{node}.precision", "fp32")) for node in NODES}
        return Candidate(kept_units=kept, precision=precision)

    def predict(candidate: Candidate) -> float:
        total = 0.0
        for node, units in candidate.kept_units.items():
            factor = 0.5 if candidate.precision[node] == "int8" else 1.0
            total += factor * sum(units.values()) / UNITS
        return total

    return SearchProblem(
        space=Space(name="scheduling", dimensions=dimensions),
        blocks=blocks,
        resolve=resolve,
        predict=predict,
        budget_ms=5.0,
        precisions=dict.fromkeys(NODES, ("fp32", "int8")),
    )


def make_block(name: str) -> Block:
    """Make a block of channels."""
    return Block(
        name=name,
        kind="ffn",
        reader=name,
        writers=(),
        units=UNITS,
        width=1,
        granularity=STEP,
        module=name,
        reads=("stream",),
        drop=((name, "plain"),),
    )


def compute_loss(candidate: Mapping[str, Any]) -> float:
    """Return a loss that no two models share alike."""
    loss = 0.0
    for weight, node in enumerate(sorted(candidate["kept_units"]), 1):
        lost = sum(UNITS - units for units in candidate["kept_units"][node].values())
        loss += weight * lost / UNITS
    return loss


def sleep_a_trial(context: object, candidate: Mapping[str, Any]) -> TaskResult:
    """Take a second, and give a loss."""
    time.sleep(SLEEP_SECONDS)
    return {"loss": compute_loss(candidate), "quality": {}, "seconds": SLEEP_SECONDS}


class SleepingActor:
    """One process in which many trials sleep at a time."""

    async def run(self, candidate: Mapping[str, Any]) -> TaskResult:
        """Take a second, and give a loss."""
        await asyncio.sleep(SLEEP_SECONDS)
        loss = compute_loss(candidate)
        return {"loss": loss, "quality": {}, "seconds": SLEEP_SECONDS, "worker": "actor"}


class ActorExecutor(Executor):
    """Runs trials in one actor of Ray."""

    def __init__(self, workers: int):
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        make_actor = ray.remote(num_cpus=1, max_concurrency=workers)(SleepingActor)
        self.actor = make_actor.remote()

    def submit(self, evaluate: Any, /, *args: Any, **kwargs: Any) -> Future[TaskResult]:  # type: ignore[override]
        reference = self.actor.run.remote(*args)
        future: Future[TaskResult] = reference.future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End Ray."""
        ray.shutdown()


class InstantExecutor(Executor):
    """Gives the loss of a candidate at once."""

    def submit(self, evaluate: Any, /, *args: Any, **kwargs: Any) -> Future[TaskResult]:  # type: ignore[override]
        future: Future[TaskResult] = Future()
        future.set_result(call_task(evaluate, None, args=args, kwargs=kwargs))
        return future


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a number of workers came to."""

    workers: int
    """Trials at a time."""
    trials: int
    """Finished trials."""
    seconds: float
    """Wall seconds from the first trial to the last result, with warm workers."""
    driver_seconds: float
    """Seconds of processor that the driver took for a trial."""

    @property
    def utilization(self) -> float:
        """Seconds of trials / seconds that all workers were there for."""
        return self.trials * SLEEP_SECONDS / (self.workers * self.seconds)


def wait_for_all(context: object, candidate: Mapping[str, Any]) -> TaskResult:
    """Wait until as many processes are up as there are to be: they start one after the other."""
    folder = Path(candidate["folder"])
    (folder / str(os.getpid())).touch()
    give_up_at = time.monotonic() + MAX_START_SECONDS
    while len(list(folder.iterdir())) < candidate["workers"] and time.monotonic() < give_up_at:
        time.sleep(START_LOOK_SECONDS)
    return {"loss": 0.0, "quality": {}, "seconds": 0.0}


def start_all_processes(executor: Executor, workers: int) -> None:
    """Let every worker process start, so that none does while trials are measured."""
    with tempfile.TemporaryDirectory() as folder:
        task = {"folder": folder, "workers": workers}
        started = [executor.submit(wait_for_all, task) for _ in range(workers)]
        for future in started:
            future.result()


def measure(executor: Executor, workers: int) -> Measured:
    """Search with sleeping trials, and measure what the driver adds."""
    if workers == MANY_WORKERS:
        for future in [executor.submit(sleep_a_trial, {"kept_units": {}}) for _ in range(workers)]:
            future.result()
    else:
        start_all_processes(executor, workers)
    # Whole rounds: a last round that is not full says nothing of scheduling.
    trials = workers * max(4, min(MAX_SECONDS_OF_TRIALS, MAX_MEASURED_TRIALS // workers))
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(Path(folder) / "journal")
        start = time.perf_counter()
        driver_start = time.process_time()
        found = run_study(
            study,
            make_problem(),
            inputs=SessionInputs(
                executor=executor,
                evaluate=sleep_a_trial,
                starts=[],
                seeds=[],
                effort=SearchEffort(trials=trials, level_switches=0, workers=workers),
                seed=0,
            ),
        )
        return Measured(
            workers=workers,
            trials=len(found),
            seconds=time.perf_counter() - start,
            driver_seconds=(time.process_time() - driver_start) / len(found),
        )


@contextmanager
def start_workers(workers: int) -> Iterator[Executor]:
    """Start Ray with so many processes."""
    make_executor = ActorExecutor if workers == MANY_WORKERS else partial(RayExecutor, None)
    executor: Executor = make_executor(workers)
    try:
        yield executor
    finally:
        executor.shutdown()


def measure_long_study(folder: Path) -> list[str]:
    """Let a study grow, and tell what it takes to ask, to open and to keep it."""
    journal = folder / "journal"
    sizes: dict[int, float] = {}
    seconds: dict[int, float] = {}
    dice = random.Random(0)

    def evaluate(context: object, candidate: Mapping[str, Any]) -> TaskResult:
        loss = compute_loss(candidate) + 0.01 * dice.random()
        return {"loss": loss, "quality": {}, "seconds": 0.0}

    for trials in (FIRST_MARK, LONG_STUDY - 100, LONG_STUDY):
        study = open_study(journal)
        before = len(study.get_trials(deepcopy=False))
        start = time.perf_counter()
        run_study(
            study,
            make_problem(),
            inputs=SessionInputs(
                executor=InstantExecutor(),
                evaluate=evaluate,
                starts=[],
                seeds=[],
                # Random proposals fill the study; the last hundred are TPE's.
                sampler="tpe" if trials == LONG_STUDY else "random",
                effort=SearchEffort(trials=trials, level_switches=0, workers=1),
                seed=0,
            ),
        )
        count = len(study.get_trials(deepcopy=False))
        seconds[trials] = (time.perf_counter() - start) / max(count - before, 1)
        sizes[trials] = journal.stat().st_size / BYTES_PER_MB
        del study
        gc.collect()
    start = time.perf_counter()
    open_study(journal)
    opening = time.perf_counter() - start
    growth = sizes[LONG_STUDY] - sizes[FIRST_MARK]
    return [
        "## A study of 10,000 trials",
        "",
        f"- TPE, behind 9,900 trials: {seconds[LONG_STUDY] * 1e3:.0f} ms of the driver for a "
        "proposal, its result and its line in the journal (aim: 500 ms).",
        f"- Opening it: {opening:.1f} s (aim: 10 s).",
        f"- Its journal: {sizes[LONG_STUDY]:.1f} MB, {growth:.1f} MB more than behind 1,000 trials "
        "(aim: 100 MB).",
    ]


def main() -> int:
    """Measure, and print the report."""
    warnings.simplefilter("ignore")
    rows: list[Measured] = []
    for workers in itertools.chain(WORKERS, (MANY_WORKERS,)):
        with start_workers(workers) as executor:
            rows.append(measure(executor, workers))
        print(f"{workers}: {rows[-1].utilization:.0%}", file=sys.stderr)
    cpu = describe_cpu()
    lines = [
        "# Handing out trials",
        "",
        f"{cpu['name']}, {cpu['cores']} cores, nothing beside it. Every trial sleeps for "
        f"{SLEEP_SECONDS:.0f} s, so all other time is that of the sampler (TPE), the journal and Ray.",
        "",
        "| trials at a time | trials | trials a second | of the ideal | driver, ms of processor a trial |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        note = " (one process)" if row.workers == MANY_WORKERS else ""
        lines.append(
            f"| {row.workers}{note} | {row.trials} | {row.trials / row.seconds:.1f} "
            f"| {row.utilization:.0%} | {row.driver_seconds * 1e3:.1f} |"
        )
    lines += ["", "The aim is 90 % of the ideal at 64 trials at a time.", ""]
    with tempfile.TemporaryDirectory() as folder:
        lines += measure_long_study(Path(folder))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
