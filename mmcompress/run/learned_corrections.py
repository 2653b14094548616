"""What fits have learned about the predictor, for the fits after them. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mmcompress.storage import read_record


@dataclass(frozen=True, kw_only=True)
class NodeCorrections:
    """How wrong the predictor was about each node, as the last fit measured it.

    `node_corrections.json`. It lies beside the predictor, so every target of a run uses it, and so
    does a run that takes the predictor over (`--from`).
    """

    factors: dict[str, float] = field(default_factory=dict)
    """Measured / predicted latency, by node."""


def read_node_corrections(record: Path) -> dict[str, float]:
    """Read the factors on record; none where nothing was fitted before.

    Raises:
        DataError: The file is damaged.
    """
    if not record.exists():
        return {}
    return read_record(NodeCorrections, record).factors
