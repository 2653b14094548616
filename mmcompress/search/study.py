"""The search: Optuna proposes, workers judge, the driver alone writes. No torch here.

Proposals are directions: the pruning ratios of each are scaled together until the predicted latency just meets the
budget, so no trial is spent far from it. The study is a journal file in the run folder; every finished trial survives.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmcompress.errors import ClusterError
from mmcompress.records import Block, Candidate, Trial, build, plain
from mmcompress.spec.schema import Dimension, Space

Overrides = dict[str, Any]
Resolve = Callable[[Overrides], Candidate]
Predict = Callable[[Candidate], float]
Progress = Callable[[str, float], None]
MARGIN = 0.995
"""Proposals are scaled to this share of the budget."""


@dataclass
class Problem:
    """What is searched: dimensions, how overrides become a candidate, its predicted latency and the budget in ms."""

    space: Space
    blocks: dict[str, tuple[Block, ...]]
    resolve: Resolve
    predict: Predict
    budget_ms: float
    precisions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    choices: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Kept counts each block may have, ascending; a block not listed is free."""

    def nearest_choice(self, node: str, name: str, kept: int) -> int:
        options = self.choices.get(node, {}).get(name)
        return min(options, key=lambda k: abs(k - kept)) if options else kept


def is_ratio(path: str) -> bool:
    return path.endswith((".prune.heads", ".prune.ffn"))


def fit_to_budget(problem: Problem, overrides: Overrides) -> tuple[Overrides, Candidate]:
    """Scale the ratios of `overrides` together to the largest pipeline within the budget, by bisection."""

    def scaled(share: float) -> Overrides:
        out = dict(overrides)
        for path, value in overrides.items():
            if is_ratio(path):
                high = problem.space.dimensions[path].high if path in problem.space.dimensions else 1.0
                out[path] = round(min(float(value) * share, high or 0.0), 4)
        return out

    low, high = 0.0, 8.0
    if problem.predict(problem.resolve(scaled(high))) > problem.budget_ms * MARGIN:
        best = scaled(high)
        return best, problem.resolve(best)
    for _ in range(12):
        middle = (low + high) / 2
        if problem.predict(problem.resolve(scaled(middle))) > problem.budget_ms * MARGIN:
            low = middle
        else:
            high = middle
    best = scaled(high)
    return best, problem.resolve(best)


