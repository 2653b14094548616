"""TODO."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

from mmcompress.errors import ClusterError
from mmcompress.graph.structure import Candidate
from mmcompress.registry import EXECUTORS
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.worker import (
    estimate_candidate,
    evaluate_candidate,
    evaluate_on_more_pairs,
    make_estimate_context,
    make_worker_context,
)
from mmcompress.storage import to_plain
from mmcompress.workspace.context import OnProgress, RunContext

K = TypeVar("K", bound=Hashable)


COLLAPSE_RATIO, MIN_DENSE_LOSS = 3.0, 0.05
"""A pipeline is destroyed whose loss before training is more than so many times the dense one; a dense loss below that
counts as that: what is judged by its distance from the dense pipeline would be compared to nothing."""


def quality_collapsed(loss: float, dense: float) -> bool:
    """Whether a loss before training says little of what training can make of a structure."""
    return loss > COLLAPSE_RATIO * max(dense, MIN_DENSE_LOSS)


@dataclass(frozen=True, kw_only=True)
class TrialEvaluator:
    """Who judges trials: the function, where it runs, and how many at once. Workers are started once a run."""

    evaluate: Any
    executor: Any
    workers: int
    evaluate_again: Any = None
    """The same on more pairs, for the best few; None where there are no more."""
    share: float = 0.0
    """Of all pairs behind a final loss, those that every trial is judged on."""
    retries: int = 0
    """How often what failed is tried again."""
    final_losses: dict[str, float] = field(default_factory=dict)
    """Losses of finalists by candidate."""

    def evaluate_all(
        self, judge: Any, asked: Mapping[K, Candidate], *, say: OnProgress, what: str
    ) -> dict[K, float]:
        """The loss of each, infinite where it could not be judged: as with a trial that fails the search goes on.

        Raises `ClusterError` when a worker is gone.
        """
        found: dict[K, float] = {}
        try:
            waiting = {key: self.executor.submit(judge, to_plain(c)) for key, c in asked.items()}
            for i, key in enumerate(asked):
                say("search", what, i / len(asked))
                for tries in range(self.retries, -1, -1):
                    try:
                        found[key] = float(waiting[key].result()["loss"])
                        break
                    except BrokenExecutor:
                        raise
                    except Exception as e:
                        if tries:
                            waiting[key] = self.executor.submit(judge, to_plain(asked[key]))
                            continue
                        say(
                            "search",
                            f"a structure could not be judged: {type(e).__name__}: {e}",
                            None,
                        )
                        found[key] = math.inf
        except BrokenExecutor as e:
            raise ClusterError(
                "a worker process died (out of memory?); finished trials are kept: use --resume"
            ) from e
        return {key: loss if math.isfinite(loss) else math.inf for key, loss in found.items()}


@contextmanager
def start_evaluator(run: RunContext, ev: Sensitivity) -> Iterator[TrialEvaluator]:
    """Start the workers of the search, with all that a trial needs; stop them at the end."""

    s, again, share = run.spec.search, None, 0.0
    with run.time_stage("search"):
        if s.evaluator == "estimated":
            judge, context = (
                estimate_candidate,
                make_estimate_context(ev.curves, ev.rounding, base=ev.base_loss),
            )
        else:
            batch, more = _choosing(run)
            if more is not None:
                again, share = evaluate_on_more_pairs, len(batch) / (len(batch) + len(more))
            threads = run.spec.measure.threads if s.executor == "inline" else 1
            given = (ev.scores, ev.grams, batch, more, uuid4().hex, threads, ev.fp32_blocks)
            judge, context = evaluate_candidate, make_worker_context(run.spec, *given)
        executor = EXECUTORS.get(s.executor)(context, s.workers, address=s.ray_address)
    try:
        yield TrialEvaluator(
            evaluate=judge,
            executor=executor,
            workers=getattr(executor, "workers", s.workers),
            evaluate_again=again,
            share=share,
            retries=s.retries,
        )
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _choosing(run: RunContext) -> tuple[Any, Any]:
    """(pairs that every trial is judged on, further ones for finalists or None)."""
    d = run.spec.data
    every = run.pipeline.collate(run.data.load("val", d.validation_pairs * d.final_pairs_factor))
    few = every[slice(0, d.validation_pairs)]
    rest = (len(every) - len(few)) // len(few) * len(few)
    return few, every[slice(len(few), len(few) + rest)] if rest else None
