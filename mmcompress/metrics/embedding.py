"""TODO."""

from __future__ import annotations

from mmcompress.metrics.answers import Answers, count_right
from mmcompress.stats import PerSampleScores


def score_embeddings(a: Answers) -> dict[str, PerSampleScores]:
    """Share of inputs whose embedding is nearer to the dense pipeline's of the same input than to that of any other."""
    theirs = (a.dense or a).vectors
    assert a.vectors is not None and theirs is not None
    sim = a.vectors @ theirs.T
    return {"embedding_r1": count_right(sim.diagonal() >= sim.max(1) - 1e-6)}
