"""Stage: the importance of units, and the loss increases of cuts and precisions."""

from __future__ import annotations

from functools import partial

from mmcompress.search.sensitivity.gather import gather_sensitivity
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext, find_largest_position_cut, list_precisions


def measure_run_sensitivity(run: RunContext) -> Sensitivity:
    """Measure importance and loss increases on training pairs, or read them from the run folder."""
    with run.time_stage("sensitivity"):
        return gather_sensitivity(
            run.spec,
            run.pipeline,
            models=run.models,
            data=run.data,
            folder=run.shared,
            progress=partial(run.on_progress, "sensitivity"),
            precisions=list_precisions(run),
            max_token_shares={
                node_name: find_largest_position_cut(run, node_name) for node_name in run.models
            },
        )
