"""Everything that a run measures with a clock, behind one object: a test hands the run another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mmcompress.measure import apart, footprint, table
from mmcompress.measure.apart import BenchmarkJob
from mmcompress.measure.latency import Samples
from mmcompress.measure.readings import Export, time_export
from mmcompress.measure.table import DeviceTable, TableKey


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
        return table.complete_table(needs, threads, progress, precisions)

    def time_export(self, export: Export, folder: Path, *, threads: int) -> float:
        """Return the milliseconds that one request spends in the sessions of an export."""
        return time_export(export, folder, threads)

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        """Return what was observed of every bundle of a job, measured in a process of its own."""
        return apart.benchmark_in_subprocess(job, folder)

    def measure_memory_mb(self, bundle: Path | None = None) -> float:
        """Return the peak resident memory of a process that loads a bundle and answers once."""
        return footprint.measure_memory_mb(bundle)
