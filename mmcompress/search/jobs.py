"""A run as a Ray job: the same command, on a cluster. No torch.

The package travels with the job, and so do the user's own modules that the spec names. The cluster
needs only what they depend on.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shlex
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import yaml
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from mmcompress.errors import ClusterError, SpecError
from mmcompress.version import PACKAGE_FOLDER

SPEC_FILE = "spec.yaml"
"""The spec in the working folder of a job."""

SPACE_FILE = "space.yaml"
"""The search space in the working folder of a job."""

READINGS_FILE = "device.json"
"""The readings of another device in the working folder of a job."""

SpecDocument = dict[str, Any]
"""A spec as its author wrote it, as plain data: `graph.load_spec.load_document`."""


def find_own_modules(spec: SpecDocument) -> list[Path]:
    """Find the files and folders of modules that `python:` sources and `plugins` name.

    Installed modules are left out: the cluster has them too.

    Raises:
        SpecError: A module is neither in the current folder nor importable.
    """
    site_folders = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    paths_by_module: dict[str, Path] = {}
    for place, module_name in _list_named_modules(spec):
        top_module = module_name.partition(".")[0]
        path = _locate_module(top_module, place)
        is_installed = any(path.resolve().is_relative_to(folder) for folder in site_folders)
        if not is_installed:
            paths_by_module[top_module] = path
    return list(paths_by_module.values())


def _list_named_modules(spec: SpecDocument) -> list[tuple[str, str]]:
    """List (place in the spec for messages, dotted module) of all modules a spec names."""
    named_modules: list[tuple[str, str]] = []
    for node in spec["nodes"].values():
        for key in ("source", "rewind"):
            scheme, _, location = str(node.get(key, "")).partition(":")
            if scheme == "python":
                module_name = location.partition(":")[0]
                named_modules.append((f"source '{scheme}:{location}'", module_name))
    for plugin in spec.get("plugins") or ():
        named_modules.append((f"plugin '{plugin}'", str(plugin)))
    return named_modules


def _locate_module(top_module: str, place: str) -> Path:
    """Return the file or folder of a top-level module; the current folder goes first."""
    folder = Path.cwd() / top_module
    file = folder.with_suffix(".py")
    for path in (folder, file):
        if path.exists():
            return path
    try:
        module_spec = importlib.util.find_spec(top_module)
    except ValueError:
        module_spec = None
    if module_spec is None or not module_spec.origin:
        raise SpecError(f"{place}: no module '{top_module}' here to send along")
    origin = Path(module_spec.origin)
    is_package = bool(module_spec.submodule_search_locations)
    return origin.parent if is_package else origin


def submit_run(
    spec: SpecDocument,
    address: str,
    *,
    folder: str,
    space: str | Path,
    resume: bool,
    log: TextIO,
) -> int:
    """Submit a run as a job and follow its log to the end.

    Spec, search space, readings and the user's own modules are uploaded.

    Args:
        spec: The spec; local names in it are absolute.
        address: URL of the job server.
        folder: Run folder, on storage that the cluster sees.
        space: File of the search space.
        resume: Whether the run goes on with what is in its folder.
        log: Receives the log of the job as it grows.

    Returns:
        The exit code of the run.

    Raises:
        ClusterError: No job server answers, or the connection to it breaks off.
        SpecError: A file or module that the spec names is missing.
    """
    client = _connect_to_server(address)
    target_folder = Path(folder).resolve()
    if not Path(space).is_file():
        raise SpecError(f"{space}: no such search space")
    with tempfile.TemporaryDirectory() as work_folder:
        _fill_work_folder(Path(work_folder), spec, space=Path(space))
        job_id = client.submit_job(
            entrypoint=_make_command_line(target_folder, resume=resume),
            runtime_env={"working_dir": work_folder, "py_modules": [str(PACKAGE_FOLDER)]},
        )
        log.write(f"job {job_id}\n")
        status = _follow_log(client, job_id, log=log)
    exit_code = client.get_job_info(job_id).driver_exit_code
    if exit_code is None:
        return 0 if status == JobStatus.SUCCEEDED else 1
    return exit_code


def _connect_to_server(address: str) -> JobSubmissionClient:
    """Connect to a job server."""
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, RayError) as error:
        reason = str(error).splitlines()[0]
        raise ClusterError(f"no job server answers at {address}: {reason}") from error


def _fill_work_folder(work_folder: Path, spec: SpecDocument, *, space: Path) -> None:
    """Write everything a job needs into the folder that is uploaded."""
    measure = spec.get("measure") or {}
    readings = measure.get("readings")
    if readings:
        if not Path(readings).is_file():
            raise SpecError(f"measure.readings: {readings}: no such file")
        shutil.copy(readings, work_folder / READINGS_FILE)
        spec = {**spec, "measure": {**measure, "readings": READINGS_FILE}}
    spec_text = yaml.safe_dump(spec, sort_keys=False)
    (work_folder / SPEC_FILE).write_text(spec_text, encoding="utf-8")
    shutil.copy(space, work_folder / SPACE_FILE)
    ignore_caches = shutil.ignore_patterns("__pycache__", ".*")
    for path in find_own_modules(spec):
        if path.is_dir():
            shutil.copytree(path, work_folder / path.name, ignore=ignore_caches)
        else:
            shutil.copy(path, work_folder)


def _make_command_line(target_folder: Path, *, resume: bool) -> str:
    """Make the shell line of a job; it runs in the uploaded folder."""
    arguments = ["run", SPEC_FILE, "--out", str(target_folder), "--space", SPACE_FILE]
    if resume:
        arguments.append("--resume")
    parent_folder = shlex.quote(str(target_folder.parent))
    command = f"python -m mmcompress.cli {shlex.join(arguments)}"
    return f"mkdir -p {parent_folder} && exec {command}"


def _follow_log(client: JobSubmissionClient, job_id: str, *, log: TextIO) -> JobStatus:
    """Pass on the log of a job until it ends, and return how it ended.

    Raises:
        ClusterError: The connection broke off.
    """
    try:
        asyncio.run(_copy_log(client, job_id, log=log))
    except (RuntimeError, aiohttp.ClientError) as error:
        raise _make_log_error(job_id, str(error)) from error
    status = client.get_job_status(job_id)
    if not status.is_terminal():
        raise _make_log_error(job_id, "the connection was closed")
    return status


async def _copy_log(client: JobSubmissionClient, job_id: str, *, log: TextIO) -> None:
    """Write the log of a job, piece by piece as it grows."""
    async for piece in client.tail_job_logs(job_id):
        log.write(piece)
        log.flush()


def _make_log_error(job_id: str, reason: str) -> ClusterError:
    """Make the error for a log that broke off; the job itself knows nothing of it."""
    return ClusterError(
        f"the log of job {job_id} broke off: {reason}; the job may go on: see `ray job status`"
    )
