"""The search: Optuna proposes, workers judge, the driver alone writes. No torch here.

Proposals are directions: the pruning ratios of each are scaled together until the predicted latency just meets the
budget, so no trial is spent far from it. The study is a journal file in the run folder; every finished trial survives.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcompress.errors import ClusterError
from mmcompress.graph.structure import Candidate
from mmcompress.registry import SAMPLERS
from mmcompress.results.records import Trial
from mmcompress.search.neighbors import switch_levels
from mmcompress.search.problem import (
    SearchPoint,
    SearchProblem,
    find_best_trial,
    scale_to_budget,
    to_overrides,
    to_search_point,
)
from mmcompress.spec.space import Space
from mmcompress.storage import build_record, to_plain

Progress = Callable[[str, float], None]


Evaluate = Callable[..., dict[str, Any]]
"""(context, candidate as plain data) -> {loss, quality, seconds, worker}; the executor supplies the context."""


SeedCandidates = Sequence[tuple[str, Candidate]]
"""Candidates to judge as they are, each with where it comes from."""


def _distributions(space: Space) -> dict[str, Any]:
    """The dimensions of a space as Optuna has them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for path, d in space.dimensions.items():
        if d.choices:
            found[path] = CategoricalDistribution(list(d.choices))
        elif d.step and d.step >= 1:
            found[path] = IntDistribution(int(d.low or 0), int(d.high or 0), step=int(d.step))
        else:
            found[path] = FloatDistribution(d.low or 0.0, d.high or 0.0, step=d.step)
    return found


def open_study(path: Path, seed: int, *, sampler: str = "tpe") -> Any:
    """The study in a journal file, made when missing. Trials a dead driver left running are failed and asked again."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("optuna").setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    storage = JournalStorage(JournalFileBackend(str(path)))
    names = [s.study_name for s in optuna.get_all_study_summaries(storage)]
    if "mmcompress" in names:
        done = len(optuna.load_study(study_name="mmcompress", storage=storage).trials)
    made = SAMPLERS.get(sampler)(seed + done)
    study = optuna.create_study(
        study_name="mmcompress", storage=storage, sampler=made, load_if_exists=True
    )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, skip_if_exists=False)
    return study


def finished_trials(study: Any) -> list[Trial]:
    """Every trial whose result stands in the study."""
    rows = (t.user_attrs.get("trial") for t in study.get_trials(deepcopy=False))
    return [build_record(Trial, r) for r in rows if r]


def first_error(study: Any) -> str:
    """What the first trial that failed said; empty where none did."""
    rows = (t.user_attrs for t in study.get_trials(deepcopy=False))
    return next((r["error"] for r in rows if "error" in r), "")


def count_failures(study: Any, origin: str | None = None) -> int:
    """Trials that raised an error (those a dead driver left behind are asked again, not counted)."""
    rows = [t.user_attrs for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
    return sum(origin in (None, r.get("origin")) for r in rows)


@dataclass(kw_only=True)
class _Pending:
    optuna_trial: Any
    origin: str
    overrides: SearchPoint
    candidate: Candidate
    latency_ms: float
    tries: int = 1


class _Book:
    """The driver's hand: asks, records, tells; one writer."""

    def __init__(self, study: Any, problem: SearchProblem):
        self.study, self.problem = study, problem
        self.distributions = _distributions(problem.space)
        found = (
            replace(t, latency_ms=problem.predict(t.candidate)) for t in finished_trials(study)
        )
        self.by_key = {t.candidate.key(): t for t in found}

    def record(self, p: _Pending, result: dict[str, Any]) -> Trial:
        from optuna.trial import TrialState, create_trial

        over = p.latency_ms - self.problem.budget_ms
        number = (
            p.optuna_trial.number if p.optuna_trial else len(self.study.get_trials(deepcopy=False))
        )
        trial = Trial(
            number=number,
            origin=p.origin,
            overrides=p.overrides,
            candidate=p.candidate,
            latency_ms=p.latency_ms,
            loss=result["loss"],
            quality=result["quality"],
            evaluation_seconds=result["seconds"],
            worker=result["worker"],
        )
        self.by_key.setdefault(p.candidate.key(), trial)
        if p.optuna_trial:
            p.optuna_trial.set_user_attr("trial", to_plain(trial))
            p.optuna_trial.set_constraint("latency", over)
            self.study.tell(p.optuna_trial, result["loss"])
        else:
            self.study.add_trial(
                create_trial(  # without parameters the samplers would take the space for an empty one
                    state=TrialState.COMPLETE,
                    params=to_search_point(self.problem, p.candidate),
                    distributions=self.distributions,
                    value=result["loss"],
                    user_attrs={"trial": to_plain(trial)},
                    constraints={"latency": over},
                )
            )
        return trial

    def fail(self, p: _Pending, error: BaseException) -> None:
        from optuna.trial import TrialState, create_trial

        text = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
        if p.optuna_trial:
            p.optuna_trial.set_user_attr("error", text)
            p.optuna_trial.set_user_attr("origin", p.origin)
            self.study.tell(p.optuna_trial, state=TrialState.FAIL)
        else:
            self.study.add_trial(
                create_trial(state=TrialState.FAIL, user_attrs={"error": text, "origin": p.origin})
            )


