"""Latency free of a machine's moods: a structure is held against whole pipelines that are measured again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mmcompress.measure.latency.bench import PipelineLatency
from mmcompress.storage import read_record, write_record

DENSE_NAME = "fp32"


@dataclass(frozen=True)
class ReferenceRuns:
    """Of every measurement so far: the p50 of each node, over that of the whole dense request beside it, in the whole
    pipeline of each precision."""

    runs: tuple[dict[str, dict[str, float]], ...] = ()

    def average_runs(self, node: str, precision: str) -> float:
        return fmean(w[precision][node] for w in self.runs if precision in w)


def load_reference_runs(record: Path) -> ReferenceRuns:
    return read_record(ReferenceRuns, record) if record.exists() else ReferenceRuns()


def include_latest_run(record: Path, found: Mapping[str, PipelineLatency]) -> ReferenceRuns:
    """What is on record, and last what whole pipelines took now, by precision."""
    whole = found[DENSE_NAME].latency.p50
    window = {p: {n: ms.p50 / whole for n, ms in m.nodes.items()} for p, m in found.items()}
    return ReferenceRuns((*load_reference_runs(record).runs, window))


def append_reference_run(record: Path, found: Mapping[str, PipelineLatency]) -> ReferenceRuns:
    """`together`, put on record."""
    windows = include_latest_run(record, found)
    write_record(record, windows, indent=None)
    return windows


def compute_machine_speed_factor(
    nodes: Mapping[str, float],
    precision: Mapping[str, str],
    *,
    reference_runs: ReferenceRuns,
    run_index: int = -1,
) -> float:
    """The factor from what a structure took in one window to what it takes usually, over the dense pipeline.

    `nodes`: the milliseconds of each of its nodes in that window, the last one or the one at `run_index`.

    A busy machine slows a rounded model down otherwise than a large one in fp32, by up to a tenth and for minutes. A
    node of a structure feels what the whole node of its precision feels right beside it: what that one takes now and
    usually is known.
    """
    now, then = reference_runs.runs[run_index], 0.0
    of = lambda n: p if (p := precision.get(n, DENSE_NAME)) in now else DENSE_NAME
    for n, ms in nodes.items():
        here = now[of(n)][n]
        then += ms * (reference_runs.average_runs(n, of(n)) / here if here else 1.0)
    return then / sum(nodes.values())
