"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SensitivityCurve:
    """Measured damage (rise of the pipeline's loss after refit) of one block against the units it keeps."""

    kept_units: tuple[int, ...]
    loss_increases: tuple[float, ...]

    def loss_increase(self, kept: float | np.ndarray) -> np.ndarray:
        """Linear between the measured points."""
        return np.asarray(np.interp(kept, self.kept_units, self.loss_increases))


SensitivityCurves = Mapping[str, SensitivityCurve]
