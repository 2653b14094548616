"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.plan import Export, MeasurementPlan
from mmcompress.storage import read_record


@dataclass(frozen=True, kw_only=True)
class Kit:
    """`kit.json`: beside it lie `baseline/`, the same in every other precision in `rounded/`, `requests.npz`, and a
    folder for every structure that was exported."""

    pipeline: str
    threads: int
    warmup: int
    requests: int
    plan: MeasurementPlan
    exports: tuple[Export, ...]


def open_kit(folder: Path) -> Kit:
    """Raises `DataError` for what is no kit."""
    if not (folder / "kit.json").is_file():
        raise DataError(
            f"{folder}: not a kit: it holds no kit.json (mmcompress device kit SPEC --out FOLDER makes one)"
        )
    return read_record(Kit, folder / "kit.json")
