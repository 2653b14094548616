"""What both bundles answer to a whole split, node by node, and how the metrics score it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from mmcompress.data.base import Pairs
from mmcompress.graph.references import find_unjoined_encoders
from mmcompress.metrics.answers import (
    Answers,
    AnswersByNode,
    Scoring,
    answer_pairs,
    score_answers,
)
from mmcompress.results.records import AnswerCounts
from mmcompress.run.count_answers import count_answers
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.progress import prefix_progress
from mmcompress.stats import PerSampleScores, Quality, estimate_quality
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext

METRIC_TRIAL_PAIRS = 8
"""Pairs that the metrics are tried on before the work begins."""

Vectors = tuple[tuple[float, ...], ...]
"""Embeddings of all inputs [n, d], as JSON takes them."""


@dataclass(frozen=True, kw_only=True)
class SplitAnswers:
    """What one side answers to a split. `dense-SPLIT.json` for the dense side."""

    scores: dict[str, PerSampleScores]
    """What every metric counts, input by input, by name of the figure."""
    texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The text that each node writes or finds, for every input, by node."""
    vectors: dict[str, Vectors] = field(default_factory=dict)
    """Embeddings of length 1 of the encoders that no join compares, by node."""
    windows: tuple[int, ...] = ()
    """Windows that each input was heard in; empty when it was one each."""
    failed_metrics: dict[str, str] = field(default_factory=dict)
    """Why a metric has no figure, by `<metric>.<node>`."""

    def to_answers(self, references: tuple[str, ...]) -> dict[str, Answers]:
        """Return the answers by node, to compare others with."""
        answers: dict[str, Answers] = {}
        for node in {*self.texts, *self.vectors}:
            vectors = self.vectors.get(node)
            answers[node] = Answers(
                references=references,
                texts=self.texts.get(node, ()),
                vectors=np.array(vectors) if vectors else None,
            )
        return answers


def list_bundles(run: RunContext) -> dict[str, Path]:
    """Return the bundles of both sides."""
    return {"baseline": run.shared.baseline, "compressed": run.folder.bundle}


def answer_split(run: RunContext, split: str) -> dict[str, SplitAnswers]:
    """Ask both bundles a whole split at the same time.

    The dense bundle answers once: its answers are kept for everything that is compared with it.
    Where a metric failed, it answers again: the metric may have been mended since. A figure that
    one side lacks is left out of both.

    Args:
        run: The run with one target.
        split: The name of the split.

    Returns:
        The answers of `baseline` and `compressed`.
    """
    pairs = run.data.load(split)
    record = run.shared.locate_dense_answers(split)
    bundles = list_bundles(run)
    baseline: SplitAnswers | None = None
    if record.exists():
        baseline = read_record(SplitAnswers, record)
    if baseline is not None and not baseline.failed_metrics:
        del bundles["baseline"]
    answers = _ask_bundles(run, bundles, pairs=pairs, split=split)
    if baseline is None or "baseline" in answers:
        scoring = score_answers(answers["baseline"], spec=run.spec)
        baseline = _keep_answers(answers["baseline"], scoring)
        write_record(record, baseline, indent=None)
    dense = baseline.to_answers(pairs.texts)
    scoring = score_answers(answers["compressed"], spec=run.spec, dense=dense)
    compressed = _keep_answers(answers["compressed"], scoring)
    return {
        "baseline": _select_figures(baseline, compressed.scores),
        "compressed": _select_figures(compressed, baseline.scores),
    }


def try_metrics(run: RunContext, bundle: Path) -> None:
    """Score a few answers of the dense bundle, and tell what will be of no use at the end.

    A metric that fails is better known before hours of work than after them. So is a model that
    answers everything alike, as one with random weights does. On more answers both may do well, so
    the run goes on.
    """
    pairs = run.data.load("val", METRIC_TRIAL_PAIRS)
    answers = answer_pairs(
        load_bundle(bundle, run.spec.measure.threads),
        pairs,
        unjoined_encoders=find_unjoined_encoders(run.spec),
    )
    scoring = score_answers(answers, spec=run.spec, dense=answers)
    for name, reason in scoring.failures.items():
        run.on_progress(
            "check",
            f"the metric {name} fails on {len(pairs)} answers of the dense pipeline: {reason}; "
            "the run goes on, and its figure may be missing at the end",
            None,
        )
    kept = _keep_answers(answers, scoring)
    for node, counts in count_kept_answers(run, kept).items():
        if counts.is_uninformative and counts.inputs > 1:
            run.on_progress(
                "check",
                f"{node}: of the dense pipeline, {counts.describe()}: where that is so of all "
                "inputs, the quality is undetermined at the end (exit 3). Look at the model, its "
                "processor and the data first",
                None,
            )


