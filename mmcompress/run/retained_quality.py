"""Judges whether a finished artifact keeps the share of the dense quality that was asked for."""

from __future__ import annotations

from mmcompress.errors import DataError
from mmcompress.results.records import RetainedCheck
from mmcompress.run.answers import SplitAnswers, answer_split
from mmcompress.stats import Quality, estimate_quality_retained
from mmcompress.workspace.context import RunContext

DECIDING_SPLIT = "val"
"""The split that decides. What a run does next may not depend on the test split."""


def check_retained_quality(
    run: RunContext, *, limit: float, test: dict[str, SplitAnswers]
) -> RetainedCheck:
    """Ask both bundles the validation split, and compare what is kept with the limit.

    Args:
        run: The run with one target.
        limit: Share of the dense quality that must be kept.
        test: Answers of both sides to the test split.

    Raises:
        DataError: No metric gives a figure on the validation split.
    """
    choosing = estimate_retained(answer_split(run, DECIDING_SPLIT))
    if choosing.n == 0:
        raise DataError(f"no metric gives a figure of the dense pipeline on '{DECIDING_SPLIT}'")
    return RetainedCheck(limit=limit, choosing=choosing, test=estimate_retained(test))


def estimate_retained(answers: dict[str, SplitAnswers]) -> Quality:
    """Return the share of the dense quality that is kept on a split, with its interval."""
    return estimate_quality_retained(answers["baseline"].scores, answers["compressed"].scores)
