"""Take the drift of a machine out of a latency.

Whole pipelines are measured in turn with every structure.
A busy machine is slower for seconds or minutes. What the whole pipelines took in the same run,
against all runs so far, tells by how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from mmcompress.measure.cost_model.plan import DENSE_NAME
from mmcompress.measure.latency.bench import Samples
from mmcompress.storage import read_record, write_record


@dataclass(frozen=True, kw_only=True)
class WholePipeline:
    """What a whole pipeline took in one benchmark, as shares of a dense request in the same one."""

    nodes: dict[str, float]
    """p50 of each node / p50 of a dense request."""
    all_nodes: float
    """p50 of what the nodes of a request take together / p50 of a dense request. A median of sums
    is no sum of medians."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRuns:
    """What whole pipelines took in every benchmark so far. `reference_runs.json`."""

    runs: tuple[dict[str, WholePipeline], ...] = ()
    """The whole pipelines of each benchmark, by their precision."""

    def average_node(self, node: str, precision: str) -> float:
        """Average the share of a node over the runs that have a pipeline in this precision."""
        return fmean(pipeline.nodes[node] for pipeline in self._list_pipelines(precision))

    def average_all_nodes(self, references: Mapping[str, str]) -> float:
        """Return what the nodes of a request take in the long run / what a dense request takes.

        Args:
            references: The precision of every node.
        """
        whole = 0.0
        for node, precision in references.items():
            sum_to_medians = fmean(
                pipeline.all_nodes / sum(pipeline.nodes.values())
                for pipeline in self._list_pipelines(precision)
            )
            whole += self.average_node(node, precision) * sum_to_medians
        return whole

    def _list_pipelines(self, precision: str) -> list[WholePipeline]:
        """List what was measured of the whole pipeline in a precision, run by run."""
        return [run[precision] for run in self.runs if precision in run]


def load_reference_runs(record: Path) -> ReferenceRuns:
    """Load the runs on record; none when there is no record yet.

    Raises:
        DataError: The file is damaged.
    """
    return read_record(ReferenceRuns, record) if record.exists() else ReferenceRuns()


def include_latest_run(record: Path, pipelines: Mapping[str, Samples]) -> ReferenceRuns:
    """Load the runs on record and add the latest one, without writing it.

    Args:
        record: The JSON file of all runs.
        pipelines: What was observed of whole pipelines in turn, by precision. The dense one is
            `DENSE_NAME`.

    Returns:
        All runs, the latest last.
    """
    dense_ms = median(pipelines[DENSE_NAME].ms)
    latest_run: dict[str, WholePipeline] = {}
    for precision, pipeline in pipelines.items():
        latest_run[precision] = WholePipeline(
            nodes={node: median(node_ms) / dense_ms for node, node_ms in pipeline.nodes.items()},
            all_nodes=median(pipeline.sum_nodes()) / dense_ms,
        )
    return ReferenceRuns(runs=(*load_reference_runs(record).runs, latest_run))


def append_reference_run(record: Path, pipelines: Mapping[str, Samples]) -> ReferenceRuns:
    """Add the latest run to the runs on record, and write them. See `include_latest_run`."""
    reference_runs = include_latest_run(record, pipelines)
    write_record(record, reference_runs, indent=None)
    return reference_runs


def compute_machine_speed_factor(
    node_ms: Mapping[str, float],
    precision_by_node: Mapping[str, str],
    *,
    reference_runs: ReferenceRuns,
) -> float:
    """Compute the factor from milliseconds in the last run to milliseconds in the long run.

    With the milliseconds ms of its nodes n, and the reference r of a node in its precision:

        factor = sum of ms_n * (mean of r_n over all runs) / (r_n of this run) / sum of ms_n

    A busy machine slows a quantized model differently from a large one in fp32, by up to a tenth
    and for minutes. So a node of a structure is compared to the whole node in the same precision,
    measured in the same run.

    Args:
        node_ms: Milliseconds of each node of a structure in that run.
        precision_by_node: Precision of each node.
        reference_runs: All runs of the whole pipelines. The structure was measured in the last one.

    Returns:
        Milliseconds in the long run / milliseconds in that run.
    """
    run = reference_runs.runs[-1]
    long_run_ms = 0.0
    for node, ms in node_ms.items():
        precision = precision_by_node.get(node, DENSE_NAME)
        if precision not in run:
            precision = DENSE_NAME
        reference = run[precision].nodes[node]
        if reference:
            long_run_ms += ms * (reference_runs.average_node(node, precision) / reference)
        else:
            long_run_ms += ms
    return long_run_ms / sum(node_ms.values())
