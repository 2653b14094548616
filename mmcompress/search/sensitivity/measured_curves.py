"""The curves that are measured so far: a run that was stopped goes on behind the last one.

The loss of every cut of a large model takes hours. Each curve depends on its own block and on the
dense models, so what a stopped run has measured is what its resumption would measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mmcompress.search.sensitivity.curves import SensitivityCurve
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.folder import RunFolder

WRITE_SECONDS = 5.0
"""Seconds between two writes of the file. Quick measurements would spend their time on it."""


@dataclass(frozen=True, kw_only=True)
class MeasuredCurves:
    """Content of `sensitivity_curves.json`."""

    curves: dict[str, dict[str, SensitivityCurve]] = field(default_factory=dict)
    """Loss increases of the blocks that are measured, by node and block."""


class CurveKeeper:
    """Keeps curves in a run folder while the others are measured.

    Args:
        folder: The run folder.
        clock: Returns seconds.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.monotonic):
        self._path = folder.sensitivity_curves
        self._clock = clock
        self._written_at = clock()
        self._curves: dict[str, dict[str, SensitivityCurve]] = {}
        if self._path.exists():
            self._curves = read_record(MeasuredCurves, self._path).curves

    def find(self, node_name: str, block_name: str) -> SensitivityCurve | None:
        """Return the curve of a block that is measured; None of any other."""
        return self._curves.get(node_name, {}).get(block_name)

    def keep(self, node_name: str, block_name: str, *, curve: SensitivityCurve) -> None:
        """Keep the curve of a block; it is on disk within `WRITE_SECONDS`."""
        self._curves.setdefault(node_name, {})[block_name] = curve
        if self._clock() - self._written_at >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is kept."""
        write_record(self._path, MeasuredCurves(curves=self._curves))
        self._written_at = self._clock()

    def discard(self) -> None:
        """Remove the file: the record of the sensitivity holds every curve."""
        self._path.unlink(missing_ok=True)
