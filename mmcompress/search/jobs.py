"""A run as a Ray job: the same command, on a cluster.

The package travels with the job, so the cluster needs only its dependencies.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from mmcompress.errors import MissingPackage, MmcompressError
from mmcompress.records import plain
from mmcompress.spec.schema import Spec

PACKAGE = Path(__file__).resolve().parents[1]


def submit_run(
    spec: Spec, address: str, folder: str, space: str | Path, resume: bool, echo: Callable[[str], None]
) -> int:
    """Submit, follow the log, and return the exit code of the run. Raises `MmcompressError` when the server is away.

    The spec (overrides applied, local names made absolute) and the search space are uploaded; the run folder is a path
    on storage that the cluster sees.
    """
    try:
        from ray.job_submission import JobStatus, JobSubmissionClient
    except ImportError as e:
        raise MissingPackage("ray[default]", "compress") from e
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as e:
        raise MmcompressError(f"no job server answers at {address}: {e}") from e
    target = Path(folder).resolve()
    code_file = target.with_name(target.name + ".exit")
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "spec.yaml").write_text(yaml.safe_dump(plain(spec), sort_keys=False))
        command = ["run", "spec.yaml", "--out", str(target)]
        shutil.copy(space, Path(work) / "space.yaml")
        command += ["--space", "space.yaml", *(["--resume"] if resume else [])]
        code_file.unlink(missing_ok=True)
        line = f"mkdir -p {shlex.quote(str(target.parent))}; python -m mmcompress.cli {shlex.join(command)}; code=$?; "
        line += f"echo $code > {shlex.quote(str(code_file))}; exit $code"
        job = client.submit_job(
            entrypoint=line,
            runtime_env={"working_dir": work, "py_modules": [str(PACKAGE)]},
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
    if code_file.is_file():
        return int(code_file.read_text().strip() or 1)
    return 0 if status == JobStatus.SUCCEEDED else 1
