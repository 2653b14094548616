"""The evaluator of trials: the function that measures a candidate, and the workers it runs on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import uuid4

from mmcompress.graph.structure import Candidate
from mmcompress.kinds.base import Batch
from mmcompress.registry import EXECUTORS
from mmcompress.runtime.progress import StageProgress
from mmcompress.search.executors import (
    Evaluate,
    ExecutorSettings,
    SubmittedTask,
    make_broken_executor_error,
    retry_failed_task,
    submit_candidate,
)
from mmcompress.search.ordered_study import OrderedTrials
from mmcompress.search.sensitivity.curves import SensitivityTable
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.time_limit import limit_seconds
from mmcompress.search.worker import (
    EstimateContext,
    WorkerContext,
    estimate_candidate,
    evaluate_candidate,
    evaluate_on_more_pairs,
    make_worker_context,
)
from mmcompress.workspace.context import RunContext

CandidateKey = TypeVar("CandidateKey", bound=Hashable)
"""What the caller knows a candidate by."""

COLLAPSE_RATIO = 3.0
"""Loss before training / dense loss above which the quality of a pipeline counts as collapsed."""

MIN_DENSE_LOSS = 0.05
"""In units of the loss: a lower dense loss counts as this one.

A pipeline judged by its distance from the dense one has a dense loss of zero.
"""


def has_quality_collapsed(loss: float, dense_loss: float) -> bool:
    """Return whether a loss before training says little about the loss after training."""
    return loss > COLLAPSE_RATIO * max(dense_loss, MIN_DENSE_LOSS)


@dataclass(frozen=True, kw_only=True)
class TrialEvaluator:
    """Measures the loss of candidates on workers, which are started once a run."""

    evaluate: Evaluate
    """Measures one candidate on the validation pairs."""
    executor: Executor
    """Where it runs."""
    workers: int
    """Candidates at a time."""
    evaluate_again: Evaluate | None = None
    """Measures one of the best few on further pairs; None where the data has no more."""
    first_pairs_share: float = 0.0
    """Validation pairs of every trial / all pairs behind the loss of a finalist."""
    retries: int = 0
    """Times a failed evaluation is tried again."""
    ordered: OrderedTrials | None = None
    """What a deterministic search knows, in the order of its proposals; None for any other."""
    final_losses: dict[str, float] = field(default_factory=dict)
    """Losses on further pairs by the key of the candidate; filled as finalists are evaluated."""

    def evaluate_all(
        self,
        candidates: Mapping[CandidateKey, Candidate],
        *,
        evaluate: Evaluate,
        progress: StageProgress,
        message: str,
    ) -> dict[CandidateKey, float]:
        """Measure the loss of every candidate.

        Args:
            candidates: Candidates by any key.
            evaluate: `self.evaluate` or `self.evaluate_again`.
            progress: Receives the share done, and every evaluation that failed.
            message: What is being done, for a person.

        Returns:
            Losses by key; infinite where the evaluation failed or its loss is not finite.

        Raises:
            ClusterError: A worker process died.
        """
        tasks: dict[CandidateKey, SubmittedTask] = {}
        for key, candidate in candidates.items():
            tasks[key] = submit_candidate(
                candidate, evaluate, executor=self.executor, retries=self.retries
            )
        losses: dict[CandidateKey, float] = {}
        for i, (key, task) in enumerate(tasks.items()):
            progress(message, i / len(tasks))
            losses[key] = _wait_for_loss(task, progress)
        return losses


def _wait_for_loss(task: SubmittedTask, progress: StageProgress) -> float:
    """Wait for the loss of one candidate; infinite after a failure, which does not end a search."""
    while retry_failed_task(task):
        pass
    error = task.future.exception()
    if isinstance(error, BrokenExecutor):
        raise make_broken_executor_error() from error
    if error is not None:
        text = f"a structure could not be evaluated: {type(error).__name__}: {error}"
        progress(text, None)
        return math.inf
    loss = float(task.future.result()["loss"])
    return loss if math.isfinite(loss) else math.inf


@contextmanager
def start_evaluator(run: RunContext, sensitivity: Sensitivity) -> Iterator[TrialEvaluator]:
    """Start the workers of the search and stop them at the end of the block."""
    search = run.spec.search
    evaluate: Evaluate
    evaluate_again: Evaluate | None = None
    first_pairs_share = 0.0
    context: WorkerContext | EstimateContext
    with run.time_stage("search"):
        if search.evaluator == "estimated":
            evaluate = estimate_candidate
            context = EstimateContext(
                table=SensitivityTable(curves=sensitivity.curves, rounding=sensitivity.rounding),
                base_loss=sensitivity.base_loss,
            )
        else:
            evaluate = evaluate_candidate
            first_pairs, more_pairs = _load_validation_pairs(run)
            if more_pairs is not None:
                evaluate_again = evaluate_on_more_pairs
                first_pairs_share = len(first_pairs) / (len(first_pairs) + len(more_pairs))
            # Workers run side by side; alone in this process a trial may take all threads.
            threads = max(1, int(run.spec.resources.trial.cpu))
            if search.executor == "inline":
                threads = run.spec.measure.threads
            if search.deterministic:
                threads = 1
            context = make_worker_context(
                run.spec,
                scores=sensitivity.scores,
                grams=sensitivity.grams,
                fp32_blocks=sensitivity.fp32_blocks,
                batch=first_pairs,
                more_pairs=more_pairs,
                key=uuid4().hex,
                threads=threads,
            )
        make_executor = EXECUTORS.get(search.executor)
        executor: Executor = make_executor(
            context,
            search.workers,
            ExecutorSettings.from_spec(run.spec),
        )
    try:
        if evaluate_again is not None:
            evaluate_again = limit_seconds(evaluate_again, search.trial_seconds)
        yield TrialEvaluator(
            evaluate=limit_seconds(evaluate, search.trial_seconds),
            executor=executor,
            workers=getattr(executor, "workers", search.workers),
            evaluate_again=evaluate_again,
            first_pairs_share=first_pairs_share,
            retries=search.retries,
            ordered=OrderedTrials() if search.deterministic else None,
        )
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _load_validation_pairs(run: RunContext) -> tuple[Batch, Batch | None]:
    """Load the pairs of every trial, and the further pairs of finalists or None.

    Further pairs come in whole pieces of the same size; what is left over is not used.
    """
    options = run.spec.data
    all_pairs = run.pipeline.collate(
        run.data.load("val", options.validation_pairs * options.final_pairs_factor)
    )
    first_pairs = all_pairs[slice(0, options.validation_pairs)]
    piece_size = len(first_pairs)
    piece_count = (len(all_pairs) - piece_size) // piece_size
    if piece_count == 0:
        return first_pairs, None
    return first_pairs, all_pairs[slice(piece_size, piece_size + piece_count * piece_size)]
