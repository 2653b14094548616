"""Checks the environment that the tool runs in, without a spec: `mmcompress doctor`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import onnxruntime

from mmcompress.registry import OPTIONAL_PACKAGES
from mmcompress.runtime.cache import find_cache_fault, locate_cache_folder
from mmcompress.runtime.machine import describe_cpu, list_package_versions, read_cpu_quota

BYTES_PER_MB = 1e6
"""Bytes of a megabyte, as disks are sold."""

BYTES_PER_GB = 1e9
"""Bytes of a gigabyte."""

KB_OF_MEMINFO = 1024
"""Bytes of a unit of /proc/meminfo."""

MIN_PYTHON = (3, 11)
"""Oldest Python that the tool runs on."""

MIN_MEMORY_GB = 4.0
"""Memory that the shipped pipeline of small models takes, with two workers and some room."""

MIN_DISK_GB = 3.0
"""Disk that a run of it takes, with the outputs of the dense pipeline."""

MEMORY_FILE = Path("/proc/meminfo")
"""Memory of the machine; other systems than Linux have no such file."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    name: str
    """What was checked."""
    state: Literal["good", "note", "bad"]
    """`bad`: the tool can't do its work. `note`: worth knowing."""
    detail: str
    """What was found, and for a `bad` one what to do."""


def check_environment() -> list[Finding]:
    """Check versions, packages, processor, memory, disk and caches; one finding each."""
    checks: tuple[Callable[[], Finding], ...] = (
        check_python,
        check_packages,
        check_processor,
        check_quota,
        check_providers,
        check_memory,
        check_disk,
        check_cache,
    )
    return [check() for check in checks]


def check_python() -> Finding:
    """Check the version of Python."""
    versions = list_package_versions()
    detail = f"mmcompress {versions['mmcompress']} on Python {versions['python']}"
    if sys.version_info < MIN_PYTHON:
        needed = ".".join(str(part) for part in MIN_PYTHON)
        return Finding(name="python", state="bad", detail=f"{detail}; it needs {needed} or newer")
    return Finding(name="python", state="good", detail=detail)


def check_packages() -> Finding:
    """Check which optional packages are installed."""
    missing: dict[str, list[str]] = {}
    for module, package in OPTIONAL_PACKAGES.items():
        if find_spec(module) is None:
            missing.setdefault(package.extra, []).append(package.distribution)
    if not missing:
        return Finding(name="packages", state="good", detail="all optional packages are installed")
    parts: list[str] = []
    for extra, distributions in missing.items():
        names = sorted(set(distributions))
        verb = "is" if len(names) == 1 else "are"
        parts.append(f"{', '.join(names)} {verb} missing: pip install 'mmcompress[{extra}]'")
    is_bad = "compress" in missing
    if is_bad:
        parts.append("bundles run without them; nothing can be compressed")
    return Finding(name="packages", state="note", detail="; ".join(parts))


def check_processor() -> Finding:
    """Check the processor, and how it multiplies int8."""
    cpu = describe_cpu()
    cores = cpu["cores"]
    flags = [flag for flag in cpu["flags"] if "vnni" in flag or flag in ("amx_int8", "i8mm")]
    detail = f"{cpu['name']}, {cores} cores for this process"
    if flags:
        return Finding(name="processor", state="good", detail=f"{detail}; {', '.join(flags)}")
    return Finding(
        name="processor",
        state="note",
        detail=f"{detail}; it has no VNNI, so int8 gains less and weights have 7 bits",
    )


def check_quota(folder: Path | None = None) -> Finding:
    """Check whether a container bounds the processors.

    Args:
        folder: The folder of the control groups; by default that of the system.
    """
    quota = read_cpu_quota(folder)
    if quota is None:
        return Finding(name="quota", state="good", detail="no container bounds the processors")
    return Finding(
        name="quota",
        state="note",
        detail=f"this container may use {quota:g} cores; set measure.threads to no more than that",
    )


def check_providers() -> Finding:
    """Check what ONNX Runtime can run on."""
    providers = onnxruntime.get_available_providers()
    detail = f"ONNX Runtime {onnxruntime.__version__}: {', '.join(providers)}"
    if "CPUExecutionProvider" not in providers:
        return Finding(name="providers", state="bad", detail=f"{detail}; install onnxruntime")
    return Finding(name="providers", state="good", detail=detail)


def check_memory(file: Path = MEMORY_FILE) -> Finding:
    """Check the memory that is free.

    Args:
        file: The file with the memory of the machine.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return Finding(name="memory", state="note", detail="not known on this system")
    amounts: dict[str, float] = {}
    for line in lines:
        key, _, value = line.partition(":")
        amount = value.split()[:1]
        if amount and amount[0].isdigit():
            amounts[key] = int(amount[0]) * KB_OF_MEMINFO / BYTES_PER_GB
    free_gb = amounts.get("MemAvailable", 0.0)
    detail = f"{free_gb:.1f} of {amounts.get('MemTotal', 0.0):.1f} GB are free"
    if free_gb < MIN_MEMORY_GB:
        detail += f"; a run of small models takes about {MIN_MEMORY_GB:g}: use --workers 1"
        return Finding(name="memory", state="note", detail=detail)
    return Finding(name="memory", state="good", detail=detail)


def check_disk(folder: Path | None = None) -> Finding:
    """Check the disk of the folder that runs are written into.

    Args:
        folder: The folder; by default the one that the command starts in.
    """
    folder = folder or Path.cwd()
    free_gb = shutil.disk_usage(folder).free / BYTES_PER_GB
    detail = f"{free_gb:.1f} GB are free in {folder}"
    if not os.access(folder, os.W_OK):
        detail += "; it can't be written: name another one with --out"
        return Finding(name="disk", state="bad", detail=detail)
    if free_gb < MIN_DISK_GB:
        detail += "; keep fewer outputs with --set distill.store_gb=0"
        return Finding(name="disk", state="note", detail=detail)
    return Finding(name="disk", state="good", detail=detail)


def check_cache() -> Finding:
    """Check the folder that device tables are kept in."""
    fault = find_cache_fault()
    if fault:
        return Finding(name="cache", state="note", detail=f"{fault}; device tables are not kept")
    return Finding(
        name="cache", state="good", detail=f"device tables are kept in {locate_cache_folder()}"
    )
