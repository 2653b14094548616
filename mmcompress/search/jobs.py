"""A run as a Ray job: the same command, on a cluster. No torch.

The package travels with the job, and so do the user's own modules that the spec names. The cluster
needs only what they depend on.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import shlex
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import aiohttp
import yaml
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from mmcompress.errors import ClusterError, DataError, JobLost, SpecError, shorten, suggest_nearest
from mmcompress.runtime.addresses import hide_password
from mmcompress.runtime.environment import BYTES_PER_MB
from mmcompress.runtime.quiet_loggers import silence_logger
from mmcompress.search.cluster_nodes import list_runtime_env, list_versions
from mmcompress.spec.schema import RuntimeEnv
from mmcompress.spec.storage_urls import is_remote
from mmcompress.version import PACKAGE_FOLDER
from mmcompress.workspace.command_line import SENT_AS_VARIABLE
from mmcompress.workspace.folder import LOCK_FILE, RunFolder
from mmcompress.workspace.mirror_run import fetch_run

SPEC_FILE = "spec.yaml"
"""The spec in the working folder of a job."""

SPACE_FILE = "space.yaml"
"""The search space in the working folder of a job."""

READINGS_FILE = "device.json"
"""The readings of another device in the working folder of a job."""

FOLDER_KEY = "mmcompress.folder"
"""Metadata of a job: its run folder, by which the same run is known again."""

NO_AGENT_YET = "No available agent"
"""What the server of a cluster answers whose nodes have just begun."""

MAX_AGENT_SECONDS = 60.0
"""Seconds that the nodes of a cluster are waited for."""

SECONDS_BETWEEN_TRIES = 1.0
"""Seconds between two tries to send a job."""


EMBEDDED_WEIGHTS = "*.safetensors"
"""Files of the package that are large."""

MAX_UPLOAD_MB = 100
"""Megabytes that go along with a job: code, and no data."""


STOPPED_EXIT_CODE = 143
"""Exit code of a job that was stopped: that of a process which SIGTERM ended."""

SETTINGS_KEY = "mmcompress_settings"
"""Key of a job's metadata: a hash of the spec and the space that it was sent with."""

REFUSED_TOKEN = ("Unauthorized", "Forbidden", "Authentication")
"""Words of a job server that does not let somebody in."""

NOTHING_PREPARED = RuntimeEnv()
"""What Ray prepares on the nodes where a spec asks for nothing."""


UPLOAD_LOGGER = "ray.dashboard.modules.dashboard_sdk"
"""Ray's logger of uploads."""

PACKAGE_LOGGER = "ray._private.runtime_env.packaging"
"""Ray's logger of what is packed for an upload."""

JOB_LOGGER = "ray.dashboard.modules.job.sdk"
"""Ray's logger of web sockets that are closed."""


def ignore_job(job_id: str) -> None:
    """Hear the id of a job, and do nothing."""


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


@silence_logger(UPLOAD_LOGGER)
@silence_logger(PACKAGE_LOGGER)
def submit_run(
    spec: SpecDocument,
    address: str,
    *,
    folder: str,
    space: str | Path,
    log: TextIO,
    tell_job: Callable[[str], None] = ignore_job,
    runtime_env: RuntimeEnv = NOTHING_PREPARED,
    sent_as: str = "",
) -> int:
    """Submit a run as a job and follow its log to the end.

    Spec, search space, readings and the user's own modules are uploaded. A job that runs in the
    same folder is followed, and none is sent. Where the folder holds a run of the same spec, the
    job goes on with it, whichever cluster began it.

    Args:
        spec: The spec; local names in it are absolute.
        address: URL of the job server.
        folder: Run folder, on storage that the cluster sees, or a storage URL.
        space: File of the search space.
        log: Receives the log of the job as it grows.
        tell_job: Hears the id of the job before its log is followed.
        runtime_env: What Ray prepares on the nodes, beside what is uploaded.
        sent_as: The command line that sends it, for the messages of the job.

    Returns:
        The exit code of the run.

    Raises:
        ClusterError: No job server answers, it takes no job, or the connection to it breaks off.
        SpecError: A file or module that the spec names is missing.
    """
    # A storage URL is the same everywhere.
    target_folder = folder if is_remote(folder) else str(Path(folder).resolve())
    if not Path(space).is_file():
        raise SpecError(f"{space}: no such search space")
    with tempfile.TemporaryDirectory() as scratch:
        work_folder = Path(scratch) / "work"
        work_folder.mkdir()
        _fill_work_folder(work_folder, spec, space=Path(space))
        _check_upload(work_folder)
        package = _copy_package(Path(scratch), spec)
        client = connect_to_server(address)
        sent = _list_jobs_of_folder(client, target_folder)
        running = [job for job in sent if not job.status.is_terminal()]
        settings = _hash_settings(spec, Path(space))
        if running:
            job_id = str(running[0].submission_id)
            sent_settings = (running[0].metadata or {}).get(SETTINGS_KEY, settings)
            if sent_settings != settings:
                raise ClusterError(
                    f"job {job_id} runs in {target_folder} with other settings: follow it by "
                    f"`mmcompress job logs {job_id} --address {hide_password(address)}`, stop it "
                    "first, or name another --out"
                )
            log.write(f"job {job_id} runs in this folder already; this is its log\n")
        else:
            job_id = _submit_job(
                client,
                entrypoint=_make_command_line(target_folder),
                sent_as=sent_as,
                work_folder=work_folder,
                package=package,
                metadata={FOLDER_KEY: target_folder, SETTINGS_KEY: settings},
                runtime_env=runtime_env,
            )
            log.write(f"job {job_id}\n")
        log.flush()
        tell_job(job_id)
        return follow_job(client, job_id, log=log)


