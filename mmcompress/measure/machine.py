"""What a figure was measured on and with: CPU, its flags, versions, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

from mmcompress import __version__
from mmcompress.runtime.cpu import describe_cpu

PACKAGES = ("torch", "open_clip_torch", "transformers", "ray", "optuna", "onnx", "onnxruntime", "numpy")


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "mmcompress": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_fingerprint(threads: int) -> str:
    """Names a device for its table: CPU, threads and the version of ONNX Runtime."""
    facts = {"cpu": describe_cpu(), "threads": threads, "onnxruntime": package_versions().get("onnxruntime")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def git_commit() -> str:
    """The commit of this checkout, marked when it was changed; empty outside one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return ""
    try:
        run = lambda *a: subprocess.run(["git", *a], cwd=here, capture_output=True, text=True, timeout=10).stdout
        return run("rev-parse", "HEAD").strip() + ("-dirty" if run("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""
