"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.search.problem import SearchProblem
from mmcompress.search.repair import cut_to_budget, restore_dropped
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.split import split_by_knapsack
from mmcompress.workspace.context import RunContext

MAX_SPLITS = 12
"""How many of the knapsack's splits are looked at, the best ones."""


def split_budget(
    run: RunContext,
    ev: Sensitivity,
    *,
    predict: Predictor,
    budget_ms: float,
    p: SearchProblem,
    nodes: Sequence[str] = (),
) -> list[tuple[float, Candidate]]:
    """The knapsack's splits of a budget over some of the nodes (default: all), least estimated damage first.

    It adds up what the nodes take. Where branches run in parallel it is given more than the budget, as much as leaves
    the critical path within.
    """

    part = lambda by: {n: by[n] for n in nodes or run.blocks}
    given = (part(run.blocks), part(run.cross_modal), part(ev.curves), replace(predict, reads={}))
    rest = (run.spec.prune.protection, part(p.precisions), part(ev.rounding), part(p.unit_choices))

    def solved(ms: float) -> list[tuple[float, Candidate]]:
        rows = split_by_knapsack(*given, ms, *rest)
        if nodes:  # of a part of the pipeline the rest is not known
            return rows
        held: list[tuple[float, Candidate]] = []
        for damage, c in rows:  # what is mended does no less harm: those behind are worse
            if p.is_allowed(c):
                held.append((damage, c))
            elif mended := cut_to_budget(
                p, restore_dropped(p, c, damage=ev.loss_increase), damage=ev.loss_increase
            ):
                held.append((estimated(mended), mended))
            if len(held) == MAX_SPLITS:
                break
        return sorted(held, key=lambda f: f[0])

    def estimated(c: Candidate) -> float:
        weight = lambda n, b: run.spec.prune.protection if b in run.cross_modal[n] else 1.0
        cuts = sum(
            weight(n, b) * ev.loss_increase(n, b, k)
            for n, by in c.kept_units.items()
            for b, k in by.items()
        )
        return cuts + sum(ev.rounding[n][of] for n, of in c.precision.items())

    found = solved(budget_ms)
    low, high = 1.0, float(len(run.blocks)) if predict.reads and not nodes else 1.0
    for _ in range(6 if high > low else 0):
        middle = (low + high) / 2
        within = [f for f in solved(middle * budget_ms) if predict(f[1]) <= budget_ms]
        low, high = (middle, high) if within else (low, middle)
        found = within or found
    return found
