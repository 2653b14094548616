"""The search problem: space, constraints, and the ways between points and structures.

A *point* has a value for every dimension of the space. *Overrides* change the spec, down to single
blocks. A *candidate* is the structure that follows. All functions are pure and run without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mmcompress.graph.blocks import Block, count_droppable_blocks, count_steps
from mmcompress.graph.structure import Candidate, KeptUnits, measure_removed_share
from mmcompress.results.records import Trial
from mmcompress.search.bisection import bisect_share
from mmcompress.spec.space import Dimension, Space

SearchPoint = dict[str, float | str]
"""Values by dotted path of the spec: ratios, counts of dropped blocks, precisions."""


Resolve = Callable[[SearchPoint], Candidate]
"""(overrides of the spec) -> the structure they describe."""


Predict = Callable[[Candidate], float]
"""(candidate) -> predicted latency in milliseconds."""


class LossIncrease(Protocol):
    """Estimates the rise of the pipeline's loss when one block keeps `kept` units."""

    def __call__(self, node: str, block: str, /, *, kept: int) -> float: ...


BUDGET_SHARE = 0.995
"""Share of the budget that proposals are scaled to, so that rounding lifts none over it."""


MAX_RATIO_FACTOR = 8.0
"""Factor: the most by which ratios are scaled up; a ratio of 1/8 then cuts everything."""


RATIO_BISECTION_STEPS = 12
"""Halvings of the factor: its error is then 8 / 2^12, that is 0.002."""


PROTECTION_TOLERANCE = 1e-9
"""Share of units: what the protection may be missed by, as sums round."""