@dataclass(frozen=True, kw_only=True)
class SearchEffort:
    """How much to search: sampler proposals and mutations in all, at how many a time, and retries of a failed one."""

    trials: int
    level_switches: int
    workers: int = 1
    retries: int = 0


class _Search:
    """One session of a search: proposes while there is room, settles what comes back."""

    def __init__(
        self,
        book: _Book,
        executor: Executor,
        *,
        evaluate: Evaluate,
        seeds: SeedCandidates,
        effort: SearchEffort,
        seed: int,
        progress: Progress,
    ):
        self.book, self.problem, self.effort, self.progress = book, book.problem, effort, progress
        self.executor, self.evaluate = executor, evaluate
        before = finished_trials(book.study)
        unique = lambda origin: len({t.candidate.key() for t in before if t.origin == origin})
        self.sampled = unique("sampler") + count_failures(book.study, "sampler")
        self.mutated = unique("mutation") + count_failures(book.study, "mutation")
        self.fixed = [(origin, c) for origin, c in seeds if c.key() not in book.by_key]
        left = max(effort.trials - self.sampled, 0) + max(effort.level_switches - self.mutated, 0)
        self.total = max(1, len(self.fixed) + left)
        self.rng = random.Random(f"{seed}:{len(before)}")
        self.pending: dict[Future, _Pending] = {}
        self.judged = self.repeats = 0

    def run(self) -> None:
        while True:
            while len(self.pending) < self.effort.workers and (p := self.propose()) is not None:
                self.start(p)
            if not self.pending:
                return
            for future in wait(self.pending, return_when=FIRST_COMPLETED).done:
                self.settle(future)

    def start(self, p: _Pending) -> None:
        try:
            self.pending[self.executor.submit(self.evaluate, to_plain(p.candidate))] = p
        except BrokenExecutor as e:
            raise ClusterError(
                "a worker process died (out of memory?); finished trials are kept: use --resume"
            ) from e

    def propose(self) -> _Pending | None:
        """Seeds first, then the sampler, then mutations; None while those wait for what is running, or at the end."""
        if self.fixed:
            return self.given(*self.fixed.pop(0))
        if self.sampled < self.effort.trials:
            self.sampled += 1
            return self.sample()
        if self.mutated >= self.effort.level_switches or any(
            p.origin != "mutation" for p in self.pending.values()
        ):
            return None
        taken = self.book.by_key.keys() | {p.candidate.key() for p in self.pending.values()}
        new = switch_levels(self.problem, self.best(), seen=taken, rng=self.rng)
        self.mutated = self.mutated + 1 if new else self.effort.level_switches
        return self.given("mutation", new) if new else None

    def given(self, origin: str, c: Candidate) -> _Pending:
        return _Pending(
            optuna_trial=None,
            origin=origin,
            overrides=to_overrides(self.problem, c),
            candidate=c,
            latency_ms=self.problem.predict(c),
        )

    def sample(self) -> _Pending:
        """What the sampler proposes next that is not known; of a known one the sampler is told, and asked again."""
        while True:
            t = self.book.study.ask(self.book.distributions)
            overrides, candidate = scale_to_budget(self.problem, dict(t.params))
            p = _Pending(
                optuna_trial=t,
                origin="sampler",
                overrides=overrides,
                candidate=candidate,
                latency_ms=self.problem.predict(candidate),
            )
            known = self.book.by_key.get(candidate.key())
            if known is None or self.repeats >= 4 * self.total:
                return p
            self.repeats += 1
            self.book.record(
                p,
                {
                    "loss": known.loss,
                    "quality": known.quality,
                    "seconds": 0.0,
                    "worker": known.worker,
                },
            )

    def settle(self, future: Future) -> None:
        p, error = self.pending.pop(future), future.exception()
        if error is not None and p.tries <= self.effort.retries:
            p.tries += 1
            return self.start(p)
        loss = future.result()["loss"] if error is None else math.nan
        if error is None and not math.isfinite(loss):
            error = ArithmeticError(f"the loss is {loss}")
        if error is None:
            self.book.record(p, future.result())
        else:
            self.book.fail(p, error)
        self.judged += 1
        top = self.best()
        shown = (
            f"best loss {top.loss:.3f} at {top.latency_ms:.2f} ms"
            if top
            else "nothing within the budget yet"
        )
        self.progress(
            f"trial {self.judged} of {self.total}: {shown}", min(self.judged / self.total, 1.0)
        )

    def best(self) -> Trial | None:
        return find_best_trial(list(self.book.by_key.values()), self.problem.budget_ms)


def run_study(
    study: Any,
    problem: SearchProblem,
    *,
    executor: Executor,
    evaluate: Evaluate,
    starts: list[SearchPoint],
    seeds: SeedCandidates,
    effort: SearchEffort,
    seed: int,
    progress: Progress = lambda what, share: None,
) -> list[Trial]:
    """Search until the trials and mutations of `effort` have been judged; earlier ones of the study count.

    `seeds` are candidates judged first as they are, `starts` points of the space the sampler is given first. A
    candidate seen before is not evaluated again. Latencies of earlier trials are predicted anew.
    """
    for point in starts:
        study.enqueue_trial(point, skip_if_exists=True)
    book = _Book(study, problem)
    _Search(
        book, executor, evaluate=evaluate, seeds=seeds, effort=effort, seed=seed, progress=progress
    ).run()
    return list(book.by_key.values())
