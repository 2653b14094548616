"""A run as a Ray job: the same command, on a cluster.

The package travels with the job, and so do modules that models of the user's own come from; the cluster needs only what
they depend on.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mmcompress.errors import ClusterError, MissingPackage, SpecError
from mmcompress.version import PACKAGE_FOLDER


def find_own_modules(spec: dict[str, Any]) -> list[Path]:
    """Files and folders of the modules that `python:` sources and `plugins` name, but for installed ones.

    Raises `SpecError`.
    """
    installed = [Path(sysconfig.get_path(k)).resolve() for k in ("purelib", "platlib")]
    found: dict[str, Path] = {}
    parts = [
        str(node.get(key, "")).partition(":")
        for node in spec["nodes"].values()
        for key in ("source", "rewind")
    ]
    named = [
        (f"source '{kind}:{name}'", name.partition(":")[0])
        for kind, _, name in parts
        if kind == "python"
    ]
    named += [(f"plugin '{name}'", str(name)) for name in spec.get("plugins") or ()]
    for what, name in named:
        top = name.partition(".")[0]
        here = Path.cwd() / top
        place = next((p for p in (here, here.with_suffix(".py")) if p.exists()), None)
        if place is None:
            try:
                known = importlib.util.find_spec(top)
            except ValueError:
                known = None
            if known is None or not known.origin:
                raise SpecError(f"{what}: no module '{top}' here to send along")
            place = (
                Path(known.origin).parent
                if known.submodule_search_locations
                else Path(known.origin)
            )
        if not any(place.resolve().is_relative_to(at) for at in installed):
            found[top] = place
    return list(found.values())


def submit_run(
    spec: dict[str, Any],
    address: str,
    *,
    folder: str,
    space: str | Path,
    resume: bool,
    echo: Callable[[str], None],
) -> int:
    """Submit, follow the log, and return the exit code of the run. Raises `ClusterError` when the server is away.

    The spec (`spec.loader.document`) and the search space are uploaded; the run folder is a path
    on storage that the cluster sees.
    """
    try:
        from ray.exceptions import RayError
        from ray.job_submission import JobStatus, JobSubmissionClient
    except ImportError as e:
        raise MissingPackage("ray[default]", "compress") from e
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, RayError) as e:
        raise ClusterError(f"no job server answers at {address}: {str(e).splitlines()[0]}") from e
    target = Path(folder).resolve()
    if not Path(space).is_file():
        raise SpecError(f"{space}: no such search space")
    with tempfile.TemporaryDirectory() as work:
        measure = spec.get("measure") or {}
        if readings := measure.get("device"):
            if not Path(readings).is_file():
                raise SpecError(f"measure.readings: {readings}: no such file")
            shutil.copy(readings, Path(work) / "device.json")
            spec = {**spec, "measure": {**measure, "device": "device.json"}}
        (Path(work) / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        for place in find_own_modules(spec):
            if place.is_dir():
                shutil.copytree(
                    place,
                    Path(work) / place.name,
                    ignore=shutil.ignore_patterns("__pycache__", ".*"),
                )
            else:
                shutil.copy(place, work)
        command = ["run", "spec.yaml", "--out", str(target)]
        shutil.copy(space, Path(work) / "space.yaml")
        command += ["--space", "space.yaml", *(["--resume"] if resume else [])]
        line = f"mkdir -p {shlex.quote(str(target.parent))} && exec python -m mmcompress.cli {shlex.join(command)}"
        job = client.submit_job(
            entrypoint=line,
            runtime_env={"working_dir": work, "py_modules": [str(PACKAGE_FOLDER)]},
        )
        echo(f"job {job}\n")
        shown = 0
        while True:
            status = client.get_job_status(job)
            logs = client.get_job_logs(job)
            echo(logs[shown:])
            shown = len(logs)
            if status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED):
                break
            time.sleep(1.0)
    code = client.get_job_info(job).driver_exit_code
    return code if code is not None else int(status != JobStatus.SUCCEEDED)
