"""TODO."""

from __future__ import annotations

import math
from typing import Any

from mmcompress.graph.blocks import count_steps, units_after
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.registry import ALLOCATIONS
from mmcompress.search.allocation import allocate_pipeline
from mmcompress.search.problem import Predict, SearchProblem
from mmcompress.search.repair import restore_dropped
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.overrides import apply_overrides
from mmcompress.spec.schema import Spec
from mmcompress.storage import build_record, to_plain
from mmcompress.workspace.context import RunContext, list_precisions

AIMED_SHARE = 0.975
"""The share of the target that structures are searched for."""


def build_problem(
    run: RunContext, ev: Sensitivity, *, predict: Predictor, budget_ms: float
) -> SearchProblem:
    """The search problem: how overrides become a candidate."""

    base = to_plain(run.spec)
    policy = ALLOCATIONS.get(run.spec.prune.allocation)

    def allocated(overrides: dict[str, Any]) -> Candidate:
        return allocate_pipeline(
            build_record(Spec, apply_overrides(base, overrides)),
            run.blocks,
            cross=run.cross_modal,
            curves=ev.curves,
            scores=ev.scores,
            policy=policy,
        )

    def resolve(overrides: dict[str, Any]) -> Candidate:
        c = allocated(overrides)
        return c if p.is_allowed(c) else restore_dropped(p, c, damage=ev.loss_increase)

    fixed, limit = allocated({}), _limit(run, predict, budget_ms=budget_ms)
    free = (list_precisions(run), _choices(run, fixed), _drops(run, fixed))
    p = SearchProblem(
        run.space, run.blocks, resolve, limit, budget_ms, *free, run.cross_modal, _protection(run)
    )
    most = lambda n, b, options: max(options) if b in run.cross_modal[n] else min(options)
    mildest = {
        n: {b: most(n, b, options) for b, options in by.items()} for n, by in p.unit_choices.items()
    }
    if (
        p.protection_excess(Candidate(mildest, fixed.precision)) > 0
    ):  # cuts that the spec itself asks for come first
        p.protection = 0.0
    return p


def _protection(run: RunContext) -> float:
    """What holds for every structure: what the spec fixes (1: nothing), or the least that is searched."""
    searched = run.space.dimensions.get("prune.protection")
    if searched:
        return searched.low or 1.0
    return run.spec.prune.protection if run.spec.prune.protection > 1 else 0.0


def _limit(run: RunContext, predict: Predictor, *, budget_ms: float) -> Predict:
    """Predicted latency; of what exceeds another limit by more than the budget, the budget exceeded by as much."""
    limits = run.spec.limits
    bounds = [(limits.params_m, lambda c: run.footprint.total_params(c) / 1e6)]
    bounds += [(limits.size_mb, lambda c: run.footprint.size_mb(c))]
    bounds += [(limits.memory_mb, lambda c: run.footprint.memory_mb(c))]
    held = [(bound * AIMED_SHARE, load) for bound, load in bounds if bound is not None]

    def ms(c: Candidate) -> float:
        shares = [load(c) / bound for bound, load in held]
        shares += [
            predict.node_ms(n, c) / (AIMED_SHARE * limit) for n, limit in limits.node_ms.items()
        ]
        return max([predict(c), *(budget_ms * s for s in shares)])

    return ms if held or limits.node_ms else predict


def find_fastest(p: SearchProblem, predict: Predictor) -> Candidate:
    """The fastest candidate of the space, as predicted: blocks as small as they may be, precisions the faster ones."""
    precision = {n: options[0] for n, options in p.precisions.items()}
    kept = {n: {b: min(options) for b, options in by.items()} for n, by in p.unit_choices.items()}
    cost = lambda n, b, k: predict(Candidate({**kept, n: {**kept[n], b: k}}, precision))
    kept = restore_dropped(
        p, Candidate(kept, precision), damage=cost
    ).kept_units  # those come back that cost least
    for n, options in p.precisions.items():
        precision[n] = min(
            options,
            key=lambda o, n=n: predict(Candidate(kept, {**precision, n: o})),  # type: ignore[misc]
        )
    return Candidate(kept, precision)


def _choices(run: RunContext, fixed: Candidate) -> dict[str, dict[str, tuple[int, ...]]]:
    """Kept counts each block may have: one where the spec fixes it, else what the space's ratio and drop allow."""

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for n, blocks in run.blocks.items():
        found[n] = {}
        drop = run.space.dimensions.get(f"nodes.{n}.prune.drop")
        for b in blocks:
            ratio = run.space.dimensions.get(f"nodes.{n}.prune.{b.group}")
            gone = drop is None and fixed.kept_units[n][b.name] == 0  # the spec says how many are
            if ratio is None or gone or b.name in run.spec.nodes[n].prune.blocks:
                found[n][b.name] = (fixed.kept_units[n][b.name],)
                continue
            low, high = ((x or 0.0) * count_steps(b) for x in (ratio.low, ratio.high))
            cuts = range(math.ceil(low - 1e-9), int(high + 1e-9) + 1) or (
                round(low),
            )  # no step between: the nearest
            options = {int(units_after(b, c)) for c in cuts} | (
                {0} if b.drop and drop and (drop.high or 0) >= 1 else set()
            )
            found[n][b.name] = tuple(sorted(options))
    return found


def _drops(run: RunContext, fixed: Candidate) -> dict[str, int]:
    """How many blocks of each node may be gone whole: what the space allows, or the spec asks for."""
    found = {}
    for n in run.blocks:
        drop = run.space.dimensions.get(f"nodes.{n}.prune.drop")
        asked = sum(k == 0 for k in fixed.kept_units[n].values())
        found[n] = max(asked, int(drop.high or 0) if drop else 0)
    return found