@dataclass(kw_only=True)
class SearchProblem:
    """What is searched, what a structure is predicted to take, and the limits that hold for it."""

    space: Space
    """The dimensions that are searched."""
    blocks: dict[str, tuple[Block, ...]]
    """Blocks by node."""
    resolve: Resolve
    """Makes a candidate of overrides."""
    predict: Predict
    """Predicts milliseconds; an exceeded limit raises the result to budget × its ratio."""
    budget_ms: float
    """Milliseconds a candidate may be predicted to take."""
    precisions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Precisions by node, as they may be chosen; a node that is not listed keeps its precision."""
    unit_choices: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """Units a block may keep, ascending, by node and block; a block that is not listed is free."""
    max_drops: dict[str, int] = field(default_factory=dict)
    """Blocks of a node that may be gone whole; a node that is not listed is free."""
    input_readers: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Names of the blocks of which one must stay, by node: through them it reads its input."""
    cross_modal: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Names of the blocks where modalities meet, by node."""
    protection: float = 0.0
    """Factor: cross-modal share removed times this is at most the unimodal one; 0: no limit."""
    cross_modal_loss_weight: float = 1.0
    """Factor: how much more the loss of a cross-modal cut counts where the budget is split."""

    def compute_removed_shares(self, candidate: Candidate) -> tuple[float, float]:
        """Compute the removed shares of unimodal and cross-modal units; 0 where a kind is
        missing."""
        unimodal = measure_removed_share(
            candidate.kept_units, self.blocks, cross=self.cross_modal, crossing=False
        )
        cross_modal = measure_removed_share(
            candidate.kept_units, self.blocks, cross=self.cross_modal, crossing=True
        )
        if unimodal is None or cross_modal is None:
            return 0.0, 0.0
        return unimodal, cross_modal

    def compute_protection_excess(self, candidate: Candidate) -> float:
        """Compute the share cut beyond what the protection allows; at most 0 where it holds."""
        unimodal, cross_modal = self.compute_removed_shares(candidate)
        return cross_modal * self.protection - unimodal - PROTECTION_TOLERANCE

    def is_allowed(self, candidate: Candidate) -> bool:
        """Tell whether every node kept the blocks that it must, and the protection holds."""
        for node_name, max_drops in self.max_drops.items():
            if _count_dropped_blocks(candidate.kept_units.get(node_name, {})) > max_drops:
                return False
        if any(self.lost_its_input(candidate, node_name) for node_name in self.input_readers):
            return False
        return self.compute_protection_excess(candidate) <= 0

    def lost_its_input(self, candidate: Candidate, node_name: str) -> bool:
        """Tell whether a node lost every block through which it reads its input."""
        kept_units = candidate.kept_units.get(node_name, {})
        readers = self.input_readers.get(node_name, ())
        return bool(readers) and all(kept_units.get(name) == 0 for name in readers)

    def list_unit_choices(self, node_name: str, block_name: str) -> tuple[int, ...]:
        """List the units a block may keep, ascending; empty where it is free."""
        return self.unit_choices.get(node_name, {}).get(block_name, ())

    def find_nearest_choice(self, node_name: str, block_name: str, *, units: int) -> int:
        """Find the number of units nearest to the given one that a block may keep."""
        choices = self.list_unit_choices(node_name, block_name)
        if not choices:
            return units
        return min(choices, key=lambda choice: abs(choice - units))


def _count_dropped_blocks(kept_units: Mapping[str, int]) -> int:
    """Count the blocks of one node that keep no unit."""
    return sum(units == 0 for units in kept_units.values())


def is_ratio_path(path: str) -> bool:
    """Tell whether a dotted path of the spec leads to a pruning ratio of a node."""
    return path.endswith((".prune.heads", ".prune.ffn", ".prune.tokens"))


def scale_to_budget(
    problem: SearchProblem, overrides: SearchPoint
) -> tuple[SearchPoint, Candidate]:
    """Scale the ratios of a proposal together to the largest pipeline within the budget.

    Args:
        problem: What is searched, with the budget.
        overrides: A proposal; everything in it but the ratios stays.

    Returns:
        The scaled proposal and its candidate; the smallest one where nothing is within the budget.
    """
    limit_ms = problem.budget_ms * BUDGET_SHARE

    def fits_budget(factor: float) -> bool:
        candidate = problem.resolve(_scale_ratios(problem, overrides, factor=factor))
        return problem.predict(candidate) <= limit_ms

    factor = MAX_RATIO_FACTOR
    if fits_budget(MAX_RATIO_FACTOR):
        _, factor = bisect_share(
            fits_budget, low=0.0, high=MAX_RATIO_FACTOR, steps=RATIO_BISECTION_STEPS
        )
    scaled = _scale_ratios(problem, overrides, factor=factor)
    return scaled, problem.resolve(scaled)


def _scale_ratios(problem: SearchProblem, overrides: SearchPoint, *, factor: float) -> SearchPoint:
    """Multiply every ratio of a proposal, within the bounds of its dimension."""
    scaled = dict(overrides)
    for path, value in overrides.items():
        if not is_ratio_path(path):
            continue
        low = 0.0
        high = 1.0
        dimension = problem.space.dimensions.get(path)
        if dimension is not None:
            low = dimension.low or 0.0
            high = dimension.high or 0.0
        scaled[path] = round(min(max(float(value) * factor, low), high), 4)
    return scaled


def to_overrides(problem: SearchProblem, candidate: Candidate) -> SearchPoint:
    """Describe a candidate by overrides of every block: they give back exactly this candidate."""
    overrides: SearchPoint = {}
    for node_name, blocks in problem.blocks.items():
        kept_units = candidate.kept_units[node_name]
        for block in blocks:
            units_removed = block.units - kept_units.get(block.name, block.units)
            # The last step of a block may be smaller than the others: it counts as a whole one.
            steps_removed = math.ceil(units_removed / block.granularity)
            path = f"nodes.{node_name}.prune.blocks.{block.name}"
            overrides[path] = round(steps_removed / count_steps(block), 5)
        overrides[f"nodes.{node_name}.precision"] = candidate.precision[node_name]
    return overrides


def to_search_point(problem: SearchProblem, candidate: Candidate) -> SearchPoint:
    """Find the nearest point of the space: ratios of groups, dropped blocks, precisions."""
    point: SearchPoint = {}
    for path, dimension in problem.space.dimensions.items():
        keys = path.split(".")
        if keys[0] != "nodes":
            point[path] = _find_pipeline_value(problem, candidate, dimension=dimension)
            continue
        node_name = keys[1]
        if keys[-1] == "precision":
            point[path] = _find_precision(candidate.precision[node_name], dimension)
        else:
            point[path] = _find_node_value(
                problem.blocks[node_name],
                candidate.kept_units[node_name],
                key=keys[-1],
                dimension=dimension,
            )
    return point


def list_touched_bounds(problem: SearchProblem, candidate: Candidate) -> list[str]:
    """List the dimensions of the space whose upper end a structure has reached.

    What cannot go further because nothing is left to take away has not reached a bound.

    Args:
        problem: The space and the blocks.
        candidate: The structure.

    Returns:
        For a person: the key of each dimension and its bound.
    """
    point = to_search_point(problem, candidate)
    touched: list[str] = []
    for path, dimension in problem.space.dimensions.items():
        keys = path.split(".")
        is_cut = keys[0] == "nodes" and keys[-1] != "precision"
        if not is_cut or dimension.high is None:
            continue
        blocks = problem.blocks[keys[1]]
        most = _find_largest_value(blocks, key=keys[-1])
        smallest_step = _find_smallest_step(blocks, key=keys[-1])
        value = point[path]
        is_at_bound = isinstance(value, int | float) and value + smallest_step > dimension.high
        if is_at_bound and dimension.high < most:
            touched.append(f"{path} ({dimension.high:g})")
    return touched


def _find_largest_value(blocks: Sequence[Block], *, key: str) -> float:
    """Find the number of blocks that can be dropped, or the largest ratio of a group of them."""
    if key == "drop":
        return count_droppable_blocks(blocks)
    group = [block for block in blocks if block.group == key]
    all_units = sum(block.units for block in group)
    return 1 - sum(block.min_units for block in group) / max(all_units, 1)


def _find_smallest_step(blocks: Sequence[Block], *, key: str) -> float:
    """Find by how much one more cut raises the value of a dimension."""
    if key == "drop":
        return 1.0
    group = [block for block in blocks if block.group == key]
    all_units = sum(block.units for block in group)
    return min((block.granularity for block in group), default=0) / max(all_units, 1)


def _find_pipeline_value(
    problem: SearchProblem, candidate: Candidate, *, dimension: Dimension
) -> float | str:
    """Find the value of a dimension of no node; the only range among these is the protection."""
    if dimension.choices:
        return dimension.choices[0]
    unimodal, cross_modal = problem.compute_removed_shares(candidate)
    protection = dimension.high or 2.0
    if cross_modal:
        protection = unimodal / cross_modal
    return _clip_to_dimension(dimension, protection)


def _find_precision(precision: str, dimension: Dimension) -> str:
    """Find the precision itself among the choices, or the first of them."""
    return precision if precision in dimension.choices else dimension.choices[0]


def _find_node_value(
    blocks: Sequence[Block], kept_units: KeptUnits, *, key: str, dimension: Dimension
) -> float:
    """Find the number of dropped blocks of a node, or the ratio of a group of its blocks."""
    if key == "drop":
        dropped_count = sum(kept_units.get(block.name, block.units) == 0 for block in blocks)
        return _clip_to_dimension(dimension, dropped_count)
    group = [block for block in blocks if block.group == key]
    all_units = sum(block.units for block in group)
    units_left = sum(kept_units.get(block.name, block.units) for block in group)
    return _clip_to_dimension(dimension, 1 - units_left / max(all_units, 1))


def _clip_to_dimension(dimension: Dimension, value: float) -> float:
    """Move a value into a range and onto its steps."""
    low = dimension.low or 0.0
    high = value if dimension.high is None else dimension.high
    clipped_value = min(max(value, low), high)
    if not dimension.step:
        return clipped_value
    if dimension.step >= 1:
        return int(low + dimension.step * ((clipped_value - low) // dimension.step))
    # The last step may end under `high`, and rounding must not lift it over.
    max_steps = math.floor((high - low) / dimension.step + 1e-9)
    steps = min(round((clipped_value - low) / dimension.step), max_steps)
    return min(low + dimension.step * steps, high)


def find_best_trial(trials: Sequence[Trial], budget_ms: float) -> Trial | None:
    """Find the trial of least loss within the budget (milliseconds); None when nothing meets it."""
    within_budget = [trial for trial in trials if trial.latency_ms <= budget_ms]
    return min(within_budget, key=lambda trial: trial.loss, default=None)


def complete_candidate(problem: SearchProblem, candidate: Candidate) -> Candidate:
    """Complete a candidate: blocks that it does not list keep all their units."""
    completed_units: dict[str, KeptUnits] = {}
    for node_name, blocks in problem.blocks.items():
        kept_units = candidate.kept_units[node_name]
        completed_units[node_name] = {
            block.name: kept_units.get(block.name, block.units) for block in blocks
        }
    return Candidate(kept_units=completed_units, precision=candidate.precision)


def replace_units(
    candidate: Candidate, node_name: str, *, block_name: str, units: int
) -> Candidate:
    """Copy a candidate with another number of units in one block.

    Args:
        candidate: The candidate; it is not changed.
        node_name: The node.
        block_name: The block.
        units: Units that the block keeps.
    """
    node_units = {**candidate.kept_units[node_name], block_name: units}
    return Candidate(
        kept_units={**candidate.kept_units, node_name: node_units}, precision=candidate.precision
    )


def replace_precision(candidate: Candidate, node_name: str, *, precision: str) -> Candidate:
    """Copy a candidate with another precision of one node."""
    return Candidate(
        kept_units=candidate.kept_units, precision={**candidate.precision, node_name: precision}
    )
