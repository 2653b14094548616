"""Make every run of the table of targets, and write what came of them.

    python benchmarks/targets.py --out runs/targets --report reports/targets

The image pipeline runs at 2x, 3x and 4x with three seeds, and at 3x and 4x with the best effort.
The speech pipeline runs at 2.5x on three random halves of 70 clips. It is left out where the
variables of its spec are not set. Every 2x run begins with an empty cache of device tables. The
others of its seed begin `--from` it, as another target on the next day would.

A run that was interrupted goes on, and one that is finished is not run again. `--rows` and
`--seeds` choose some of them. `--space` replaces the search space: `search_spaces/prune_only.yaml`
stands in for a processor without VNNI. The report is written anew after every run, as Markdown and
JSON. It says what was measured and which aims are missed; its exit code is 0 either way. `--finished`
writes it of the runs that are finished, and makes none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmcompress.results.records import Summary
from mmcompress.stats import PerSampleScores, estimate_paired_difference
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

IMAGE_SPEC = "pipelines/clip_captioner.yaml"
"""The image pipeline."""
SPEECH_SPEC = "pipelines/speech_search.yaml"
"""The speech pipeline."""
SPEECH_VARIABLES = ("LJSPEECH_DIR", "SPEECH_WEIGHTS", "SENTENCE_WEIGHTS")
"""What the speech pipeline reads from the environment."""
WORD_ERRORS = "wer"
"""How the name of the word error rate begins in the scores of a run."""
GOOD_EXIT_CODES = (0, 3)
"""Done, or the target is missed and the best result is written."""
LOWEST_SHARE = 0.95
"""Measured latency / target of a run that is as slow as it may be and not much faster."""
MAX_SEED_SHORTFALL = 0.02
"""How far one seed may keep less than the aim; the mean must reach it."""
MAX_WORD_ERRORS_ADDED = 0.03
"""Upper bound of the word error rate that compression may add."""
SECONDS_PER_MINUTE = 60
"""To print minutes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: runs that differ in their seed alone."""

    name: str
    """What `--rows` calls it."""
    spec: str
    """The pipeline."""
    target: str
    """The target, as a spec says it."""
    effort: str
    """Level of effort."""
    seeds: tuple[int, ...]
    """Seeds of its runs."""
    minutes: float
    """Minutes that one run may take."""
    retained: float | None
    """Share of the dense quality to keep, as a mean over the seeds; None: judged by word errors."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the spec that are set."""
    seed_key: str = "seed"
    """The key that the seed is put into."""
    begins_from: str = ""
    """The row whose run of the same seed has profile and sensitivity; empty: none, from nothing."""


ROWS = (
    Row(
        name="2x", spec=IMAGE_SPEC, target="2x", effort="normal", seeds=(0, 1, 2), minutes=7,
        retained=0.99,
    ),
    Row(
        name="3x", spec=IMAGE_SPEC, target="3x", effort="normal", seeds=(0, 1, 2), minutes=10,
        retained=0.97, begins_from="2x",
    ),
    Row(
        name="4x", spec=IMAGE_SPEC, target="4x", effort="normal", seeds=(0, 1, 2), minutes=10,
        retained=0.90, begins_from="2x",
    ),
    Row(
        name="speech", spec=SPEECH_SPEC, target="2.5x", effort="normal", seeds=(0, 1, 2),
        minutes=20, retained=None, settings={"data.options.count": 70},
        seed_key="data.options.split_seed",
    ),
    Row(
        name="4x-best", spec=IMAGE_SPEC, target="4x", effort="best", seeds=(0,), minutes=90,
        retained=0.97, begins_from="2x",
    ),
    Row(
        name="3x-best", spec=IMAGE_SPEC, target="3x", effort="best", seeds=(0,), minutes=90,
        retained=0.99, begins_from="2x",
    ),
)  # fmt: skip
"""The rows, in the order in which they are run."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What came of one run."""

    row: str
    """Name of its row."""
    seed: int
    """Its seed."""
    exit_code: int
    """Exit code of the command."""
    minutes: float
    """Minutes of the command, with those before an interruption."""
    speedup: float = math.nan
    """Latency of the dense pipeline / that of the compressed one."""
    target_share: float = math.nan
    """Measured latency / target."""
    margin: float = math.nan
    """Share that this may be off by."""
    retained: float = math.nan
    """Share of the dense quality that is kept, of the worst metric of the test split."""
    proofs: int = 0
    """Proofs that passed."""
    failed_proofs: int = 0
    """Proofs that failed."""
    trained_steps: int = 0
    """Steps of the training."""
    commit: str = ""
    """The commit of mmcompress."""
    cpu: str = ""
    """The processor, with what it lacks for int8."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage."""
    added_word_errors: float | None = None
    """Word error rate of the compressed pipeline minus that of the dense one; None: no such
    metric."""
    added_word_errors_margin: float | None = None
    """Half the 95 % interval of it, paired over the clips."""

    @property
    def is_near_target(self) -> bool:
        """Whether the raw ratio lies within 95 to 100 % of the target."""
        return LOWEST_SHARE <= self.target_share <= 1


