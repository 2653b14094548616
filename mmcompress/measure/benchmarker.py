"""Everything that a run measures with a clock, behind one object: tests pass another one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmcompress.measure.cost_model.device_table import DeviceTable, TableNeed, complete_table
from mmcompress.measure.cost_model.plan import Export
from mmcompress.measure.cost_model.time_export import time_export
from mmcompress.measure.latency.bench import Samples
from mmcompress.measure.latency.benchmark_in_subprocess import BenchmarkJob, benchmark_in_subprocess
from mmcompress.measure.latency.memory import measure_memory_mb
from mmcompress.runtime.machine import describe_cpu, fingerprint_device
from mmcompress.runtime.progress import StageProgress
from mmcompress.runtime.providers import CPU_PROVIDER


class Benchmarker:
    """Measures blocks, exports, bundles and memory on this machine. Another class may do so
    elsewhere."""

    def complete_device_table(
        self,
        needs: Iterable[TableNeed],
        threads: int,
        *,
        precisions: Sequence[str],
        progress: StageProgress,
        provider: str = CPU_PROVIDER,
    ) -> DeviceTable:
        """Return the device table with a row for every block in `needs`; see `complete_table`.

        Args:
            needs: (key of a block, its largest number of units, their granularity) each.
            threads: Threads of every session.
            precisions: Precisions that every block is measured in.
            progress: Receives (message, share done).
            provider: What sessions run on.
        """
        return complete_table(
            needs, threads, progress=progress, precisions=precisions, provider=provider
        )

    def time_export(
        self, export: Export, folder: Path, *, threads: int, provider: str = CPU_PROVIDER
    ) -> float:
        """Return the milliseconds that one request spends in the sessions of an export.

        Args:
            export: The exported node.
            folder: Where its files lie.
            threads: Threads of every session.
            provider: What sessions run on.
        """
        return time_export(export, folder, threads=threads, provider=provider)

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

    def describe_cpu(self) -> dict[str, Any]:
        """Describe the processor that measures; see `runtime.machine.describe_cpu`."""
        return describe_cpu()

    def fingerprint_device(self, threads: int, provider: str = CPU_PROVIDER) -> str:
        """Name the device that measures, for its table.

        Args:
            threads: Threads of every session.
            provider: What sessions run on.
        """
        return fingerprint_device(threads, provider)
