"""TODO."""

from __future__ import annotations

from dataclasses import replace

from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.run.predictor import build_predictor
from mmcompress.run.profile import Profile, profile_pipeline
from mmcompress.run.sensitivity import measure_run_sensitivity
from mmcompress.run.teacher_labels import label_by_teacher
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext


def prepare_run(run: RunContext) -> tuple[Profile, Predictor, Sensitivity]:
    """Profile, latency predictor and evidence: all that does not depend on a target."""
    dense = profile_pipeline(run)
    label_by_teacher(run)
    predict, ev = build_predictor(run, dense), measure_run_sensitivity(run)
    return dense, replace(predict, fp32_blocks=ev.fp32_blocks), ev
