"""What a structure weighs: parameters from its blocks, size and memory calibrated on whole exports."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcompress.measure.predict import LinearFit
from mmcompress.records import Block, Candidate

MB = 1e6
MEMORY_PROBE = """\
import pathlib, resource, sys
from mmcompress.runtime import load
if len(sys.argv) > 1:
    pipeline = load(sys.argv[1])
    pipeline(**pipeline.noise())
status = pathlib.Path("/proc/self/status")  # where there is one: the other figure counts the parent before the start
lines = status.read_text().splitlines() if status.exists() else []
peak = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
print(peak[0] if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 / MB for line in lines if line.startswith("VmHWM")), 0.0)


def release_memory() -> None:
    """Return to the system what was let go: the C library keeps freed memory of large models for itself."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure_memory_mb(bundle: Path | None = None) -> float:
    """Peak resident memory of a process that loads a bundle and answers once; without one, of the bare runtime."""
    release_memory()  # of large models, both processes must fit
    command = [sys.executable, "-c", MEMORY_PROBE, *([str(bundle)] if bundle else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return int(done.stdout.split()[-1]) / MB


@dataclass(frozen=True)
class Footprint:
    """Parameters, size and memory of any structure of one pipeline.

    `params`: of the dense nodes; `unit`: parameters that go with each unit of a block; `size`: megabytes of a node
    against its parameters in millions, by precision; `rest_mb`: files that are no models; `empty_mb`: the memory of the
    bare runtime, `per_mb`: what a megabyte of bundle takes beside it.
    """

    dense_params: dict[str, int]
    params_per_unit: dict[str, dict[str, float]]
    size_fits: dict[str, dict[str, LinearFit]]
    rest_mb: float = 0.0
    empty_mb: float = 0.0
    per_mb: float = 1.0
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    fp32_blocks: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """Blocks that stay in fp32, by node and precision."""

    def node_params(self, node: str, candidate: Candidate) -> float:
        kept = candidate.kept_units.get(node, {})
        return self.dense_params[node] - sum(
            each * (self.units[node][b] - kept.get(b, self.units[node][b]))
            for b, each in self.params_per_unit[node].items()
        )

    def total_params(self, candidate: Candidate) -> float:
        return sum(self.node_params(n, candidate) for n in self.dense_params)

    def size_mb(self, candidate: Candidate) -> float:
        total = self.rest_mb
        for n in self.dense_params:
            a = self.size_fits[n][candidate.precision[n]]
            total += a.base + a.scale * self.node_params(n, candidate) / 1e6
            whole = self.size_fits[n].get("fp32", a).scale - a.scale
            for b in self.fp32_blocks.get(n, {}).get(candidate.precision[n], ()):
                total += (
                    whole * self.params_per_unit[n][b] * candidate.kept_units.get(n, {}).get(b, self.units[n][b]) / 1e6
                )
        return total

    def memory_mb(self, candidate: Candidate) -> float:
        return self.empty_mb + self.per_mb * self.size_mb(candidate)


def count_params_per_unit(model: Any, block: Block) -> float:
    """Parameters that go with one unit of a block: rows of its writers, columns of its readers, all it passes."""
    if block.group == "tokens":
        return 0.0
    total = 0.0
    for w in block.writers:
        module = model.get_submodule(w.path)
        row = module.weight[0].numel() + (module.bias is not None)
        total += w.parts * w.width * row
    for path in block.per_channel:
        total += block.width * sum(p[0].numel() for p in model.get_submodule(path).parameters())
    for path in (block.reader, *block.extra_readers):
        total += block.width * model.get_submodule(path).weight[:, 0].numel()
    return total


def measure_footprint(
    models: Mapping[str, Any],
    size: dict[str, dict[str, LinearFit]],
    params: Mapping[str, int],
    bundle: Path,
    *,
    memory: Callable[[Path | None], float] = measure_memory_mb,
) -> Footprint:
    """The footprint of a pipeline from its models, calibrated sizes, and its dense bundle."""
    whole = sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) / MB
    in_nodes = sum(f.stat().st_size for n in models for f in (bundle / n).glob("*.onnx")) / MB
    empty = memory(None)
    return Footprint(
        dict(params),
        {n: {b.name: count_params_per_unit(m, b) for b in m.blocks} for n, m in models.items()},
        size,
        whole - in_nodes,
        empty,
        max(memory(bundle) - empty, 0.0) / whole,
        {n: {b.name: b.units for b in m.blocks} for n, m in models.items()},
    )
