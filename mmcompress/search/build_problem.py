"""The search problem of a run: choices, limits and the way from overrides to a candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial

from mmcompress.graph.blocks import (
    Block,
    count_steps,
    count_units_after,
    list_input_readers,
)
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.footprint import Footprint
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.registry import ALLOCATIONS
from mmcompress.results.records import BoundKind
from mmcompress.results.target_met import list_bounds
from mmcompress.search.allocation import allocate_pipeline
from mmcompress.search.problem import (
    Predict,
    SearchPoint,
    SearchProblem,
    replace_precision,
    replace_units,
)
from mmcompress.search.repair import restore_dropped
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.overrides import override_spec
from mmcompress.spec.schema import Limits, Spec
from mmcompress.spec.space import Dimension, Space
from mmcompress.workspace.context import RunContext, list_precisions

AIMED_SHARE = 0.97
"""Share of the target that structures are searched for: what is made must not miss it by chance."""

AIMED_LIMIT_SHARE = 0.975
"""Share of every other limit that structures are searched for."""


def build_problem(
    run: RunContext, sensitivity: Sensitivity, *, predictor: Predictor, budget_ms: float
) -> SearchProblem:
    """Build the search problem of a run.

    Args:
        run: Spec, space and models.
        sensitivity: Importance, and loss increases of cuts.
        predictor: Predicts latencies.
        budget_ms: Milliseconds that a structure may be predicted to take.

    Returns:
        The problem; its `resolve` restores dropped blocks where too many are gone.
    """
    policy = ALLOCATIONS.get(run.spec.prune.allocation)

    def allocate(overrides: SearchPoint) -> Candidate:
        return allocate_pipeline(
            override_spec(run.spec, overrides),
            run.blocks,
            cross_modal=run.cross_modal,
            curves=sensitivity.curves,
            scores=sensitivity.scores,
            policy=policy,
        )

    spec_candidate = allocate({})
    unit_choices = _list_unit_choices(run, spec_candidate)
    problem = SearchProblem(
        space=run.space,
        blocks=run.blocks,
        resolve=allocate,
        predict=_make_predict(run, sensitivity, predictor=predictor, budget_ms=budget_ms),
        budget_ms=budget_ms,
        precisions=list_precisions(run),
        unit_choices=unit_choices,
        max_drops=_list_max_drops(run, spec_candidate),
        input_readers=_list_required_readers(run, unit_choices),
        cross_modal=run.cross_modal,
        protection=_find_protection(run.spec, run.space),
        cross_modal_loss_weight=run.spec.prune.protection,
    )
    mildest = _find_most_protected(problem, spec_candidate.precision)
    if problem.compute_protection_excess(mildest) > 0:
        # Cuts that the spec itself asks for come first.
        problem = replace(problem, protection=0.0)

    def resolve(overrides: SearchPoint) -> Candidate:
        candidate = allocate(overrides)
        if problem.is_allowed(candidate):
            return candidate
        return restore_dropped(problem, candidate, loss_increase=sensitivity.estimate_loss_increase)

    return replace(problem, resolve=resolve)


def _find_protection(spec: Spec, space: Space) -> float:
    """Find the protection that always holds: that of the spec, or the least that is searched."""
    dimension = space.dimensions.get("prune.protection")
    if dimension is not None:
        return dimension.low or 1.0
    # A protection of 1 in the spec asks for none.
    return spec.prune.protection if spec.prune.protection > 1 else 0.0


def _find_most_protected(problem: SearchProblem, precision: dict[str, str]) -> Candidate:
    """Find the structure with the most cross-modal and the fewest other units."""
    kept_units: dict[str, dict[str, int]] = {}
    for node_name, choices_by_block in problem.unit_choices.items():
        kept_units[node_name] = {}
        for block_name, choices in choices_by_block.items():
            is_cross_modal = block_name in problem.cross_modal[node_name]
            kept_units[node_name][block_name] = max(choices) if is_cross_modal else min(choices)
    return Candidate(kept_units=kept_units, precision=precision)


def _make_predict(
    run: RunContext, sensitivity: Sensitivity, *, predictor: Predictor, budget_ms: float
) -> Predict:
    """Make a prediction that exceeds the budget by as much as any other limit is exceeded."""
    limits = run.spec.limits
    if replace(limits, retained=None) == Limits():
        return predictor
    predict_load = LoadPredictor(run, sensitivity, predictor=predictor)

    def predict_worst_ms(candidate: Candidate) -> float:
        worst_ms = predictor(candidate)
        for bound in list_bounds(limits, partial(predict_load, candidate)):
            worst_ms = max(worst_ms, budget_ms * bound.value / (bound.limit * AIMED_LIMIT_SHARE))
        return worst_ms

    return predict_worst_ms


class LoadPredictor:
    """Predicts what a candidate takes of each limit."""

    def __init__(self, run: RunContext, sensitivity: Sensitivity, *, predictor: Predictor):
        self._run = run
        self._fp32_blocks = sensitivity.fp32_blocks
        self._predictor = predictor

    def __call__(self, candidate: Candidate, kind: BoundKind, node: str) -> float:
        """Return the load of a candidate, in the unit of the limit."""
        if kind == "p50":
            return self._predictor.predict_node_ms(node, candidate)
        if kind == "parameters":
            return self._footprint.count_params(candidate) / 1e6
        if kind == "size":
            return self._footprint.predict_size_mb(candidate)
        return self._footprint.predict_memory_mb(candidate)

    @cached_property
    def _footprint(self) -> Footprint:
        """It is measured when it is first asked for: only where a limit needs it."""
        footprint = self._run.measure_footprint(self._predictor.size_fits)
        return replace(footprint, fp32_blocks=self._fp32_blocks)


def find_fastest(problem: SearchProblem, predictor: Predictor) -> Candidate:
    """Find the candidate of the space that is predicted to be fastest.

    Blocks are as small as they may be. Those that must stay are the ones that cost least. Each node
    then gets its fastest precision.

    Args:
        problem: Units and precisions that may be chosen, and limits.
        predictor: Predicts latencies.

    Returns:
        The candidate; its prediction is the floor of the space.
    """
    precision = {name: choices[0] for name, choices in problem.precisions.items()}
    kept_units: dict[str, dict[str, int]] = {}
    for node_name, choices_by_block in problem.unit_choices.items():
        kept_units[node_name] = {name: min(choices) for name, choices in choices_by_block.items()}
    smallest = Candidate(kept_units=kept_units, precision=precision)

    def predict_with_units(node_name: str, block_name: str, *, kept: int) -> float:
        return predictor(replace_units(smallest, node_name, block_name=block_name, units=kept))

    # In place of a loss: the block whose return takes least time gains most by it.
    fastest = restore_dropped(problem, smallest, loss_increase=predict_with_units)
    for node_name, choices in problem.precisions.items():
        options = [
            replace_precision(fastest, node_name, precision=precision) for precision in choices
        ]
        fastest = min(options, key=predictor)
    return fastest


def _list_unit_choices(
    run: RunContext, spec_candidate: Candidate
) -> dict[str, dict[str, tuple[int, ...]]]:
    """List the units each block may keep: what the spec fixes, else what the space allows."""
    choices: dict[str, dict[str, tuple[int, ...]]] = {}
    for node_name, blocks in run.blocks.items():
        choices[node_name] = {}
        for block in blocks:
            choices[node_name][block.name] = _list_block_choices(
                block,
                run.spec.nodes[node_name].prune.blocks,
                spec_units=spec_candidate.kept_units[node_name][block.name],
                ratio=run.space.dimensions.get(f"nodes.{node_name}.prune.{block.group}"),
                drop=run.space.dimensions.get(f"nodes.{node_name}.prune.drop"),
            )
    return choices


def _list_block_choices(
    block: Block,
    fixed_ratios: Mapping[str, float],
    *,
    spec_units: int,
    ratio: Dimension | None,
    drop: Dimension | None,
) -> tuple[int, ...]:
    """List the units one block may keep, ascending."""
    # Without a dimension for drops the spec says which blocks are gone.
    is_dropped_by_spec = drop is None and spec_units == 0
    if ratio is None or is_dropped_by_spec or block.name in fixed_ratios:
        return (spec_units,)
    low = (ratio.low or 0.0) * count_steps(block)
    high = (ratio.high or 0.0) * count_steps(block)
    steps = list(range(math.ceil(low - 1e-9), int(high + 1e-9) + 1))
    if not steps:
        # No step lies between the bounds: the nearest one is taken.
        steps = [round(low)]
    choices = {int(count_units_after(block, step)) for step in steps}
    if block.drop and drop is not None and (drop.high or 0) >= 1:
        choices.add(0)
    return tuple(sorted(choices))


def _list_max_drops(run: RunContext, spec_candidate: Candidate) -> dict[str, int]:
    """List how many blocks of each node may be dropped, by the space or by the spec."""
    max_drops: dict[str, int] = {}
    for node_name in run.blocks:
        dimension = run.space.dimensions.get(f"nodes.{node_name}.prune.drop")
        searched = int(dimension.high or 0) if dimension is not None else 0
        kept_units = spec_candidate.kept_units[node_name]
        fixed_drops = sum(units == 0 for units in kept_units.values())
        max_drops[node_name] = max(fixed_drops, searched)
    return max_drops


def _list_required_readers(
    run: RunContext, unit_choices: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, tuple[str, ...]]:
    """List the blocks of which one must stay, by node; none where the spec drops all of them."""
    readers_by_node: dict[str, tuple[str, ...]] = {}
    for node_name, blocks in run.blocks.items():
        readers = list_input_readers(blocks)
        if any(max(unit_choices[node_name][name]) > 0 for name in readers):
            readers_by_node[node_name] = readers
    return readers_by_node