class Table:
    """The runs in one folder."""

    def __init__(self, folder: Path, *, space: str | None):
        self.folder = folder
        self.space = space

    def locate_run(self, row: str, seed: int) -> Path:
        """Return the run folder of a seed of a row."""
        return self.folder / f"{row}-s{seed}"

    def locate_record(self, row: str, seed: int) -> Path:
        """Return the file of what came of a seed of a row; it is there once the run is finished."""
        return self.folder / f"{row}-s{seed}.json"

    def make_run(self, row: Row, seed: int) -> FinishedRun:
        """Make a run, or go on with it, and return what came of it.

        What is finished stays as it is. Minutes of attempts that were interrupted by an error of
        this script are lost, those of the command are kept.
        """
        record_path = self.locate_record(row.name, seed)
        if record_path.exists():
            return read_record(FinishedRun, record_path)
        minutes_path = self.folder / f"{row.name}-s{seed}.minutes"
        earlier_minutes = float(minutes_path.read_text()) if minutes_path.exists() else 0.0
        start = time.monotonic()
        exit_code = subprocess.run(
            self._build_command(row, seed), check=False, env=self._build_environment(row, seed)
        ).returncode
        minutes = earlier_minutes + (time.monotonic() - start) / SECONDS_PER_MINUTE
        minutes_path.write_text(f"{minutes}")
        finished = describe_run(
            row, seed, folder=self.locate_run(row.name, seed), exit_code=exit_code, minutes=minutes
        )
        if exit_code in GOOD_EXIT_CODES:
            record_path.write_text(json.dumps(asdict(finished), indent=2), encoding="utf-8")
        return finished

    def _build_command(self, row: Row, seed: int) -> list[str]:
        """Build the command line of a run."""
        command = [sys.executable, "-m", "mmcompress.cli", "run", row.spec]
        command += ["--target", row.target, "--effort", row.effort]
        for key, value in {row.seed_key: seed, **row.settings}.items():
            command += ["--set", f"{key}={value}"]
        if self.space:
            command += ["--space", self.space]
        if row.begins_from:
            command += ["--from", str(self.locate_run(row.begins_from, seed))]
        return [*command, "--out", str(self.locate_run(row.name, seed)), "--resume"]

    def _build_environment(self, row: Row, seed: int) -> dict[str, str]:
        """Build the environment of a run: each first run of a seed has a cache of its own."""
        cache = self.folder / f"cache-{row.begins_from or row.name}-s{seed}"
        return {**os.environ, "MMCOMPRESS_CACHE": str(cache.resolve())}


def describe_run(
    row: Row, seed: int, *, folder: Path, exit_code: int, minutes: float
) -> FinishedRun:
    """Return what came of a run, as its summary says it."""
    run_folder = RunFolder(path=folder)
    if not run_folder.summary.exists():
        return FinishedRun(row=row.name, seed=seed, exit_code=exit_code, minutes=minutes)
    summary: Summary = load_summary(folder)
    added, margin = measure_added_word_errors(run_folder)
    latency = getattr(summary.compressed.latency_ms, summary.target.statistic)
    passed = [proof for proof in summary.proofs if proof.passed]
    return FinishedRun(
        row=row.name,
        seed=seed,
        exit_code=exit_code,
        minutes=minutes,
        speedup=summary.speedup,
        target_share=latency / summary.target.latency_ms,
        margin=summary.latency_margin,
        retained=summary.quality_retained,
        proofs=len(passed),
        failed_proofs=len(summary.proofs) - len(passed),
        trained_steps=summary.training.steps if summary.training else 0,
        commit=summary.commit,
        cpu=describe_processor(summary.cpu),
        stage_seconds=dict(summary.timings),
        added_word_errors=added,
        added_word_errors_margin=margin,
    )


def describe_processor(cpu: Mapping[str, Any]) -> str:
    """Name a processor, and say whether it multiplies int8 in one instruction."""
    has_vnni = any("vnni" in flag for flag in cpu.get("flags", ()))
    return f"{cpu.get('name', '?')}, {'with' if has_vnni else 'without'} VNNI"


def measure_added_word_errors(folder: RunFolder) -> tuple[float | None, float | None]:
    """Return what compression adds to the word error rate, and half its paired 95 % interval."""
    if not folder.outcomes.exists():
        return None, None
    sides = read_record(dict[str, dict[str, PerSampleScores]], folder.outcomes)
    scores: dict[str, list[dict[str, PerSampleScores]]] = {}
    for side, scores_by_metric in sides.items():
        word_errors = {
            name: metric_scores
            for name, metric_scores in scores_by_metric.items()
            if name.startswith(WORD_ERRORS)
        }
        if not word_errors:
            return None, None
        scores[side] = [word_errors]
    return estimate_paired_difference(scores["baseline"], scores["compressed"])


