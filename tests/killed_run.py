"""A whole run of a tiny pipeline on a simulated machine, for a test that kills it.

`killed_run.py SPEC OUT`: it goes on in the folder, if there is one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from simulated import SimulatedBenchmarker, StoppedClock

from mmcompress.run.run_targets import run

CHANGES = {
    "search.deterministic": True,
    "search.executor": "inline",
    "search.trials": 8,
    "search.batch": 4,
    "distill.steps": 6,
}


def run_tiny(spec: Path, out: Path):
    """Run the pipeline; returns its summary."""
    import torch

    torch.set_num_threads(1)
    return run(
        spec,
        out,
        overrides=CHANGES,
        resume=out.exists(),
        bench=SimulatedBenchmarker(),
        clock=StoppedClock(),
    )


if __name__ == "__main__":
    run_tiny(Path(sys.argv[1]), Path(sys.argv[2]))
