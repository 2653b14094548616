"""Measure what a pipeline of many models costs the tool itself.

    python benchmarks/graph_size.py > reports/graph_size.md    about 15 minutes

Graphs of 3, 30 and 300 image encoders of one layer are validated, profiled by a device table, and
searched. The machine that they are measured on is made of arithmetic. So the seconds are those of the
tool: it exports and proves every model, and splits the budget over all of their blocks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the repository."""

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

from conftest import SPEC, write_tiny  # noqa: E402
from simulated import SimulatedBenchmarker, StoppedClock  # noqa: E402

from mmcompress.graph.load_spec import load_spec  # noqa: E402
from mmcompress.run.fit_structure import open_search  # noqa: E402
from mmcompress.run.stages import prepare_run  # noqa: E402
from mmcompress.runtime.machine import describe_cpu  # noqa: E402
from mmcompress.workspace.context import open_run  # noqa: E402

COUNTS = (3, 30, 300)
"""Models of the graphs."""

MAX_RATIO = 15
"""Seconds of 300 models / seconds of 30 that are allowed."""

BUDGET_SHARE = 0.8
"""Latency that is searched for / that of the dense pipeline."""

OVERRIDES = {
    "data.sensitivity_pairs": 8,
    "data.validation_pairs": 8,
    "data.calibration": 8,
    "search.evaluator": "estimated",
    "search.linearization_rounds": 0,
    "search.trials": 6,
    "search.level_switches": 4,
    "metrics": ["embedding"],
}
"""Losses are sums of estimates: what is measured here is the graph, not the models."""

REST = "\ndata:\n" + SPEC.partition("data:\n")[2]
"""The rest of every spec: that of the tests."""


@dataclass(frozen=True, kw_only=True)
class GraphTimes:
    """Seconds of processor that a graph takes."""

    count: int
    """Its models."""
    validate: float
    """To read and check the spec."""
    profile: float
    """To load, export, prove and profile all models, with their sensitivity."""
    search: float
    """To search and choose a structure."""

    @property
    def total(self) -> float:
        """Seconds of all of it."""
        return self.validate + self.profile + self.search


def write_spec(models: Path, path: Path, count: int) -> Path:
    """Write a spec of so many image encoders that read the same image."""
    nodes = "".join(
        f"  v{i}: {{kind: image_encoder, source: {models}/clip, inputs: {{image: image}}}}\n"
        for i in range(count)
    )
    outputs = ", ".join(f"e{i}: v{i}.embedding" for i in range(count))
    path.write_text(
        f"name: many\ninputs: {{image: image}}\nnodes:\n{nodes}outputs: {{{outputs}}}{REST}",
        encoding="utf-8",
    )
    return path


def measure_graph(folder: Path, count: int) -> GraphTimes:
    """Validate, profile and search a graph; returns what each took."""
    spec_path = write_spec(folder, folder / f"{count}.yaml", count)
    marks = [time.process_time()]
    load_spec(spec_path, OVERRIDES)
    marks.append(time.process_time())
    run = open_run(
        spec_path,
        folder / f"run-{count}",
        overrides=OVERRIDES,
        bench=SimulatedBenchmarker(),
        clock=StoppedClock(),
    )
    prepared = prepare_run(run)
    marks.append(time.process_time())
    budget_ms = BUDGET_SHARE * prepared.dense.latency_ms.p50
    with open_search(prepared.run, prepared.sensitivity) as propose:
        trial = propose(prepared.predictor, budget_ms, attempt=0)
    marks.append(time.process_time())
    if trial is None or trial.latency_ms > budget_ms:
        raise SystemExit(f"{count} models: nothing was found within the budget")
    validate, profile, search = (marks[i + 1] - marks[i] for i in range(3))
    return GraphTimes(count=count, validate=validate, profile=profile, search=search)


def format_report(times: list[GraphTimes]) -> str:
    """Format the Markdown page."""
    lines = ["# Graphs of many models", "", "`python benchmarks/graph_size.py`. "]
    lines[-1] += f"Processor: {describe_cpu()['name']}. Seconds of processor."
    lines += ["", "| models | validate | profile | search | all | of the line before |"]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    for i, row in enumerate(times):
        ratio = f"{row.total / times[i - 1].total:.1f}x" if i else ""
        lines.append(
            f"| {row.count} | {row.validate:.2f} | {row.profile:.1f} | {row.search:.1f} | "
            f"{row.total:.1f} | {ratio} |"
        )
    lines += ["", f"The aim is at most {MAX_RATIO}x for ten times the models.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure the graphs one after the other, and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    arguments = parser.parse_args()
    times: list[GraphTimes] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["MMCOMPRESS_CACHE"] = str(folder / "cache")
        write_tiny(folder)
        for count in arguments.counts:
            times.append(measure_graph(folder, count))
            print(asdict(times[-1]), file=sys.stderr, flush=True)
    print(format_report(times))


if __name__ == "__main__":
    main()
