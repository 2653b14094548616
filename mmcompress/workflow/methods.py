"""Ways to choose a structure, to be compared at equal measured latency: each a row of `METHODS`.

A method's `propose(run, evidence)` is a context that gives a `Propose` (see `fit`), None for a structure that is what
it is. What follows (refit, distillation, export, measurement) is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from mmcompress.prune.allocation import after, steps
from mmcompress.records import Candidate, Trial
from mmcompress.workflow.choose import chosen, floor, jury, problem, search, splits
from mmcompress.workflow.fit import Propose, searching
from mmcompress.workflow.state import Run, precisions_of

Build = Callable[[float], Candidate]
"""Share removed, 0 .. 1 -> candidate."""


@dataclass(frozen=True)
class Method:
    """How a structure is chosen, and what is special beside it.

    `fixed`: a candidate that is not fitted to the target; `importance`: another criterion than the spec's; `scratch`:
    its weights are thrown away before training; `like`: the method whose structure it takes.
    """

    about: str
    propose: Callable[[Run, Any], AbstractContextManager[Propose]] | None = None
    fixed: Callable[[Run], Candidate] | None = None
    importance: str = ""
    scratch: bool = False
    like: str = ""
    train: bool = True


def _trial(name: str, candidate: Candidate, ms: float) -> Trial:
    return Trial(0, name, {}, candidate, ms, 0.0, {}, 0.0)


def _quick(run: Run) -> dict[str, str]:
    """int8 wherever it may be chosen."""
    return {n: "int8" if "int8" in options else options[0] for n, options in precisions_of(run).items()}


def _scaled(run: Run, build: Build, name: str) -> Propose:
    """The least share removed at which a build meets the budget, by bisection."""

    def propose(predict: Any, budget_ms: float, attempt: int) -> Trial:
        low, high = 0.0, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (middle, high) if predict(build(middle)) > budget_ms else (low, middle)
        candidate = build(high)
        return _trial(name, candidate, predict(candidate))

    return propose


@contextmanager
def uniform(run: Run, ev: Any) -> Iterator[Propose]:
    precision = _quick(run)

    def build(share: float) -> Candidate:
        kept = {
            n: {b.name: b.units if b.group == "tokens" else int(after(b, round(share * steps(b)))) for b in blocks}
            for n, blocks in run.blocks.items()
        }
        return Candidate(kept, precision)

    yield _scaled(run, build, "uniform")


@contextmanager
def ranking(run: Run, ev: Any) -> Iterator[Propose]:
    """One threshold over all groups of all models, scores divided by the mean of their block (Torch-Pruning)."""
    precision, order = _quick(run), []
    for n, blocks in run.blocks.items():
        for b in blocks:
            if b.group != "tokens":
                low = ev.scores[n][b.name].sort().values
                mean = float(low.mean()) or 1.0
                order += [(float(piece.mean()) / mean, n, b.name) for piece in low.split(b.step)]
    order.sort(key=lambda row: row[0])

    def build(share: float) -> Candidate:
        cuts: dict[tuple[str, str], int] = {}
        for _, n, name in order[: round(share * len(order))]:
            cuts[n, name] = cuts.get((n, name), 0) + 1
        kept = {n: {b.name: int(after(b, cuts.get((n, b.name), 0))) for b in bs} for n, bs in run.blocks.items()}
        return Candidate(kept, precision)

    yield _scaled(run, build, "ranking")


@contextmanager
def knapsack(run: Run, ev: Any) -> Iterator[Propose]:
    def propose(predict: Any, budget_ms: float, attempt: int) -> Trial:
        p = problem(run, ev, predict, budget_ms)
        found = splits(run, ev, predict, budget_ms, p)
        best = found[0][1] if found else floor(p, predict)
        return _trial("knapsack", best, predict(best))

    yield propose


@contextmanager
def separate(run: Run, ev: Any) -> Iterator[Propose]:
    """Every model alone must become as much faster as the pipeline: no budget moves from one to another.

    One that can't is as fast as it gets.
    """

    def propose(predict: Any, budget_ms: float, attempt: int) -> Trial:
        p = problem(run, ev, predict, budget_ms)
        whole = Candidate({n: {} for n in run.blocks}, dict.fromkeys(run.blocks, "fp32"))
        beside = predict.correction * predict.overhead_ms
        share = (budget_ms - beside) / (predict(whole) - beside)
        kept, precision, fastest = {}, {}, floor(p, predict)
        for n in run.blocks:
            alone = replace(predict, overhead_ms=0.0)
            found = splits(run, ev, alone, share * predict.node_ms(n, whole), p, [n])
            best = found[0][1] if found else fastest
            kept[n], precision[n] = best.kept[n], best.precision[n]
        candidate = Candidate(kept, precision)
        return _trial("separate", candidate, predict(candidate))

    yield propose


@contextmanager
def random(run: Run, ev: Any) -> Iterator[Propose]:
    """As many evaluations as the search has, none of them guided."""
    s = run.spec.search
    blind = replace(s, sampler="random", trials=s.trials + s.mutations, mutations=0)
    run = dataclasses.replace(run, spec=replace(run.spec, search=blind))
    with jury(run, ev) as who:

        def propose(predict: Any, budget_ms: float, attempt: int) -> Trial | None:
            trials = search(run, ev, predict, budget_ms, who, attempt, blind=True)
            return chosen(run, who, trials, budget_ms)

        yield propose


def _whole(precision: str) -> Callable[[Run], Candidate]:
    def candidate(run: Run) -> Candidate:
        kept = {n: {b.name: b.units for b in blocks} for n, blocks in run.blocks.items()}
        return Candidate(kept, dict.fromkeys(run.blocks, "fp32") if precision == "fp32" else _quick(run))

    return candidate


METHODS = {
    "searched": Method("the search of this tool", searching),
    "knapsack": Method("the best split of the budget by measured damage alone, nothing searched", knapsack),
    "separate": Method("a budget for each model instead of one for all", separate),
    "uniform": Method("the same share of every block", uniform),
    "magnitude": Method(
        "the same share of every block, units by the norm of their weights", uniform, importance="magnitude"
    ),
    "ranking": Method("one threshold over the normalized scores of all units", ranking),
    "random": Method("as many evaluations as the search, none guided", random),
    "student": Method("the searched structure trained from scratch", scratch=True, like="searched"),
    "int8": Method("int8 alone, nothing cut or trained", fixed=_whole("int8"), train=False),
    "longer": Method("the dense pipeline trained as long: what training alone brings", fixed=_whole("fp32")),
}
