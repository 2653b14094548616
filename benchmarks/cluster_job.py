"""Run a pipeline as a job on a cluster of three nodes, kill it twice, and see it meet its target.

    python benchmarks/cluster_job.py pipelines/clip_captioner.yaml --out runs/cluster_job \
        > reports/cluster_job.md

The cluster is one head and two worker nodes of one CPU each: three raylets on this machine. Two
workers share the training. The process of the run is killed once in its search and once in its
training (SIGKILL). After each kill the same `mmcompress submit` is called again. The report says
when each job began and ended, and what of the work before the kill was still there. Its exit code
is 0 where the target is met.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from ray._common.network_utils import find_free_port
from ray.cluster_utils import Cluster

from mmcompress.results.records import Summary
from mmcompress.runtime.machine import describe_cpu, read_git_commit
from mmcompress.search.study import open_study, read_finished_trials
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder

LOOPBACK = "127.0.0.1"
"""Everything of the cluster listens here."""
WORKER_NODES = 2
"""Nodes that evaluate trials and train."""
OBJECT_STORE_BYTES = 1_000_000_000
"""Bytes of the object store of each node. It must hold the models of the killed job, too."""
TRIALS_BEFORE_KILL = 8
"""Finished trials after which the search is killed."""
SECONDS_BETWEEN_LOOKS = 0.5
"""Seconds between two looks at the run folder."""
MAX_SECONDS = 3600.0
"""Seconds after which a job is given up."""
SNAPSHOT = "training/checkpoint_manager_snapshot.json"
"""Where Ray Train lists a checkpoint once it is whole."""


@dataclass(frozen=True, kw_only=True)
class FinishedJob:
    """What became of one job."""

    killed_in: str
    """The stage that it was killed in; empty: it ended by itself."""
    seconds: float
    """Seconds from the call of `submit` to its end."""
    exit_code: int
    """What `submit` gave back."""
    trials: int
    """Finished trials in the journal at its end."""


class SmallCluster:
    """A head without CPUs and some worker nodes of one CPU each."""

    def __init__(self) -> None:
        # Else Ray's agent looks for the cluster at the address of the network, where it is not.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # A job calls `python`: the one that runs this file.
        python_folder = Path(sys.executable).parent
        os.environ["PATH"] = f"{python_folder}{os.pathsep}{os.environ['PATH']}"
        self.port = find_free_port()
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": OBJECT_STORE_BYTES,
                "include_dashboard": True,
                "node_ip_address": LOOPBACK,
                "dashboard_host": LOOPBACK,
                "dashboard_port": self.port,
                "dashboard_agent_listen_port": find_free_port(),
            },
        )
        for _ in range(WORKER_NODES):
            self.cluster.add_node(
                num_cpus=1,
                node_ip_address=LOOPBACK,
                object_store_memory=OBJECT_STORE_BYTES,
            )

    @property
    def address(self) -> str:
        """Where its job server listens."""
        return f"http://{LOOPBACK}:{self.port}"


def count_trials(folder: RunFolder) -> int:
    """Count the finished trials of a run; 0 while its journal can't be read."""
    if not folder.study.exists():
        return 0
    return len(read_finished_trials(open_study(folder.study)))


def is_searching(folder: RunFolder) -> bool:
    """Return whether the search has some finished trials."""
    if not folder.study.exists():
        return False
    # The journal is only counted by its lines: the run writes to it.
    return len(folder.study.read_bytes().splitlines()) > TRIALS_BEFORE_KILL


def is_training(folder: RunFolder) -> bool:
    """Return whether the shared training has written a checkpoint."""
    return (folder.shared_training / SNAPSHOT).exists()


def find_run_process(folder: RunFolder) -> psutil.Process | None:
    """Find the process of the run that works in a folder."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(folder) in words and "run" in words and "submit" not in words:
            return process
    return None


def run_job(
    command: Sequence[str],
    folder: RunFolder,
    *,
    killed_in: str = "",
    is_due: Callable[[RunFolder], bool] | None = None,
) -> FinishedJob:
    """Submit a run and follow it; kill its process when that is due.

    Args:
        command: The command line of `submit`.
        folder: The run folder.
        killed_in: The stage that it is killed in.
        is_due: Whether the process is to be killed now; None lets it end.
    """
    start = time.monotonic()
    submitted = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    while submitted.poll() is None:
        if time.monotonic() - start > MAX_SECONDS:
            submitted.kill()
        if is_due is not None and is_due(folder):
            process = find_run_process(folder)
            if process is not None:
                for child in process.children(recursive=True):
                    child.send_signal(signal.SIGKILL)
                process.send_signal(signal.SIGKILL)
                is_due = None
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return FinishedJob(
        killed_in=killed_in,
        seconds=time.monotonic() - start,
        exit_code=submitted.returncode,
        trials=count_trials(folder),
    )


def format_report(jobs: Sequence[FinishedJob], summary: Summary, *, arguments: str) -> str:
    """Format the Markdown page."""
    verdict = "met" if summary.target.met else "MISSED"
    lines = [
        "# A job on three nodes that was killed twice",
        "",
        f"`python benchmarks/cluster_job.py {arguments}`",
        f"Processor: {describe_cpu()['name']}. Commit: {read_git_commit()}.",
        "",
        f"One head and {WORKER_NODES} worker nodes of one CPU each, as raylets of one machine. "
        f"{WORKER_NODES} workers share the training. The same `submit` was called after each kill.",
        "",
        "| job | killed in | exit code of `submit` | seconds | finished trials at its end |",
        "|---|---|---:|---:|---:|",
    ]
    for number, job in enumerate(jobs, 1):
        lines.append(
            f"| {number} | {job.killed_in or '–'} | {job.exit_code} | {job.seconds:.0f} | "
            f"{job.trials} |"
        )
    passed = sum(proof.passed for proof in summary.proofs)
    lines += [
        "",
        f"Target {summary.target.text}: {verdict}, {summary.speedup:.2f}x, "
        f"{summary.quality_retained:.1%} of the quality retained, "
        f"{passed} of {len(summary.proofs)} proofs passed.",
    ]
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the job, kill it twice, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="2x")
    parser.add_argument("--effort", default="normal")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    folder = RunFolder(path=out)
    cluster = SmallCluster()
    try:
        command = [sys.executable, "-m", "mmcompress.cli", "submit", str(arguments.spec)]
        command += ["--address", cluster.address, "--out", str(out)]
        command += ["--target", arguments.target, "--effort", arguments.effort]
        command += ["--set", f"resources.distill.workers={WORKER_NODES}"]
        command += ["--set", f"search.workers={WORKER_NODES}"]
        jobs = [
            run_job(command, folder, killed_in="search", is_due=is_searching),
            run_job(command, folder, killed_in="training", is_due=is_training),
            run_job(command, folder),
        ]
    finally:
        cluster.cluster.shutdown()
    summary = read_record(Summary, folder.summary)
    told = f"{arguments.spec} --out {arguments.out} --effort {arguments.effort}"
    print(format_report(jobs, summary, arguments=told))
    return 0 if summary.target.met else 1


if __name__ == "__main__":
    raise SystemExit(main())
