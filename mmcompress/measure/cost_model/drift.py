"""Take the drift of a machine out of a latency.

Whole pipelines are measured in turn with every structure.
A busy machine is slower for seconds or minutes. What the whole pipelines took in the same run,
against all runs so far, tells by how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from mmcompress.measure.cost_model.plan import DENSE_NAME
from mmcompress.measure.latency.bench import PipelineLatency
from mmcompress.storage import read_record, write_record


@dataclass(frozen=True, kw_only=True)
class ReferenceRuns:
    """What whole pipelines took in every benchmark so far."""

    runs: tuple[dict[str, dict[str, float]], ...] = ()
    """p50 of a node / p50 of a whole dense request of the same benchmark, by precision of the
    pipeline and node."""

    def average_runs(self, node: str, precision: str) -> float:
        """Average the figure of a node over the runs that have a pipeline in this precision."""
        return fmean(run[precision][node] for run in self.runs if precision in run)


def load_reference_runs(record: Path) -> ReferenceRuns:
    """Load the runs on record; none when there is no record yet.

    Raises:
        DataError: The file is damaged.
    """
    return read_record(ReferenceRuns, record) if record.exists() else ReferenceRuns()


def include_latest_run(record: Path, pipelines: Mapping[str, PipelineLatency]) -> ReferenceRuns:
    """Load the runs on record and add the latest one, without writing it.

    Args:
        record: The JSON file of all runs.
        pipelines: Whole pipelines measured in turn, by precision; the dense one is `DENSE_NAME`.

    Returns:
        All runs, the latest last.
    """
    dense_ms = pipelines[DENSE_NAME].latency.p50
    latest_run: dict[str, dict[str, float]] = {}
    for precision, pipeline in pipelines.items():
        latest_run[precision] = {
            node: latency.p50 / dense_ms for node, latency in pipeline.nodes.items()
        }
    return ReferenceRuns(runs=(*load_reference_runs(record).runs, latest_run))


def append_reference_run(record: Path, pipelines: Mapping[str, PipelineLatency]) -> ReferenceRuns:
    """Add the latest run to the runs on record, and write them. See `include_latest_run`."""
    reference_runs = include_latest_run(record, pipelines)
    write_record(record, reference_runs, indent=None)
    return reference_runs


def compute_machine_speed_factor(
    node_ms: Mapping[str, float],
    precision_by_node: Mapping[str, str],
    *,
    reference_runs: ReferenceRuns,
    run_index: int = -1,
) -> float:
    """Compute the factor from what a structure took in one run to what it takes in the long run.

    With the milliseconds ms of its nodes n, and the reference r of a node in its precision:

        factor = sum of ms_n * (mean of r_n over all runs) / (r_n of this run) / sum of ms_n

    A busy machine slows a quantized model differently from a large one in fp32, by up to a tenth
    and for minutes. So a node of a structure is compared to the whole node in the same precision,
    measured in the same run.

    Args:
        node_ms: Milliseconds of each node in that run.
        precision_by_node: Precision of each node.
        reference_runs: All runs of the whole pipelines.
        run_index: Index of the run in which the structure was measured; default: the last one.

    Returns:
        Milliseconds in the long run / milliseconds in that run.
    """
    run = reference_runs.runs[run_index]
    long_run_ms = 0.0
    for node, ms in node_ms.items():
        precision = precision_by_node.get(node, DENSE_NAME)
        if precision not in run:
            precision = DENSE_NAME
        reference = run[precision][node]
        if reference:
            long_run_ms += ms * (reference_runs.average_runs(node, precision) / reference)
        else:
            long_run_ms += ms
    return long_run_ms / sum(node_ms.values())
