"""Everything that a run measures with a clock, behind one object: tests pass another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mmcompress.measure.cost_model.device_table import DeviceTable, TableNeed, complete_table
from mmcompress.measure.cost_model.plan import Export
from mmcompress.measure.cost_model.time_export import time_export
from mmcompress.measure.latency.bench import Samples
from mmcompress.measure.latency.benchmark_in_subprocess import BenchmarkJob, benchmark_in_subprocess
from mmcompress.measure.latency.memory import measure_memory_mb
from mmcompress.runtime.progress import StageProgress


class Benchmarker:
    """Measures blocks, exports, bundles and memory on this machine."""

    def complete_device_table(
        self,
        needs: Iterable[TableNeed],
        threads: int,
        *,
        precisions: Sequence[str],
        progress: StageProgress,
    ) -> DeviceTable:
        """Return the device table with a row for every block in `needs`; see `complete_table`.

        Args:
            needs: (key of a block, its largest number of units, their granularity) each.
            threads: Threads of every session.
            precisions: Precisions that every block is measured in.
            progress: Receives (message, share done).
        """
        return complete_table(needs, threads, progress=progress, precisions=precisions)

    def time_export(self, export: Export, folder: Path, *, threads: int) -> float:
        """Return the milliseconds that one request spends in the sessions of an export.

        Args:
            export: The exported node.
            folder: Where its files lie.
            threads: Threads of every session.
        """
        return time_export(export, folder, threads=threads)

    def benchmark_bundles(self, job: BenchmarkJob, folder: Path) -> dict[str, Samples]:
        """Return what was observed of every bundle of a job; see `benchmark_in_subprocess`.

        Args:
            job: What to measure.
            folder: Where its requests lie.
        """
        return benchmark_in_subprocess(job, folder)

    def measure_memory_mb(self, bundle: Path | None = None) -> float:
        """Return the peak resident memory (MB) of a process that loads a bundle and asks it once.

        Args:
            bundle: The bundle; None measures a process that only imports the runtime.
        """
        return measure_memory_mb(bundle)
