"""A whole run of a tiny pipeline on a simulated machine, for a test that kills it.

`killed_run.py SPEC OUT`: it goes on in the folder, or at the storage URL, if there is a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from simulated import SimulatedBenchmarker, StoppedClock

from mmcompress.run.run_targets import run
from mmcompress.spec.storage_urls import is_remote
from mmcompress.workspace import lease, mirror_run

CHANGES = {
    "search.deterministic": True,
    "search.executor": "inline",
    "search.trials": 8,
    "search.batch": 4,
    "distill.steps": 6,
}


def run_tiny(spec: Path, out: Path | str):
    """Run the pipeline; returns its summary."""
    import torch

    torch.set_num_threads(1)
    return run(
        spec,
        out,
        overrides=CHANGES,
        resume=is_remote(str(out)) or out.exists(),
        bench=SimulatedBenchmarker(),
        clock=StoppedClock(),
    )


if __name__ == "__main__":
    mirror_run.SAVE_SECONDS = 0.1
    lease.SETTLE_SECONDS = 0.0
    place = sys.argv[2]
    run_tiny(Path(sys.argv[1]), place if is_remote(place) else Path(place))
