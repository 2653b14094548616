"""TODO."""

from __future__ import annotations

from mmcompress.search.sensitivity.gather import gather_sensitivity
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext, list_precisions


def _shortest(run: RunContext, node: str) -> float:
    """The largest share of its positions that a node may lose: as the spec fixes it, or as far as the space goes."""
    prune, d = run.spec.nodes[node].prune, run.space.dimensions.get(f"nodes.{node}.prune.tokens")
    fixed = max(prune.tokens, prune.blocks.get("tokens", 0.0))
    return max(fixed, (d.high or 0.0) if d else 0.0)


def measure_run_sensitivity(run: RunContext) -> Sensitivity:
    """Importance of every unit and damage of every block, on training pairs. Cached in the run folder."""

    with run.time_stage("importance"):
        return gather_sensitivity(
            run.spec,
            run.pipeline,
            models=run.models,
            data=run.data,
            folder=run.shared,
            progress=lambda what, share: run.on_progress("importance", what, share),
            precisions=list_precisions(run),
            shortest={n: _shortest(run, n) for n in run.models},
        )
