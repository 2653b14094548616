"""What both bundles answer to a whole split, and what the metrics count of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.graph.references import find_unjoined_encoders
from mmcompress.metrics.answers import Answers, answer_pairs, score_answers
from mmcompress.runtime.graph import load_bundle
from mmcompress.stats import PerSampleScores, Quality, estimate_quality
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

SHOWN_SAMPLES = 8
"""Texts of both sides that the report shows."""


@dataclass(frozen=True, kw_only=True)
class SplitAnswers:
    """What one side answers to a split. `dense-SPLIT.json` for the dense side."""

    scores: dict[str, PerSampleScores]
    """What every metric counts, input by input."""
    texts: tuple[str, ...]
    """The text that a generator writes, for every input."""
    answers: tuple[str, ...]
    """The text that is found, or where none is looked for, that is written."""
    vectors: tuple[tuple[float, ...], ...] = ()
    """Embeddings of length 1, where a metric compares them with those of the other side."""


def list_bundles(run: RunContext) -> dict[str, Path]:
    """Return the bundles of both sides."""
    return {"baseline": run.shared.baseline, "compressed": run.folder.bundle}


def answer_split(run: RunContext, split: str) -> dict[str, SplitAnswers]:
    """Ask both bundles a whole split at the same time.

    The dense bundle answers once: its answers are kept for everything that is compared with it.

    Args:
        run: The run with one target.
        split: The name of the split.

    Returns:
        The answers of `baseline` and `compressed`.
    """
    pairs = run.data.load(split)
    record = run.shared.dense_answers(split)
    bundles = list_bundles(run)
    if record.exists():
        del bundles["baseline"]
    answers = _ask_bundles(run, bundles, pairs=pairs, split=split)
    metrics = tuple(metric.kind for metric in run.spec.metrics)
    if record.exists():
        baseline = read_record(SplitAnswers, record)
    else:
        baseline = _score_split(answers["baseline"], metrics)
        write_record(record, baseline, indent=None)
    dense = Answers(
        texts=baseline.texts,
        references=pairs.texts,
        answers=baseline.answers,
        vectors=np.array(baseline.vectors),
    )
    compressed = replace(answers["compressed"], dense=dense)
    return {"baseline": baseline, "compressed": _score_split(compressed, metrics)}


def _ask_bundles(
    run: RunContext, bundles: dict[str, Path], *, pairs: Pairs, split: str
) -> dict[str, Answers]:
    """Return what every bundle answers; each is asked in a thread of its own."""
    unjoined_encoders = find_unjoined_encoders(run.spec)
    pipelines = {
        side: load_bundle(bundle, run.spec.measure.threads) for side, bundle in bundles.items()
    }
    pending: dict[str, Future[Answers]] = {}
    with ThreadPoolExecutor() as pool:
        for side, pipeline in pipelines.items():
            pending[side] = pool.submit(
                answer_pairs,
                pipeline,
                pairs,
                progress=_make_reporter(run, f"{side} on {split}"),
                alone=unjoined_encoders,
            )
        return {side: future.result() for side, future in pending.items()}


def _make_reporter(run: RunContext, message: str) -> Callable[[float], None]:
    """Return a function that reports the share of a split that is answered."""

    def report_share(share: float) -> None:
        run.on_progress("judge", message, share)

    return report_share


def _score_split(answers: Answers, metrics: tuple[str, ...]) -> SplitAnswers:
    """Return what is kept of the answers of one side."""
    vectors: tuple[tuple[float, ...], ...] = ()
    if "embedding" in metrics and answers.vectors is not None:
        vectors = answers.vectors.tolist()
    return SplitAnswers(
        scores=score_answers(answers, metrics),
        texts=answers.texts,
        answers=answers.answers,
        vectors=vectors,
    )


def estimate_qualities(answers: dict[str, SplitAnswers]) -> dict[str, dict[str, Quality]]:
    """Return every metric of both sides, with its interval."""
    qualities = {}
    for side, split_answers in answers.items():
        qualities[side] = {
            name: estimate_quality(scores) for name, scores in split_answers.scores.items()
        }
    return qualities


def select_samples(
    run: RunContext, answers: dict[str, SplitAnswers], *, split: str
) -> tuple[dict[str, str], ...]:
    """Return a few references of a split with the texts of both sides, for the eye."""
    samples = []
    for i, reference in enumerate(run.data.load(split).texts[:SHOWN_SAMPLES]):
        texts = {side: split_answers.texts[i] for side, split_answers in answers.items()}
        samples.append({"reference": reference, **texts})
    return tuple(samples)
