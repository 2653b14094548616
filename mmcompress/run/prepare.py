"""Everything that does not depend on a target: profile, labelled data, predictor and sensitivity."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.run.predictor import build_predictor
from mmcompress.run.profile import Profile, profile_pipeline
from mmcompress.run.sensitivity import measure_run_sensitivity
from mmcompress.run.teacher_labels import label_by_teacher
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run with everything that its targets share."""

    run: RunContext
    """The run to go on with: its data are labelled as the spec asks."""
    dense: Profile
    """Latency, sizes and proofs of the dense pipeline."""
    predictor: Predictor
    """Predicts the latency of a candidate; its correction is 1."""
    sensitivity: Sensitivity
    """Importance of units, and loss increases of cuts and precisions."""


def prepare_run(run: RunContext) -> PreparedRun:
    """Make, or read from the run folder, all that does not depend on a target."""
    dense = profile_pipeline(run)
    labelled_run = label_by_teacher(run)
    predictor = build_predictor(labelled_run, dense)
    sensitivity = measure_run_sensitivity(labelled_run)
    return PreparedRun(
        run=labelled_run,
        dense=dense,
        predictor=replace(predictor, fp32_blocks=sensitivity.fp32_blocks),
        sensitivity=sensitivity,
    )