def judge_row(row: Row, runs: Sequence[FinishedRun]) -> list[str]:
    """Return which aims of a row its runs miss, in words; nothing where all are reached."""
    misses: list[str] = []
    slowest = max(run.minutes for run in runs)
    if slowest > row.minutes:
        misses.append(f"{slowest:.1f} min, aim {row.minutes:g}")
    if any(run.failed_proofs for run in runs):
        misses.append("a proof failed")
    if row.retained is not None:
        mean = statistics.fmean(run.retained for run in runs)
        worst = min(run.retained for run in runs)
        if not mean >= row.retained:
            misses.append(f"{mean:.1%} retained, aim {row.retained:.0%}")
        if not worst >= row.retained - MAX_SEED_SHORTFALL:
            misses.append(f"a seed keeps {worst:.1%}")
        return misses
    upper = summarize_word_errors(runs)[1]
    if not upper <= MAX_WORD_ERRORS_ADDED:
        misses.append(f"up to {upper:.1%} word errors more, aim {MAX_WORD_ERRORS_ADDED:.0%}")
    return misses


def summarize_word_errors(runs: Sequence[FinishedRun]) -> tuple[float, float]:
    """Return the mean of the added word errors over halves, and its upper 95 % bound."""
    added = [run.added_word_errors for run in runs if run.added_word_errors is not None]
    margins = [
        run.added_word_errors_margin for run in runs if run.added_word_errors_margin is not None
    ]
    if not added:
        return math.nan, math.nan
    mean = statistics.fmean(added)
    return mean, mean + math.hypot(*margins) / len(margins)


def format_report(runs: Sequence[FinishedRun], *, space: str | None) -> str:
    """Format the Markdown page."""
    lines = ["# Targets: what is kept, and how long it takes", ""]
    lines.append(f"`python benchmarks/targets.py`{f', `{space}`' if space else ''}.")
    for label, values in (
        ("Processor", {run.cpu for run in runs if run.cpu}),
        ("Commit", {run.commit for run in runs if run.commit}),
    ):
        lines.append(f"{label}: {', '.join(sorted(values))}.")
    lines += ["", "| row | seeds | retained (mean, worst) | latency / target | minutes | missed |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for row in ROWS:
        row_runs = [run for run in runs if run.row == row.name]
        if row_runs:
            lines.append(format_row(row, row_runs))
    near = sum(run.is_near_target for run in runs)
    lines += ["", f"{near} of {len(runs)} runs lie within 95 to 100 % of their target, raw.", ""]
    lines += ["| run | exit | speed-up | latency / target | retained | steps | proofs | minutes |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for run in runs:
        lines.append(
            f"| {run.row}, seed {run.seed} | {run.exit_code} | {run.speedup:.2f}x | "
            f"{run.target_share:.1%} ± {run.margin:.1%} | {run.retained:.1%} | "
            f"{run.trained_steps} | {run.proofs} of {run.proofs + run.failed_proofs} | "
            f"{run.minutes:.1f} |"
        )
    stages = sorted({stage for run in runs for stage in run.stage_seconds})
    lines += ["", "Seconds by stage:", "", f"| run | {' | '.join(stages)} |"]
    lines.append("|---|" + "---:|" * len(stages))
    for run in runs:
        cells = [f"{run.stage_seconds.get(stage, 0):.0f}" for stage in stages]
        lines.append(f"| {run.row}, seed {run.seed} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def format_row(row: Row, runs: Sequence[FinishedRun]) -> str:
    """Format the line of a row: the mean over its seeds, and what it misses."""
    retained = [run.retained for run in runs]
    kept = f"{statistics.fmean(retained):.1%}, {min(retained):.1%}"
    if row.retained is None:
        mean, upper = summarize_word_errors(runs)
        kept += f"; word errors {mean:+.1%}, at most {upper:+.1%}"
    shares = ", ".join(f"{run.target_share:.1%}" for run in runs)
    minutes = ", ".join(f"{run.minutes:.1f}" for run in runs)
    missed = "; ".join(judge_row(row, runs)) or "nothing"
    return f"| {row.name} | {len(runs)} | {kept} | {shares} | {minutes} | {missed} |"


def main() -> None:
    """Make the runs in turn, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/targets"))
    parser.add_argument("--report", type=Path, default=None, help="default: OUT/report")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--space", default=None)
    parser.add_argument(
        "--finished", action="store_true", help="make no run: report those that are finished"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = arguments.report or arguments.out / "report"
    report.mkdir(parents=True, exist_ok=True)
    table = Table(arguments.out, space=arguments.space)
    runs: list[FinishedRun] = []
    for row in ROWS:
        if arguments.rows and row.name not in arguments.rows:
            continue
        is_speech = row.spec == SPEECH_SPEC
        if is_speech and not all(os.environ.get(name) for name in SPEECH_VARIABLES):
            print(f"{row.name} is left out: {', '.join(SPEECH_VARIABLES)} are not set")
            continue
        for seed in row.seeds:
            if arguments.seeds is not None and seed not in arguments.seeds:
                continue
            if arguments.finished and not table.locate_record(row.name, seed).exists():
                continue
            runs.append(table.make_run(row, seed))
            page = format_report(runs, space=arguments.space)
            (report / "targets.md").write_text(page, encoding="utf-8")
            records = [asdict(run) for run in runs]
            (report / "targets.json").write_text(json.dumps(records, indent=2), encoding="utf-8")
    print(format_report(runs, space=arguments.space))


if __name__ == "__main__":
    main()
