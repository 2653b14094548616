"""What this process runs on: processor, package versions, commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import onnxruntime

from mmcompress.registry import PROVIDERS
from mmcompress.version import CHECKOUT_FOLDER, __version__

REPORTED_CPU_FLAGS = (
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
"""Instruction sets that decide the speed of inference, as Linux names them."""

INT8_CPU_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Those of them that multiply int8."""

IDENTITY_KEYS = (
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "CPU implementer",
    "CPU part",
    "CPU revision",
)
"""Keys of /proc/cpuinfo that tell processors of one name, or of no name, apart."""

REPORTED_PACKAGES = (
    "torch",
    "open_clip_torch",
    "transformers",
    "ray",
    "optuna",
    "onnx",
    "onnxruntime",
    "numpy",
)
"""Packages whose versions stand beside every figure."""

CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where Linux keeps what bounds the processes of a container."""

GIT_TIMEOUT_SECONDS = 10
"""Seconds: a file system that hangs must not hang a run."""


def describe_cpu() -> dict[str, Any]:
    """Describe the processor, as JSON-ready facts.

    Returns:
        `name`, `machine`, `system`; `cores` that this process may use; `flags` that decide the
        speed of inference; `identity`, what tells processors of one name apart. Without
        /proc/cpuinfo the last two are empty. In a container that bounds the processors, `quota` is
        how many of them it may use.
    """
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    identity: dict[str, str] = {}
    for key, value in _read_cpuinfo():
        if key == "model name":
            name = value
        if key in ("flags", "Features"):
            flags = set(value.split())
        if key in IDENTITY_KEYS:
            identity[key] = value
    reported_flags = [flag for flag in REPORTED_CPU_FLAGS if flag in flags]
    identity_values = [identity[key] for key in IDENTITY_KEYS if key in identity]
    facts = {
        "name": name,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": count_cores(),
        "flags": reported_flags,
        "identity": identity_values,
    }
    quota = read_cpu_quota()
    if quota is not None:
        facts["quota"] = quota
    return facts


def _read_cpuinfo() -> list[tuple[str, str]]:
    """Read the lines of /proc/cpuinfo as (key, value); none where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    entries: list[tuple[str, str]] = []
    for line in text.splitlines():
        key, _, value = line.partition(":")
        entries.append((key.strip(), value.strip()))
    return entries


def count_cores() -> int:
    """Count the cores that this process may use; a container may have fewer than the machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota = read_cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def read_cpu_quota(folder: Path | None = None) -> float | None:
    """Read how many processors a container may use, in the long run.

    Both forms of Linux are known: `cpu.max` of its second version of control groups, and
    `cpu.cfs_quota_us` of the first (https://docs.kernel.org/admin-guide/cgroup-v2.html).

    Args:
        folder: The folder of the control groups; by default that of the system.

    Returns:
        Processors, maybe a broken number; None where nothing bounds them.
    """
    folder = folder or CONTROL_GROUPS
    try:
        quota, _, period = (folder / "cpu.max").read_text(encoding="utf-8").strip().partition(" ")
    except OSError:
        try:
            quota = (folder / "cpu/cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu/cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        # `max`, or -1: no bound.
        return None
    return int(quota) / int(period)


def list_package_versions() -> dict[str, str]:
    """List the versions of Python, of mmcompress, and of the packages that are installed."""
    versions = {"python": platform.python_version(), "mmcompress": __version__}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def fingerprint_device(threads: int, provider: str = "cpu") -> str:
    """Name a device for its table.

    Args:
        threads: Threads of a session.
        provider: What sessions run on.

    Returns:
        16 hexadecimal digits that change with the processor, the threads, the version of ONNX
        Runtime, and with a provider beside the processor.
    """
    facts = {
        "cpu": describe_cpu(),
        "threads": threads,
        "onnxruntime": list_package_versions().get("onnxruntime"),
    }
    if provider != "cpu":
        # The name of the processor alone stays what it was.
        facts["provider"] = [provider, _find_provider_version(provider)]
        facts["accelerators"] = _list_accelerators()
    facts_json = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(facts_json.encode()).hexdigest()[:16]


def _list_accelerators() -> list[list[str]]:
    """List what tells the GPUs and NPUs of this machine apart, as ONNX Runtime finds them."""
    if not hasattr(onnxruntime, "get_ep_devices"):
        return []
    found: set[tuple[str, ...]] = set()
    for device in onnxruntime.get_ep_devices():
        hardware = device.device
        if hardware.type != onnxruntime.OrtHardwareDeviceType.CPU:
            name = dict(hardware.metadata).get("Description", "")
            identity = (hardware.vendor_id, hardware.device_id)
            found.add((hardware.vendor, *map(str, identity), name))
    return [list(facts) for facts in sorted(found)]


def _find_provider_version(provider: str) -> str:
    """Return the version of the package that brings a provider; empty where it is unknown."""
    distribution = PROVIDERS.get_fact(provider, "distribution") if provider in PROVIDERS else None
    try:
        return importlib.metadata.version(distribution or "")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""


def read_git_commit() -> str:
    """Read the commit of this checkout.

    Returns:
        The hash, with `-dirty` when tracked files were changed; empty outside a checkout or without
        git.
    """
    if not (CHECKOUT_FOLDER / ".git").exists():
        return ""
    try:
        commit = _run_git(["rev-parse", "HEAD"])
        changes = _run_git(["status", "--porcelain", "-uno"])
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}-dirty" if changes else commit


def _run_git(arguments: list[str]) -> str:
    """Run git in the checkout, and return what it prints."""
    completed_process = subprocess.run(
        ["git", *arguments],
        cwd=CHECKOUT_FOLDER,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=GIT_TIMEOUT_SECONDS,
    )
    return completed_process.stdout.strip()