def count_kept_answers(run: RunContext, kept: SplitAnswers) -> dict[str, AnswerCounts]:
    """Count the empty and the equal answers of one side."""
    return count_answers(run.spec, kept.texts, vectors_by_node=kept.vectors)


def list_failed_metrics(answers: Mapping[str, Mapping[str, SplitAnswers]]) -> dict[str, str]:
    """Return why a metric has no figure, by its name, its node and the split.

    Args:
        answers: The answers by split and side.
    """
    failed: dict[str, str] = {}
    for split, sides in answers.items():
        for side, split_answers in sides.items():
            for name, reason in split_answers.failed_metrics.items():
                failed.setdefault(f"metric {name} on {split}", f"{side}: {reason}")
    return failed


def _select_figures(answers: SplitAnswers, names: Collection[str]) -> SplitAnswers:
    """Return answers with the scores of some figures alone."""
    scores = {name: score for name, score in answers.scores.items() if name in names}
    return replace(answers, scores=scores)


def _ask_bundles(
    run: RunContext, bundles: dict[str, Path], *, pairs: Pairs, split: str
) -> dict[str, dict[str, Answers]]:
    """Return what every bundle answers; each is asked in a thread of its own."""
    unjoined_encoders = find_unjoined_encoders(run.spec)
    pipelines = {
        side: load_bundle(bundle, run.spec.measure.threads) for side, bundle in bundles.items()
    }
    progress = partial(run.on_progress, "evaluate")
    pending: dict[str, Future[dict[str, Answers]]] = {}
    with ThreadPoolExecutor() as pool:
        for side, pipeline in pipelines.items():
            answer = partial(
                answer_pairs,
                pipeline,
                pairs,
                unjoined_encoders=unjoined_encoders,
                progress=prefix_progress(progress, f"{side} on {split}: "),
            )
            pending[side] = pool.submit(answer)
        return {side: future.result() for side, future in pending.items()}


def _keep_answers(answers: AnswersByNode, scoring: Scoring) -> SplitAnswers:
    """Return what is kept of the answers of one side."""
    texts: dict[str, tuple[str, ...]] = {}
    vectors: dict[str, Vectors] = {}
    for node, answer in answers.items():
        if answer.texts:
            texts[node] = answer.texts
        if answer.vectors is not None:
            vectors[node] = tuple(tuple(row) for row in answer.vectors.tolist())
    windows = max((answer.windows for answer in answers.values()), key=len, default=())
    return SplitAnswers(
        scores=scoring.scores,
        texts=texts,
        vectors=vectors,
        windows=windows,
        failed_metrics=scoring.failures,
    )


def estimate_qualities(answers: dict[str, SplitAnswers]) -> dict[str, dict[str, Quality]]:
    """Return every metric of both sides, with its interval."""
    qualities = {}
    for side, split_answers in answers.items():
        qualities[side] = {
            name: estimate_quality(scores) for name, scores in split_answers.scores.items()
        }
    return qualities


def estimate_on_long_inputs(answers: dict[str, SplitAnswers]) -> dict[str, dict[str, Quality]]:
    """Return the error rates of both sides on inputs that the dense encoder hears in windows.

    There words can be lost where a sound is cut, which the figure of a whole split may hide.

    Returns:
        Error rates by side and name; empty when no input is longer than a window.
    """
    indices = [i for i, count in enumerate(answers["baseline"].windows) if count > 1]
    if not indices:
        return {}
    qualities: dict[str, dict[str, Quality]] = {}
    for side, split_answers in answers.items():
        figures: dict[str, Quality] = {}
        for name, scores in split_answers.scores.items():
            if scores.is_error_rate:
                figures[name] = estimate_quality(select_inputs(scores, indices))
        qualities[side] = figures
    return qualities if qualities["baseline"] else {}


def select_inputs(scores: PerSampleScores, indices: Sequence[int]) -> PerSampleScores:
    """Return the scores of some inputs."""
    numerators = tuple(scores.numerators[i] for i in indices)
    denominators = scores.denominators
    if denominators:
        denominators = tuple(denominators[i] for i in indices)
    return replace(scores, numerators=numerators, denominators=denominators)
