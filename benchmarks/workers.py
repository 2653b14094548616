"""Measure how many more trials two workers do than one, on real trials.

    python benchmarks/workers.py pipelines/clip_captioner.yaml --out runs/workers > reports/workers.md

Each trial cuts the models, refits them and runs the validation pairs, on one thread. Searches with
one and with two workers on Ray take turns, each with a study of its own. The workers are started
before the clock. The profile and the sensitivity in the folder are used again by the next call. Run
it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmcompress.graph.structure import Candidate, cut_each_block
from mmcompress.run.begin_run import begin_run
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.stages import prepare_run
from mmcompress.runtime.machine import describe_cpu, read_git_commit
from mmcompress.search.build_problem import AIMED_SHARE
from mmcompress.search.evaluator import TrialEvaluator, start_evaluator
from mmcompress.search.run_search import run_search
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

WORKERS = (1, 2)
"""Numbers of workers that take turns."""
TURNS = 3
"""Searches with each number."""
TRIALS = 24
"""Proposals of each search; its seeds and its grown structures come on top."""
WANTED_GAIN = 1.6
"""Trials a minute of two workers / those of one."""
STUDY_FOLDER = "turn"
"""The folder of the study of one search, in the run folder."""


def main() -> int:
    """Measure, and print the report; exit code 1 where two workers gain less than is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    overrides = {
        "target": "2x",
        "search.executor": "ray",
        "search.trials": TRIALS,
        "search.level_switches": 0,
    }
    rates: dict[int, list[float]] = {count: [] for count in WORKERS}
    with begin_run(arguments.spec, arguments.out, overrides=overrides, resume=True) as opened:
        prepared = prepare_run(opened)
        for turn in range(TURNS):
            order: Sequence[int] = WORKERS if turn % 2 == 0 else tuple(reversed(WORKERS))
            for count in order:
                rate = measure_rate(prepared, count)
                rates[count].append(rate)
                print(f"{count} worker(s): {rate:.1f} trials a minute", file=sys.stderr)
    gains = [two / one for one, two in zip(*rates.values(), strict=True)]
    gain = statistics.median(gains)
    print(format_report(arguments.spec.stem, rates, gains=gains))
    return 0 if gain >= WANTED_GAIN else 1


def measure_rate(prepared: PreparedRun, count: int) -> float:
    """Search with so many workers; return the trials a minute."""
    run = prepared.run
    folder = RunFolder(path=run.folder.path / STUDY_FOLDER)
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir()
    spec = replace(run.spec, search=replace(run.spec.search, workers=count))
    turn = replace(run, spec=spec, folder=folder)
    with start_evaluator(turn, prepared.sensitivity) as evaluator:
        wake_workers(turn, prepared, evaluator=evaluator)
        target_ms = run.goal.compute_target_ms(prepared.dense.latency_ms)
        start = time.perf_counter()
        trials = run_search(
            turn,
            prepared.sensitivity,
            predictor=prepared.predictor,
            budget_ms=AIMED_SHARE * target_ms,
            evaluator=evaluator,
        )
        seconds = time.perf_counter() - start
    shutil.rmtree(folder.path)
    return 60 * len(trials) / seconds


def wake_workers(run: RunContext, prepared: PreparedRun, *, evaluator: TrialEvaluator) -> None:
    """Let every worker receive the models, and evaluate the dense pipeline."""
    dense = Candidate(
        kept_units={node: cut_each_block(blocks, 0.0) for node, blocks in run.blocks.items()},
        precision=dict.fromkeys(run.blocks, "fp32"),
    )
    evaluator.evaluate_all(
        dict.fromkeys(range(2 * evaluator.workers), dense),
        evaluate=evaluator.evaluate,
        progress=lambda message, share: run.on_progress("search", message, share),
        message="starting workers",
    )


def format_report(name: str, rates: dict[int, list[float]], *, gains: list[float]) -> str:
    """Return the report in Markdown."""
    machine = describe_cpu()
    lines = [
        "# Two workers in place of one",
        "",
        f"{machine['name']}, {machine['cores']} cores, commit {read_git_commit()}. Pipeline "
        f"`{name}`; {TURNS} searches of {TRIALS} proposals with each number of workers, in turn. "
        "Each trial runs on one thread.",
        "",
        "| workers | trials a minute, median | least to most |",
        "|---:|---:|---:|",
    ]
    for count, values in rates.items():
        spread = f"{min(values):.1f} to {max(values):.1f}"
        lines.append(f"| {count} | {statistics.median(values):.1f} | {spread} |")
    lines += [
        "",
        f"Two workers do {statistics.median(gains):.2f} times as many trials (turn by turn "
        f"{min(gains):.2f} to {max(gains):.2f}; the aim is {WANTED_GAIN}).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
