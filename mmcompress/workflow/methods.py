"""Ways to choose a structure, to be compared at equal measured latency: each a row of `METHODS`.

A method's `propose(run, evidence)` is a context that gives a `Propose` (see `fit`), None for a structure that is what
it is. What follows (refit, distillation, export, measurement) is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mmcompress.errors import SpecError
from mmcompress.measure.predict import Predictor
from mmcompress.prune.allocation import after, apportioned, steps
from mmcompress.records import Candidate, Trial
from mmcompress.search import moves
from mmcompress.workflow.choose import chosen, floor, jury, problem, search, splits
from mmcompress.workflow.fit import Propose, searching
from mmcompress.workflow.relinearize import evaluations, relinearized
from mmcompress.workflow.state import Run, precisions_of
from mmcompress.workflow.tryout import tried_out

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

Build = Callable[[float, dict[str, str]], Candidate]
"""(share removed, 0 .. 1, precision of each node) -> candidate."""


@dataclass(frozen=True)
class Method:
    """How a structure is chosen, and what is special beside it.

    `fixed`: a candidate that is not fitted to the target; `importance`: another criterion than the spec's; `scratch`:
    its weights are thrown away before training; `like`: the method whose structure it takes; `train`: whether it is
    trained at all; `alone`: by the pipeline's own loss, not by that of a teacher.
    """

    about: str
    propose: Callable[[Run, Any], AbstractContextManager[Propose]] | None = None
    fixed: Callable[[Run], Candidate] | None = None
    importance: str = ""
    scratch: bool = False
    like: str = ""
    train: bool = True
    alone: bool = False
    positions: bool = False
    """Of use only where the space cuts positions."""
    judging: bool = False
    """Of use only where structures are judged by running them, and damage is measured anew."""

    @property
    def needs(self) -> str:
        """Why it may be of no use."""
        return "the search space cuts no positions" if self.positions else "search.relinearize is off"

    def suits(self, run: Run) -> bool:
        """Whether it is of use in a run."""
        cuts = any(path.endswith(".prune.tokens") for path in run.space.dimensions)
        return (cuts or not self.positions) and (evaluations(run) > 0 or not self.judging)


def _trial(name: str, candidate: Candidate, ms: float) -> Trial:
    return Trial(0, name, {}, candidate, ms, 0.0, {}, 0.0)


def _quickest(run: Run, predict: Predictor) -> dict[str, str]:
    """The precision of each node in which it is fastest whole, of those it may have."""
    whole = {n: {b.name: b.units for b in blocks} for n, blocks in run.blocks.items()}
    options = precisions_of(run)
    first = {n: of[0] for n, of in options.items()}
    taking = lambda n, p: predict(Candidate(whole, {**first, n: p}))
    return {n: min(of, key=lambda p, n=n: taking(n, p)) for n, of in options.items()}  # type: ignore[misc]


def _scaled(run: Run, ev: Evidence, build: Build, name: str) -> Propose:
    """The least share removed at which a build meets the budget and every other limit, by bisection.

    What the spec fixes stays, and no block is cut further than the space allows.
    """

    def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial:
        p, precision = problem(run, ev, predict, budget_ms), _quickest(run, predict)

        def cut(share: float, whole: bool = False) -> Candidate:
            c, kept = build(share, precision), {}
            for n, by in c.kept.items():
                options = {b: [k for k in p.choices[n][b] if k or whole] or [0] for b in by}
                kept[n] = {b: min(options[b], key=lambda o, k=k: abs(o - k)) for b, k in by.items()}  # type: ignore[misc]
            return Candidate(kept, precision)

        gone = p.predict(cut(1.0)) > budget_ms  # units alone are not enough: whole blocks go as well
        low, high = 0.0, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            low, high = (middle, high) if p.predict(cut(middle, gone)) > budget_ms else (low, middle)
        candidate = cut(high, gone)
        return _trial(name, candidate, p.predict(candidate))

    return propose


@contextmanager
def uniform(run: Run, ev: Evidence, positions: bool = False) -> Iterator[Propose]:
    """`positions`: image patches and the end of an audio window are cut by the same share."""
    cut = [(n, b) for n, blocks in run.blocks.items() for b in blocks if positions or b.group != "tokens"]
    sizes = [steps(b) for _, b in cut]

    def build(share: float, precision: dict[str, str]) -> Candidate:
        # the remainder block by block: blocks of one size all losing a head together would jump over the target
        kept = {n: {b.name: b.units for b in blocks} for n, blocks in run.blocks.items()}
        for (n, b), cuts in zip(cut, apportioned(sizes, round(share * sum(sizes))), strict=True):
            kept[n][b.name] = int(after(b, cuts))
        return Candidate(kept, precision)

    yield _scaled(run, ev, build, "uniform")


@contextmanager
def ranking(run: Run, ev: Evidence) -> Iterator[Propose]:
    """One threshold over all groups of all models, scores divided by the mean of their block (Torch-Pruning)."""
    order = []
    for n, blocks in run.blocks.items():
        for b in blocks:
            if b.group != "tokens":
                low = ev.scores[n][b.name].sort().values
                mean = float(low.abs().mean()) or 1.0  # scores of movement have a sign
                order += [(float(piece.mean()) / mean, n, b.name) for piece in low.split(b.step)]
    order.sort(key=lambda row: row[0])

    def build(share: float, precision: dict[str, str]) -> Candidate:
        cuts: dict[tuple[str, str], int] = {}
        for _, n, name in order[: round(share * len(order))]:
            cuts[n, name] = cuts.get((n, name), 0) + 1
        kept = {n: {b.name: int(after(b, cuts.get((n, b.name), 0))) for b in bs} for n, bs in run.blocks.items()}
        return Candidate(kept, precision)

    yield _scaled(run, ev, build, "ranking")


@contextmanager
def knapsack(run: Run, ev: Evidence) -> Iterator[Propose]:
    yield lambda predict, budget_ms, attempt: _split(run, ev, predict, budget_ms)


def _split(run: Run, ev: Evidence, predict: Predictor, budget_ms: float) -> Trial:
    """The best split of a budget, the fastest structure where there is none."""
    p = problem(run, ev, predict, budget_ms)
    found = splits(run, ev, predict, budget_ms, p)
    best = next((c for _, c in found if p.predict(c) <= budget_ms), None)
    # as the search, it uses up its budget: levels and costs of the knapsack are rounded
    best = moves.fill(p, best, ev.damage, ev.rounding) if best else floor(p, predict)
    return _trial("knapsack", best, p.predict(best))


@contextmanager
def among(run: Run, ev: Evidence) -> Iterator[Propose]:
    """The knapsack after the rounds that the search begins with; where they are of no use, before them."""
    with jury(run, ev) as who:

        def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial:
            _, good = relinearized(run, ev, predict, budget_ms, who)
            if not good:
                return _split(run, ev, predict, budget_ms)
            return _trial("relinearized", good[0], problem(run, ev, predict, budget_ms).predict(good[0]))

        yield propose


@contextmanager
def separate(run: Run, ev: Evidence) -> Iterator[Propose]:
    """Every model alone must become as much faster as the pipeline: no budget moves from one to another.

    One that can't is as fast as it gets.
    """

    def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial:
        p = problem(run, ev, predict, budget_ms)
        whole = Candidate({n: {} for n in run.blocks}, dict.fromkeys(run.blocks, "fp32"))
        beside = predict.factor * predict.overhead_ms
        share = (budget_ms - beside) / (predict(whole) - beside)
        kept, precision, fastest = {}, {}, floor(p, predict)
        for n in run.blocks:
            alone = replace(predict, overhead_ms=0.0)
            found = splits(run, ev, alone, share * predict.tail * predict.node_ms(n, whole), p, [n])
            best = found[0][1] if found else fastest
            kept[n], precision[n] = best.kept[n], best.precision[n]
        candidate = moves.revive(p, Candidate(kept, precision), ev.damage)
        candidate = moves.trim(p, candidate, ev.damage) or candidate  # what came back is paid for
        return _trial("separate", candidate, p.predict(candidate))

    yield propose


@contextmanager
def random(run: Run, ev: Evidence) -> Iterator[Propose]:
    """As many evaluations as the search has, none of them guided."""
    s = run.spec.search
    blind = replace(s, sampler="random", trials=s.trials + s.mutations, mutations=0)
    run = dataclasses.replace(run, spec=replace(run.spec, search=blind))
    with jury(run, ev) as who:

        def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial | None:
            trials = search(run, ev, predict, budget_ms, who, attempt, blind=evaluations(run))
            return tried_out(run, ev, predict, budget_ms, trials, chosen(run, who, trials, budget_ms))

        yield propose


def _whole(precision: str) -> Callable[[Run], Candidate]:
    def candidate(run: Run) -> Candidate:
        kept = {n: {b.name: b.units for b in blocks} for n, blocks in run.blocks.items()}
        use = {
            n: precision if precision == "fp32" or precision in of else of[0] for n, of in precisions_of(run).items()
        }
        if precision != "fp32" and precision not in use.values():
            raise SpecError(f"compare: no node may be {precision} in this search space; leave '{precision}' out")
        return Candidate(kept, use)

    return candidate


METHODS = {
    "searched": Method("the search of this tool", searching),
    "knapsack": Method("the best split of the budget by measured damage alone, nothing searched", knapsack),
    "relinearized": Method(
        "the knapsack with damage measured anew among the other cuts, nothing searched", among, judging=True
    ),
    "separate": Method("a budget for each model instead of one for all", separate),
    "uniform": Method("the same share of every block", uniform),
    "shortened": Method(
        "the same share of every block and of the positions", partial(uniform, positions=True), positions=True
    ),
    "magnitude": Method(
        "the same share of every block, units by the norm of their weights", uniform, importance="magnitude"
    ),
    "ranking": Method("one threshold over the normalized scores of all units", ranking),
    "random": Method("as many evaluations as the search, none guided", random),
    "student": Method("the searched structure trained from scratch", scratch=True, like="searched"),
    "int8": Method("int8 alone, nothing cut or trained", fixed=_whole("int8"), train=False),
    "longer": Method(
        "the dense pipeline trained for as many steps, by its own loss: what training alone brings",
        fixed=_whole("fp32"),
        alone=True,
    ),
}