def _hash_settings(spec: SpecDocument, space: Path) -> str:
    """Return a hash of what a run is asked for."""
    text = json.dumps(spec, sort_keys=True, default=str) + space.read_text(encoding="utf-8")
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _list_jobs_of_folder(client: JobSubmissionClient, folder: str) -> list[JobDetails]:
    """List the jobs that were sent for a run folder, the latest first."""
    jobs = [
        job
        for job in client.list_jobs()
        if job.submission_id and (job.metadata or {}).get(FOLDER_KEY) == folder
    ]
    return sorted(jobs, key=_get_start_time, reverse=True)


def _get_start_time(job: JobDetails) -> int:
    """Return when a job was begun, in ms; 0 where it was not."""
    return job.start_time or 0


def _submit_job(
    client: JobSubmissionClient,
    *,
    entrypoint: str,
    sent_as: str,
    work_folder: Path,
    package: Path,
    metadata: dict[str, str],
    runtime_env: RuntimeEnv,
) -> str:
    """Send a job; return its id. A cluster that has just begun is waited for.

    Raises:
        ClusterError: The server does not take the job.
    """
    give_up_at = time.monotonic() + MAX_AGENT_SECONDS
    environment = {
        "working_dir": str(work_folder),
        "py_modules": [str(package)],
        **list_runtime_env(runtime_env, expected=list_versions()),
    }
    # In the command line it would stand in the log.
    environment["env_vars"] = {SENT_AS_VARIABLE: sent_as, **environment.get("env_vars", {})}
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                runtime_env=environment,
                metadata=metadata,
            )
        except RuntimeError as error:
            if NO_AGENT_YET not in str(error) or time.monotonic() > give_up_at:
                reason = str(error).strip().splitlines()[-1]
                raise ClusterError(f"the job server did not take the job: {reason}") from error
            time.sleep(SECONDS_BETWEEN_TRIES)


@silence_logger(JOB_LOGGER)
def follow_job(client: JobSubmissionClient, job_id: str, *, log: TextIO) -> int:
    """Pass on the log of a job until it ends.

    Args:
        client: The job server.
        job_id: The job.
        log: Receives its log as it grows.

    Returns:
        The exit code of the run.

    Raises:
        JobLost: The connection breaks off.
    """
    status = _follow_log(client, job_id, log=log)
    try:
        exit_code = client.get_job_info(job_id).driver_exit_code
    except (RuntimeError, OSError) as error:
        raise _make_log_error(job_id, hide_password(str(error))) from error
    if status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    if exit_code is None:
        return 0 if status == JobStatus.SUCCEEDED else 1
    return exit_code


