"""What a figure was measured on and with: CPU, its flags, versions, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from mmcompress import __version__

PACKAGES = ("torch", "open_clip_torch", "transformers", "ray", "optuna", "onnx", "onnxruntime", "numpy")
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


def cpu() -> dict[str, Any]:
    """Model name, cores this process may use, and the instruction sets that decide the speed of inference."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "name": name,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": cores,
        "flags": [f for f in FLAGS if f in flags],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "mmcompress": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint(threads: int) -> str:
    """Names a device for its table: CPU, threads and the version of ONNX Runtime."""
    facts = {"cpu": cpu(), "threads": threads, "onnxruntime": versions().get("onnxruntime")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def commit() -> str:
    """The commit of this checkout, marked when it was changed; empty outside one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10).stdout
        return run("rev-parse", "HEAD").strip() + ("-dirty" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""
