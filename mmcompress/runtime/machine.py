"""The processor this runs on."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from mmcompress.version import CHECKOUT_FOLDER, __version__

FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
)


IDENTITY = (
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "CPU implementer",
    "CPU part",
    "CPU revision",
)
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
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {
        "name": name,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": cores,
        "flags": [f for f in FLAGS if f in flags],
        "identity": [identity[k] for k in IDENTITY if k in identity],
    }


PACKAGES = (
    "torch",
    "open_clip_torch",
    "transformers",
    "ray",
    "optuna",
    "onnx",
    "onnxruntime",
    "numpy",
)


def list_package_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "mmcompress": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fingerprint_device(threads: int) -> str:
    """Names a device for its table: CPU, threads and the version of ONNX Runtime."""
    facts = {
        "cpu": describe_cpu(),
        "threads": threads,
        "onnxruntime": list_package_versions().get("onnxruntime"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_git_commit() -> str:
    """The commit of this checkout, marked when it was changed; empty outside one."""
    here = CHECKOUT_FOLDER
    if not (here / ".git").exists():
        return ""
    try:
        run = lambda *a: (
            subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10).stdout
        )
        return run("rev-parse", "HEAD").strip() + (
            "-dirty" if run("status", "--porcelain", "-uno").strip() else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""
