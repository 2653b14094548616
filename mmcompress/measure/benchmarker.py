"""Everything that a run measures with a clock, behind one object: a test hands the run another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mmcompress.measure.cost_model.device_table import DeviceTable, TableKey, complete_table
from mmcompress.measure.cost_model.plan import Export
from mmcompress.measure.cost_model.time_export import time_export
from mmcompress.measure.latency.bench import Samples
from mmcompress.measure.latency.benchmark_in_subprocess import BenchmarkJob, benchmark_in_subprocess
from mmcompress.measure.latency.memory import measure_memory_mb


class Benchmarker:
    """Measures blocks, exports, bundles and memory on this machine."""

    def complete_device_table(
        self,
        needs: Iterable[tuple[TableKey, int, int]],
        threads: int,
        *,
        precisions: Sequence[str],
        progress: Callable[[str, float], None],
    ) -> DeviceTable:
        """Return the device table with a row for every block in `needs`; see `measure.table.completed`."""
        return complete_table(needs, threads, progress=progress, precisions=precisions)

    def time_export(self, export: Export, folder: Path, *, threads: int) -> float:
        """Return the milliseconds that one request spends in the sessions of an export."""
        return time_export(export, folder, threads=threads)

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        """Return what was observed of every bundle of a job, measured in a process of its own."""
        return benchmark_in_subprocess(job, folder)

    def measure_memory_mb(self, bundle: Path | None = None) -> float:
        """Return the peak resident memory of a process that loads a bundle and answers once."""
        return measure_memory_mb(bundle)
