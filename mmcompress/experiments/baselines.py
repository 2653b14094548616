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
from typing import Any

from mmcompress.errors import SpecError
from mmcompress.graph.blocks import units_after
from mmcompress.graph.structure import Candidate, cut_uniformly
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Trial
from mmcompress.run.fit import Propose, open_search
from mmcompress.search.bisection import bisect_share
from mmcompress.search.build_problem import build_problem, find_fastest
from mmcompress.search.evaluator import start_evaluator
from mmcompress.search.linearize import count_max_evaluations, linearize_successively
from mmcompress.search.repair import cut_to_budget, grow_to_budget, restore_dropped
from mmcompress.search.run_search import choose_trial, run_unguided_search
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.short_finetune import rank_by_short_finetuning
from mmcompress.search.split_budget import split_budget
from mmcompress.workspace.context import RunContext, list_precisions

Build = Callable[[float, dict[str, str]], Candidate]
"""(share removed, 0 .. 1, precision of each node) -> candidate."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """How a structure is chosen, and what is special beside it.

    `fixed`: a candidate that is not fitted to the target; `importance`: another criterion than the spec's; `scratch`:
    its weights are thrown away before training; `like`: the method whose structure it takes; `train`: whether it is
    trained at all; `alone`: by the pipeline's own loss, not by that of a teacher.
    """

    about: str
    propose: Callable[[RunContext, Any], AbstractContextManager[Propose]] | None = None
    fixed: Callable[[RunContext], Candidate] | None = None
    importance: str = ""
    scratch: bool = False
    structure_of: str = ""
    train: bool = True
    task_loss_only: bool = False
    needs_positions: bool = False
    """Of use only where the space cuts positions."""
    needs_linearization: bool = False
    """Of use only where structures are judged by running them, and damage is measured anew."""

    @property
    def why_unsuitable(self) -> str:
        """Why it may be of no use."""
        return (
            "the search space cuts no positions"
            if self.needs_positions
            else "search.linearization_rounds is off"
        )

    def is_suitable(self, run: RunContext) -> bool:
        """Whether it is of use in a run."""
        cuts = any(path.endswith(".prune.tokens") for path in run.space.dimensions)
        return (cuts or not self.needs_positions) and (
            count_max_evaluations(run) > 0 or not self.needs_linearization
        )


def _trial(name: str, candidate: Candidate, *, ms: float) -> Trial:
    return Trial(
        number=0,
        origin=name,
        overrides={},
        candidate=candidate,
        latency_ms=ms,
        loss=0.0,
        quality={},
        evaluation_seconds=0.0,
    )


def _quickest(run: RunContext, predict: Predictor) -> dict[str, str]:
    """The precision of each node in which it is fastest whole, of those it may have."""
    whole = {n: {b.name: b.units for b in blocks} for n, blocks in run.blocks.items()}
    options = list_precisions(run)
    first = {n: of[0] for n, of in options.items()}
    taking = lambda n, p: predict(Candidate(whole, {**first, n: p}))
    return {n: min(of, key=lambda p, n=n: taking(n, p)) for n, of in options.items()}  # type: ignore[misc]


def _scaled(run: RunContext, ev: Sensitivity, *, build: Build, name: str) -> Propose:
    """The least share removed at which a build meets the budget and every other limit, by bisection.

    What the spec fixes stays, and no block is cut further than the space allows.
    """

    def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial:
        p, precision = (
            build_problem(run, ev, predictor=predict, budget_ms=budget_ms),
            _quickest(run, predict),
        )

        def cut(share: float, whole: bool = False) -> Candidate:
            c, kept = build(share, precision), {}
            for n, by in c.kept_units.items():
                options = {b: [k for k in p.unit_choices[n][b] if k or whole] or [0] for b in by}
                kept[n] = {b: min(options[b], key=lambda o, k=k: abs(o - k)) for b, k in by.items()}  # type: ignore[misc]
            return Candidate(kept, precision)

        gone = (
            p.predict(cut(1.0)) > budget_ms
        )  # units alone are not enough: whole blocks go as well

        def fits_budget(share: float) -> bool:
            return p.predict(cut(share, gone)) <= budget_ms

        _, share = bisect_share(fits_budget, low=0.0, high=1.0, steps=14)
        candidate = cut(share, gone)
        return _trial(name, candidate, ms=p.predict(candidate))

    return propose


@contextmanager
def propose_uniform(run: RunContext, ev: Sensitivity, positions: bool = False) -> Iterator[Propose]:
    """`positions`: image patches and the end of an audio window are cut by the same share."""

    def build(share: float, precision: dict[str, str]) -> Candidate:
        return Candidate(cut_uniformly(run.blocks, share, cut_positions=positions), precision)

    yield _scaled(run, ev, build=build, name="uniform")


@contextmanager
def propose_by_ranking(run: RunContext, ev: Sensitivity) -> Iterator[Propose]:
    """One threshold over all groups of all models, scores divided by the mean of their block (Torch-Pruning)."""
    order = []
    for n, blocks in run.blocks.items():
        for b in blocks:
            if b.group != "tokens":
                low = ev.scores[n][b.name].sort().values
                mean = float(low.abs().mean()) or 1.0  # scores of movement have a sign
                order += [
                    (float(piece.mean()) / mean, n, b.name) for piece in low.split(b.granularity)
                ]
    order.sort(key=lambda row: row[0])

    def build(share: float, precision: dict[str, str]) -> Candidate:
        cuts: dict[tuple[str, str], int] = {}
        for _, n, name in order[: round(share * len(order))]:
            cuts[n, name] = cuts.get((n, name), 0) + 1
        kept = {
            n: {b.name: int(units_after(b, cuts.get((n, b.name), 0))) for b in bs}
            for n, bs in run.blocks.items()
        }
        return Candidate(kept, precision)

    yield _scaled(run, ev, build=build, name="ranking")


@contextmanager
def propose_by_knapsack(run: RunContext, ev: Sensitivity) -> Iterator[Propose]:
    yield lambda predict, budget_ms, attempt: _split(run, ev, predict=predict, budget_ms=budget_ms)


def _split(run: RunContext, ev: Sensitivity, *, predict: Predictor, budget_ms: float) -> Trial:
    """The best split of a budget, the fastest structure where there is none."""
    p = build_problem(run, ev, predictor=predict, budget_ms=budget_ms)
    found = split_budget(p, ev, predictor=predict, budget_ms=budget_ms)
    best = next((c for c in found if p.predict(c) <= budget_ms), None)
    # as the search, it uses up its budget: levels and costs of the knapsack are rounded
    best = (
        grow_to_budget(p, best, loss_increase=ev.loss_increase, rounding=ev.rounding)
        if best
        else find_fastest(p, predict)
    )
    return _trial("knapsack", best, ms=p.predict(best))


@contextmanager
def propose_relinearized(run: RunContext, ev: Sensitivity) -> Iterator[Propose]:
    """The knapsack after the rounds that the search begins with; where they are of no use, before them."""
    with start_evaluator(run, ev) as who:

        def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial:
            _, good = linearize_successively(
                run, ev, predictor=predict, budget_ms=budget_ms, evaluator=who
            )
            if not good:
                return _split(run, ev, predict=predict, budget_ms=budget_ms)
            return _trial(
                "relinearized",
                good[0],
                ms=build_problem(run, ev, predictor=predict, budget_ms=budget_ms).predict(good[0]),
            )

        yield propose


@contextmanager
def propose_separately(run: RunContext, ev: Sensitivity) -> Iterator[Propose]:
    """Every model alone must become as much faster as the pipeline: no budget moves from one to another.

    One that can't is as fast as it gets.
    """

    def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial:
        p = build_problem(run, ev, predictor=predict, budget_ms=budget_ms)
        whole = Candidate({n: {} for n in run.blocks}, dict.fromkeys(run.blocks, "fp32"))
        beside = predict.factor * predict.overhead_ms
        share = (budget_ms - beside) / (predict(whole) - beside)
        kept, precision, fastest = {}, {}, find_fastest(p, predict)
        for n in run.blocks:
            alone = replace(predict, overhead_ms=0.0)
            found = split_budget(
                p,
                ev,
                predictor=alone,
                budget_ms=share * predict.p95_ratio * predict.node_ms(n, whole),
                nodes=[n],
            )
            best = found[0] if found else fastest
            kept[n], precision[n] = best.kept_units[n], best.precision[n]
        candidate = restore_dropped(p, Candidate(kept, precision), loss_increase=ev.loss_increase)
        candidate = (
            cut_to_budget(p, candidate, loss_increase=ev.loss_increase) or candidate
        )  # what came back is paid for
        return _trial("separate", candidate, ms=p.predict(candidate))

    yield propose


@contextmanager
def propose_at_random(run: RunContext, ev: Sensitivity) -> Iterator[Propose]:
    """As many evaluations as the search has, none of them guided."""
    s = run.spec.search
    blind = replace(s, sampler="random", trials=s.trials + s.level_switches, level_switches=0)
    run = dataclasses.replace(run, spec=replace(run.spec, search=blind))
    with start_evaluator(run, ev) as who:

        def propose(predict: Predictor, budget_ms: float, attempt: int) -> Trial | None:
            trials = run_unguided_search(
                run,
                ev,
                predictor=predict,
                budget_ms=budget_ms,
                evaluator=who,
                attempt=attempt,
                extra_trials=count_max_evaluations(run),
            )
            return rank_by_short_finetuning(
                run,
                ev,
                predictor=predict,
                budget_ms=budget_ms,
                trials=trials,
                best=choose_trial(run, who, trials=trials, budget_ms=budget_ms),
            )

        yield propose


def _whole(precision: str) -> Callable[[RunContext], Candidate]:
    def candidate(run: RunContext) -> Candidate:
        kept = {n: {b.name: b.units for b in blocks} for n, blocks in run.blocks.items()}
        use = {
            n: precision if precision == "fp32" or precision in of else of[0]
            for n, of in list_precisions(run).items()
        }
        if precision != "fp32" and precision not in use.values():
            raise SpecError(
                f"compare: no node may be {precision} in this search space; leave '{precision}' out"
            )
        return Candidate(kept, use)

    return candidate


BASELINES = {
    "searched": Baseline(about="the search of this tool", propose=open_search),
    "knapsack": Baseline(
        about="the best split of the budget by measured damage alone, nothing searched",
        propose=propose_by_knapsack,
    ),
    "relinearized": Baseline(
        about="the knapsack with damage measured anew among the other cuts, nothing searched",
        propose=propose_relinearized,
        needs_linearization=True,
    ),
    "separate": Baseline(
        about="a budget for each model instead of one for all", propose=propose_separately
    ),
    "uniform": Baseline(about="the same share of every block", propose=propose_uniform),
    "shortened": Baseline(
        about="the same share of every block and of the positions",
        propose=partial(propose_uniform, positions=True),
        needs_positions=True,
    ),
    "magnitude": Baseline(
        about="the same share of every block, units by the norm of their weights",
        propose=propose_uniform,
        importance="magnitude",
    ),
    "ranking": Baseline(
        about="one threshold over the normalized scores of all units", propose=propose_by_ranking
    ),
    "random": Baseline(
        about="as many evaluations as the search, none guided", propose=propose_at_random
    ),
    "student": Baseline(
        about="the searched structure trained from scratch", scratch=True, structure_of="searched"
    ),
    "int8": Baseline(about="int8 alone, nothing cut or trained", fixed=_whole("int8"), train=False),
    "longer": Baseline(
        about="the dense pipeline trained for as many steps, by its own loss: what training alone brings",
        fixed=_whole("fp32"),
        task_loss_only=True,
    ),
}