def explicit(problem: Problem, candidate: Candidate) -> Overrides:
    """Overrides that name every block: they give back exactly this candidate."""
    out: Overrides = {}
    for node, blocks in problem.blocks.items():
        for b in blocks:
            total = -(-b.units // b.step)
            cuts = round((b.units - candidate.kept[node].get(b.name, b.units)) / b.step)
            out[f"nodes.{node}.prune.blocks.{b.name}"] = round(cuts / total, 5)
        out[f"nodes.{node}.precision"] = candidate.precision[node]
    return out


def implied(problem: Problem, candidate: Candidate) -> dict[str, Any]:
    """The point of the search space nearest to a candidate: group ratios, dropped sub-layers, precisions."""
    point: dict[str, Any] = {}
    for path, d in problem.space.dimensions.items():
        keys = path.split(".")
        if keys[0] != "nodes":
            point[path] = _clip(d, 2.0)
            continue
        node, blocks = keys[1], problem.blocks[keys[1]]
        kept = candidate.kept[node]
        if keys[-1] == "precision":
            point[path] = candidate.precision[node] if candidate.precision[node] in d.choices else d.choices[0]
        elif keys[-1] == "drop":
            point[path] = _clip(d, sum(kept.get(b.name, b.units) == 0 for b in blocks))
        else:
            part = [b for b in blocks if b.group == keys[-1]]
            whole = sum(b.units for b in part)
            point[path] = _clip(d, 1 - sum(kept.get(b.name, b.units) for b in part) / max(whole, 1))
    return point


def _clip(d: Dimension, value: float) -> Any:
    value = min(max(value, d.low or 0.0), d.high if d.high is not None else value)
    return round(value) if d.step and d.step >= 1 else value


def _suggest(trial: Any, space: Space) -> Overrides:
    out: Overrides = {}
    for path, d in space.dimensions.items():
        if d.choices:
            out[path] = trial.suggest_categorical(path, list(d.choices))
        elif d.step and d.step >= 1:
            out[path] = trial.suggest_int(path, int(d.low or 0), int(d.high or 0), step=int(d.step))
        else:
            out[path] = trial.suggest_float(path, d.low, d.high, step=d.step)
    return out


def open_study(path: Path, seed: int) -> Any:
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
    sampler = optuna.samplers.TPESampler(
        seed=seed + done, multivariate=True, group=True, constant_liar=True, n_startup_trials=8
    )
    study = optuna.create_study(study_name="mmcompress", storage=storage, sampler=sampler, load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, skip_if_exists=False)
    return study


def finished(study: Any) -> list[Trial]:
    """Every trial whose result stands in the study."""
    rows = (t.user_attrs.get("trial") for t in study.get_trials(deepcopy=False))
    return [build(Trial, r) for r in rows if r]


def failures(study: Any, origin: str | None = None) -> int:
    """Trials that raised an error (those a dead driver left behind are asked again, not counted)."""
    rows = [t.user_attrs for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
    return sum(origin in (None, r.get("origin")) for r in rows)


@dataclass
class _Pending:
    optuna_trial: Any
    origin: str
    overrides: Overrides
    candidate: Candidate
    latency_ms: float
    tries: int = 1


class _Book:
    """The driver's hand: asks, records, tells; one writer."""

    def __init__(self, study: Any, problem: Problem):
        self.study, self.problem = study, problem
        found = (replace(t, latency_ms=problem.predict(t.candidate)) for t in finished(study))
        self.by_key = {t.candidate.key(): t for t in found}

    def record(self, p: _Pending, result: dict[str, Any]) -> Trial:
        from optuna.trial import TrialState, create_trial

        over = p.latency_ms - self.problem.budget_ms
        number = p.optuna_trial.number if p.optuna_trial else len(self.study.get_trials(deepcopy=False))
        trial = Trial(
            number,
            p.origin,
            p.overrides,
            p.candidate,
            p.latency_ms,
            result["loss"],
            result["quality"],
            result["seconds"],
            result["worker"],
        )
        self.by_key.setdefault(p.candidate.key(), trial)
        if p.optuna_trial:
            p.optuna_trial.set_user_attr("trial", plain(trial))
            p.optuna_trial.set_constraint("latency", over)
            self.study.tell(p.optuna_trial, result["loss"])
        else:
            self.study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE,
                    value=result["loss"],
                    user_attrs={"trial": plain(trial)},
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
            self.study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"error": text, "origin": p.origin}))


def run(
    study: Any,
    problem: Problem,
    executor: Executor,
    evaluate: Callable[..., dict[str, Any]],
    starts: list[Overrides],
    seeds: list[Candidate],
    trials: int,
    mutations: int,
    workers: int,
    retries: int,
    seed: int,
    progress: Progress = lambda what, share: None,
) -> list[Trial]:
    """Search until `trials` proposals and `mutations` of the best have been judged; earlier ones of the study count.

    `seeds` are candidates judged first as they are, `starts` points of the space the sampler is given first. A
    candidate seen before is not evaluated again. Latencies of earlier trials are predicted anew.
    """
    book = _Book(study, problem)
    for point in starts:
        study.enqueue_trial(point, skip_if_exists=True)
    before = finished(study)
    sampled = len({t.candidate.key() for t in before if t.origin == "sampler"}) + failures(study, "sampler")
    mutated = len({t.candidate.key() for t in before if t.origin == "mutation"}) + failures(study, "mutation")
    fixed = [c for c in seeds if c.key() not in book.by_key]
    total = max(1, len(fixed) + max(trials - sampled, 0) + max(mutations - mutated, 0))
    pending: dict[Future, _Pending] = {}
    rng = random.Random(f"{seed}:{len(before)}")
    judged = repeats = 0

    def given(origin: str, c: Candidate) -> _Pending:
        return _Pending(None, origin, explicit(problem, c), c, problem.predict(c))

    def start(p: _Pending) -> None:
        try:
            pending[executor.submit(evaluate, plain(p.candidate))] = p
        except BrokenExecutor as e:
            raise ClusterError("a worker process died (out of memory?); finished trials are kept: use --resume") from e

    def propose() -> _Pending | None:
        """The next candidate; None while the sampler's last are still running, or at the end."""
        nonlocal sampled, mutated, repeats
        if fixed:
            return given("knapsack", fixed.pop(0))
        while sampled < trials:
            t = study.ask()
            overrides, candidate = fit_to_budget(problem, _suggest(t, problem.space))
            p = _Pending(t, "sampler", overrides, candidate, problem.predict(candidate))
            known = book.by_key.get(candidate.key())
            if known is None or repeats >= 4 * total:
                sampled += 1
                return p
            repeats += 1  # the space is small: tell what is known, ask for another
            book.record(p, {"loss": known.loss, "quality": known.quality, "seconds": 0.0, "worker": known.worker})
        if mutated >= mutations or any(p.origin != "mutation" for p in pending.values()):
            return None
        running = {p.candidate.key() for p in pending.values()}
        new = mutate(problem, best(list(book.by_key.values()), problem.budget_ms), book.by_key.keys() | running, rng)
        if new is None:
            mutated = mutations
            return None
        mutated += 1
        return given("mutation", new)

    while True:
        while len(pending) < workers and (p := propose()) is not None:
            start(p)
        if not pending:
            break
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            p = pending.pop(future)
            error = future.exception()
            if error is not None and p.tries <= retries:
                p.tries += 1
                start(p)
                continue
            judged += 1
            if error is None:
                book.record(p, future.result())
            else:
                book.fail(p, error)
            top = best(list(book.by_key.values()), problem.budget_ms)
            shown = f"best loss {top.loss:.3f} at {top.latency_ms:.2f} ms" if top else "nothing within the budget yet"
            progress(f"trial {judged} of {total}: {shown}", min(judged / total, 1.0))
    return list(book.by_key.values())


