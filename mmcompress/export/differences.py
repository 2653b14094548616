"""Differences between what a bundle and a library make of raw inputs, and the proofs of them.

A comparison of a kind of node (`NodeKind.fidelity`) collects its differences here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmcompress.export.proofs import make_proof
from mmcompress.results.records import Proof

PREPROCESSING_BOUND = 0.03
"""Largest difference of a standardized pixel, or of a feature: two ways of resizing round
differently."""

EMBEDDING_BOUND = 1e-4
"""Largest 1 - cosine of an embedding to the library's."""

MATCH_BOUND = 0.01
"""Largest difference of the probability that a text describes a picture. A pixel that is rounded
otherwise moves it by less."""

SHOWN_ERROR_CHARACTERS = 60
"""Characters of a library's error that a proof shows."""


@dataclass(kw_only=True)
class LargestDifference:
    """The largest difference of one comparison so far."""

    difference: float = 0.0
    """The difference."""
    name: str = ""
    """The input that it was found at."""
    count: int = 0
    """Inputs that were compared."""

    def add(self, difference: float, name: str) -> None:
        """Add the difference of one input; what can't be compared differs by infinity."""
        self.count += 1
        value = difference if np.isfinite(difference) else float("inf")
        if value > self.difference or not self.name:
            self.difference = value
            self.name = name


@dataclass(kw_only=True)
class NodeDifferences:
    """The differences of one node."""

    prepared: LargestDifference = field(default_factory=LargestDifference)
    """What the model is given."""
    embedding: LargestDifference = field(default_factory=LargestDifference)
    """Its embedding."""
    match: LargestDifference = field(default_factory=LargestDifference)
    """The probability that a text describes a picture."""
    notes: list[str] = field(default_factory=list)
    """What was left out or done otherwise than in the library, and why."""

    def to_proofs(self, node_name: str) -> list[Proof]:
        """Return the proofs of what was compared."""
        rows = {
            "preprocessing": (self.prepared, PREPROCESSING_BOUND),
            "embedding": (self.embedding, EMBEDDING_BOUND),
            "match": (self.match, MATCH_BOUND),
        }
        proofs: list[Proof] = []
        for name, (worst, bound) in rows.items():
            if not worst.count:
                continue
            # told once: the other proofs are about the same inputs
            notes = [] if proofs else self.notes
            parts = [f"{worst.count} raw inputs", f"most at {worst.name}", *notes]
            proofs.append(
                make_proof(
                    f"dense == library: {name}",
                    node_name,
                    difference=worst.difference,
                    bound=bound,
                    detail=f"({'; '.join(parts)})",
                )
            )
        return proofs


def compare_windows(actual: np.ndarray, expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference over the windows of one input; as many are expected."""
    if len(actual) != len(expected):
        return float("inf")
    differences = [compare_prepared(actual[i], window) for i, window in enumerate(expected)]
    return max(differences)


def compare_prepared(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of what two sides give a model; token ids must be equal."""
    if np.issubdtype(expected.dtype, np.integer):
        return _compare_ids(actual.tolist(), expected.tolist())
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max())


def _compare_ids(actual: list[int], expected: list[int]) -> float:
    """Return 0 for equal token ids, apart from padding behind them, and infinity for others."""
    common = min(len(actual), len(expected))
    rest = [*actual[common:], *expected[common:]]
    if actual[:common] == expected[:common] and len(set(rest)) <= 1:
        return 0.0
    return float("inf")


def compare_embeddings(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return 1 - cosine of two vectors; `expected` has length 1."""
    vector = np.asarray(actual, np.float64)
    if vector.shape != expected.shape:
        return float("inf")
    length = max(float(np.linalg.norm(vector)), 1e-12)
    return max(1.0 - float(vector @ expected) / length, 0.0)


def summarize_error(error: Exception) -> str:
    """Return the beginning of an error's text."""
    return f"{type(error).__name__}: {error}"[:SHOWN_ERROR_CHARACTERS]
