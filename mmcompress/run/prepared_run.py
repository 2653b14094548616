"""Everything that the targets of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.run.profile import Profile
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run with everything that does not depend on a target."""

    run: RunContext
    """The run to go on with: its data are labelled as the spec asks."""
    dense: Profile
    """Latency, sizes and proofs of the dense pipeline."""
    predictor: Predictor
    """Predicts the latency of a candidate; nothing has corrected it yet."""
    sensitivity: Sensitivity
    """Importance of units, and loss increases of cuts and precisions."""
