"""The processor this runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")
IDENTITY = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
"""What tells processors of one name, or of none, apart."""


def describe_cpu() -> dict[str, Any]:
    """Model name, cores this process may use, and the instruction sets that decide the speed of inference."""
    name, flags, identity = platform.processor() or platform.machine(), set(), {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
            if key.strip() in IDENTITY:
                identity[key.strip()] = value.strip()
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "name": name,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": cores,
        "flags": [f for f in FLAGS if f in flags],
        "identity": [identity[k] for k in IDENTITY if k in identity],
    }