def get_job(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Return what the server knows of a job.

    Raises:
        ClusterError: The server knows no such job.
    """
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        known = [str(job.submission_id) for job in client.list_jobs() if job.submission_id]
        hint = suggest_nearest(job_id, known) if known else "the server has no jobs"
        raise ClusterError(f"no job '{shorten(job_id)}': {hint}") from error


def fetch_result(client: JobSubmissionClient, job_id: str, *, out: Path) -> Path:
    """Copy the run folder of a job.

    Ray's job server hands out no files: the folder must lie at a storage URL, or where this machine
    sees it, too.

    Args:
        client: The job server.
        job_id: The job.
        out: The folder to write; it must not exist.

    Returns:
        The folder that was written.

    Raises:
        ClusterError: The job is unknown, or its folder is not seen from here.
        DataError: The folder to write exists.
    """
    job = get_job(client, job_id)
    folder = (job.metadata or {}).get(FOLDER_KEY)
    if folder is None:
        raise ClusterError(f"job '{job_id}' was not sent by `mmcompress submit`")
    if out.exists():
        raise DataError(f"{out}: exists already; name another --out")
    if is_remote(folder):
        fetch_run(folder, out)
        return out
    if Path(folder).parent.is_dir() and not Path(folder).exists():
        raise ClusterError(
            f"{folder}: there is no such folder: job '{job_id}' has written nothing yet, or it "
            "was moved"
        )
    if not Path(folder).is_dir():
        host = job.driver_node_id or "the cluster"
        raise ClusterError(
            f"the run folder of job '{job_id}' is {folder} on node {host}; this machine does not "
            "see it. Copy it from there, or give `submit --out` a folder that both see, or a "
            "storage URL"
        )
    ignore = shutil.ignore_patterns("teacher_outputs", "scratch", LOCK_FILE)
    shutil.copytree(folder, out, ignore=ignore)
    return out


def is_fetched_whole(folder: Path) -> bool:
    """Return whether a run folder that was copied holds a finished run."""
    run_folder = RunFolder(path=folder)
    return run_folder.is_finished() or bool(run_folder.list_finished_subfolders())


def connect_to_server(address: str) -> JobSubmissionClient:
    """Connect to a job server.

    Raises:
        SpecError: The address does not say how to reach it.
        ClusterError: Nobody answers there.
    """
    shown_address = hide_password(address)
    if "://" not in address:
        # Ray takes it for that of a cluster's own port, and waits there for minutes.
        raise SpecError(f"--address {shown_address}: expected http://HOST:8265")
    try:
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, RayError) as error:
        reason = hide_password(str(error)).splitlines()[0]
        if any(word in reason for word in REFUSED_TOKEN):
            raise ClusterError(
                f"the job server at {shown_address} does not let this machine in ({reason}): "
                "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, a file with its token"
            ) from error
        raise ClusterError(
            f"no job server answers at {shown_address}: is the head of the cluster up, and its "
            f"dashboard reached from here? ({reason})"
        ) from error


def list_missing_folders(spec: SpecDocument) -> list[str]:
    """List the local sources and data of a spec that this machine does not see, for a warning.

    The cluster may see them: they are not sent along.

    Args:
        spec: The spec; local names in it are absolute.
    """
    named = {f"nodes.{name}.source": node.get("source") for name, node in spec["nodes"].items()}
    options = (spec.get("data") or {}).get("options") or {}
    named["data.options.path"] = options.get("path")
    missing: list[str] = []
    for key, value in named.items():
        if isinstance(value, str) and value.startswith("/") and not Path(value).exists():
            missing.append(f"{key}: {value}")
    return missing


def _copy_package(work_folder: Path, spec: SpecDocument) -> Path:
    """Copy this package for the cluster, without embedded weights that a spec does not name."""
    sources = [str(node.get("source", "")) for node in spec["nodes"].values()]
    ignored = ["__pycache__"]
    if not any(source.startswith("embedded:") for source in sources):
        ignored.append(EMBEDDED_WEIGHTS)
    copied = work_folder / PACKAGE_FOLDER.name
    shutil.copytree(PACKAGE_FOLDER, copied, ignore=shutil.ignore_patterns(*ignored))
    return copied


def _check_upload(work_folder: Path) -> None:
    """Check that what is sent along is small: Ray refuses much, and says nothing of where it lies.

    Raises:
        SpecError: It is too large.
    """
    sizes: dict[str, int] = {}
    for path in work_folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(work_folder).parts[0]
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    total_mb = sum(sizes.values()) / BYTES_PER_MB
    if total_mb > MAX_UPLOAD_MB:
        largest = max(sizes, key=sizes.__getitem__)
        largest_mb = sizes[largest] / BYTES_PER_MB
        raise SpecError(
            f"what goes along with the job takes {total_mb:.0f} MB, and at most "
            f"{MAX_UPLOAD_MB} MB are sent. '{largest}' has {largest_mb:.0f} MB of it. Keep data "
            "and weights on storage that the cluster sees, out of the folder of a module"
        )


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


def _make_command_line(target_folder: str) -> str:
    """Make the shell line of a job; it runs in the uploaded folder.

    The cluster that began a run may be lost, and a new one knows nothing of its jobs. So every job
    resumes; in a new folder this changes nothing.
    """
    arguments = ["run", SPEC_FILE, "--out", target_folder, "--space", SPACE_FILE, "--resume"]
    command = f"python -m mmcompress.cli {shlex.join(arguments)}"
    if is_remote(target_folder):
        return f"exec {command}"
    return f"mkdir -p {shlex.quote(str(Path(target_folder).parent))} && exec {command}"


def _follow_log(client: JobSubmissionClient, job_id: str, *, log: TextIO) -> JobStatus:
    """Pass on the log of a job until it ends, and return how it ended.

    Raises:
        JobLost: The connection broke off.
    """
    try:
        asyncio.run(_copy_log(client, job_id, log=log))
        status = client.get_job_status(job_id)
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        raise _make_log_error(job_id, hide_password(str(error))) from error
    if not status.is_terminal():
        raise _make_log_error(job_id, "the connection was closed")
    return status


async def _copy_log(client: JobSubmissionClient, job_id: str, *, log: TextIO) -> None:
    """Write the log of a job, piece by piece as it grows."""
    async for piece in client.tail_job_logs(job_id):
        log.write(piece)
        log.flush()


def _make_log_error(job_id: str, reason: str) -> JobLost:
    """Make the error for a log that broke off; the job itself knows nothing of it."""
    return JobLost(
        f"the log of job {job_id} broke off: {reason}; the job may go on: "
        f"see `mmcompress job status {job_id}`. The same command follows it again; "
        "where the cluster is lost, it goes on with the run on another one"
    )