def best(trials: list[Trial], budget_ms: float) -> Trial | None:
    """The feasible trial of least loss, None when nothing meets the budget."""
    return min((t for t in trials if t.latency_ms <= budget_ms), key=lambda t: t.loss, default=None)


def trim(problem: Problem, candidate: Candidate, damage: Callable[[str, str, int], float]) -> Candidate | None:
    """The candidate cut down to the budget, always where the least estimated damage is paid per millisecond."""
    kept = {n: {b.name: candidate.kept[n].get(b.name, b.units) for b in bs} for n, bs in problem.blocks.items()}
    now = Candidate(kept, candidate.precision)
    latency = problem.predict(now)
    while latency > problem.budget_ms:
        best_price, pick = float("inf"), None
        for n, bs in problem.blocks.items():
            for b in bs:
                options = problem.choices.get(n, {}).get(b.name, ())
                lower = [k for k in options if k <= now.kept[n][b.name] - max(b.step, b.units // 16)]
                if not lower:
                    continue
                cut = {**now.kept, n: {**now.kept[n], b.name: lower[-1]}}
                new = Candidate(cut, now.precision)
                saved = latency - problem.predict(new)
                paid = damage(n, b.name, lower[-1]) - damage(n, b.name, now.kept[n][b.name])
                if saved > 1e-6 and max(paid, 1e-6) / saved < best_price:
                    best_price, pick = max(paid, 1e-6) / saved, new
        if pick is None:
            return None
        now, latency = pick, problem.predict(pick)
    return now


def mutate(problem: Problem, top: Trial | None, seen: Collection[str], rng: random.Random) -> Candidate | None:
    """A level switch (EvoPress, Sieberling et al. 2025): units given to some blocks, taken from others, in budget."""
    if top is None:
        return None
    places = [(n, b) for n, blocks in problem.blocks.items() for b in blocks]
    for _ in range(400):
        kept = {n: dict(k) for n, k in top.candidate.kept.items()}
        precision = dict(top.candidate.precision)
        if rng.random() < 0.15:
            node = rng.choice(list(precision))
            precision[node] = rng.choice(problem.precisions.get(node, ("fp32",)))
        for sign in (1, -1):
            for node, b in rng.sample(places, rng.choice((1, 1, 2))):
                size = b.step * (1 if b.group == "heads" else rng.choice((2, 4, 8)))
                now = kept[node].get(b.name, b.units)
                kept[node][b.name] = problem.nearest_choice(node, b.name, min(max(now + sign * size, 0), b.units))
        candidate = Candidate(kept, precision)
        latency = problem.predict(candidate)
        if candidate.key() not in seen and 0.8 * problem.budget_ms <= latency <= problem.budget_ms:
            return candidate
    return None
