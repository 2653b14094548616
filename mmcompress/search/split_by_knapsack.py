"""The split of a latency budget over all blocks with the least summed loss. No torch here.

Losses of single cuts are taken to add up. Windows (positions of a node) and precisions change what
every block takes, so each combination of them is a knapsack of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.measure.cost_model.device_table import Rows
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.search.knapsack import choose_options_within_budget
from mmcompress.search.sensitivity.curves import CutWeights, SensitivityTable

Option = TypeVar("Option")

BlockKey = tuple[str, str]
"""(node, block)."""


MAX_BLOCK_LEVELS = 17
"""Numbers of units of one block that are offered to the knapsack."""


MAX_WINDOW_LENGTHS = 7
"""Lengths of a node's window that are tried, each with every choice of precisions."""


FEW_WINDOW_LENGTHS = 3
"""Lengths that remain where all combinations are too many: both ends and the middle."""


MAX_COMBINATIONS = 600
"""Combinations of windows and precisions that are solved, each a knapsack of its own."""


@dataclass(frozen=True, kw_only=True)
class SplitInputs:
    """All that a split of the budget follows from. Mappings have the nodes that are split."""

    blocks: Mapping[str, tuple[Block, ...]]
    """Blocks by node."""
    sensitivity: SensitivityTable
    """Loss increases of every cut and rounding; it may have more nodes."""
    cut_weights: CutWeights
    """Factor on the loss increase of a cut: how much more it counts; 1 where it is missing."""
    unit_choices: Mapping[str, Mapping[str, Sequence[int]]]
    """Units each block may keep, ascending, by node; `tokens` are the positions of its window."""
    precisions: Mapping[str, Sequence[str]]
    """Precisions by node."""
    predictor: Predictor
    """Predicts what every block takes; nodes are taken to run one after the other."""


@dataclass(frozen=True, kw_only=True)
class BudgetSplit:
    """A candidate that a knapsack chose, with the loss it is estimated to add."""

    candidate: Candidate
    """Names every block of the nodes that were split."""
    loss_increase: float
    """Loss: estimated rise, all cuts and roundings added up."""


@dataclass(frozen=True, kw_only=True)
class _Levels:
    """What the knapsack chooses from, block by block."""

    units: Mapping[BlockKey, Sequence[int]]
    """Units each block may keep, in the order of the knapsack's groups."""
    loss_increases: Mapping[BlockKey, np.ndarray]
    """Weighted loss increase at each of these."""


def thin_out_levels(choices: Sequence[int], max_levels: int = MAX_BLOCK_LEVELS) -> list[int]:
    """Thin out numbers of units: all of a few, `max_levels` of many, evenly spread with both ends.

    Args:
        choices: Numbers of units, ascending.
        max_levels: How many remain at most.

    Returns:
        The numbers that remain, ascending.
    """
    if len(choices) <= max_levels:
        return list(choices)
    last = len(choices) - 1
    places = {round(last * i / (max_levels - 1)) for i in range(max_levels)}
    return sorted({choices[place] for place in places})


def limit_combinations(
    precisions: Mapping[str, Sequence[str]],
    rounding: Mapping[str, Mapping[str, float]],
    *,
    lengths: Sequence[Sequence[int]],
    whole_ms: Callable[[str, str], float],
) -> tuple[dict[str, list[str]], list[list[int]]]:
    """Leave out precisions and window lengths until few enough combinations of them remain.

    First each node keeps the precision of least loss and the quickest one, then windows keep three
    lengths. Then nodes keep the quickest precision alone, and at last windows stay whole. Nodes
    whose quickest precision does least harm are limited first.

    Args:
        precisions: Precisions by node.
        rounding: Loss increase by node and precision.
        lengths: Lengths of every window that may be cut.
        whole_ms: Predicts the milliseconds of a whole node in a precision.

    Returns:
        Precisions by node and lengths by window; at most `MAX_COMBINATIONS` of them.
    """
    remaining = {node_name: list(choices) for node_name, choices in precisions.items()}
    windows = [list(window) for window in lengths]

    def find_quickest(node_name: str) -> str:
        return min(remaining[node_name], key=lambda precision: whole_ms(node_name, precision))

    def measure_harm(node_name: str) -> float:
        return rounding[node_name][find_quickest(node_name)]

    def has_too_many() -> bool:
        counts = [*map(len, remaining.values()), *map(len, windows)]
        return math.prod(counts) > MAX_COMBINATIONS

    # A node loses least where its quickest precision does little harm: it is limited first.
    for node_name in sorted(remaining, key=measure_harm):
        if has_too_many():
            mildest = min(remaining[node_name], key=rounding[node_name].__getitem__)
            remaining[node_name] = list(dict.fromkeys([mildest, find_quickest(node_name)]))
    if has_too_many():
        windows = [thin_out_levels(window, FEW_WINDOW_LENGTHS) for window in windows]
    for node_name in sorted(remaining, key=measure_harm):
        if has_too_many():
            remaining[node_name] = [find_quickest(node_name)]
    # Of many windows, the last ones stay whole: the sampler may still cut them.
    for i in reversed(range(len(windows))):
        if has_too_many():
            windows[i] = [max(windows[i])]
    return remaining, windows


def split_by_knapsack(inputs: SplitInputs, budget_ms: float) -> list[BudgetSplit]:
    """Split a budget over all blocks, once for every combination of windows and precisions.

    Args:
        inputs: Blocks, choices, losses and the predictor.
        budget_ms: Milliseconds that all nodes together may be predicted to take.

    Returns:
        The best split of every combination that fits, least estimated loss increase first.
    """
    rows = inputs.predictor.table.index_rows()
    levels = _list_levels(inputs)
    windowed_nodes = [name for name in inputs.blocks if "tokens" in inputs.unit_choices[name]]

    def predict_whole_ms(node_name: str, precision: str) -> float:
        return inputs.predictor.predict_node_table_ms(node_name, {}, precision=precision, rows=rows)

    window_lengths = []
    for node_name in windowed_nodes:
        choices = inputs.unit_choices[node_name]["tokens"]
        window_lengths.append(thin_out_levels(choices, MAX_WINDOW_LENGTHS))
    precisions, window_lengths = limit_combinations(
        inputs.precisions,
        inputs.sensitivity.rounding,
        lengths=window_lengths,
        whole_ms=predict_whole_ms,
    )

    precision_choices = _combine_options([precisions[node_name] for node_name in inputs.blocks])
    splits: list[BudgetSplit] = []
    for lengths in _combine_options(window_lengths):
        windows = dict(zip(windowed_nodes, lengths, strict=True))
        block_ms = _predict_block_ms(
            inputs, levels, windows=windows, precisions=precisions, rows=rows
        )
        for choice in precision_choices:
            precision = dict(zip(inputs.blocks, choice, strict=True))
            split = _solve_split(
                inputs,
                levels,
                windows=windows,
                precision=precision,
                block_ms=block_ms,
                budget_ms=budget_ms,
            )
            if split is not None:
                splits.append(split)
    return sorted(splits, key=lambda split: split.loss_increase)


def _list_levels(inputs: SplitInputs) -> _Levels:
    """List what the knapsack chooses from; windows are not among it."""
    units: dict[BlockKey, list[int]] = {}
    loss_increases: dict[BlockKey, np.ndarray] = {}
    for node_name, blocks in inputs.blocks.items():
        for block in blocks:
            if block.group == "tokens":
                continue
            levels = thin_out_levels(inputs.unit_choices[node_name][block.name])
            weight = inputs.cut_weights.get(node_name, {}).get(block.name, 1.0)
            curve = inputs.sensitivity.curves[node_name][block.name]
            units[node_name, block.name] = levels
            loss_increases[node_name, block.name] = curve.interpolate(np.array(levels)) * weight
    return _Levels(units=units, loss_increases=loss_increases)


def _combine_options(groups: Sequence[Sequence[Option]]) -> list[list[Option]]:
    """List every way to take one option of each group; the last group varies fastest."""
    combinations: list[list[Option]] = [[]]
    for options in groups:
        longer: list[list[Option]] = []
        for combination in combinations:
            longer.extend([*combination, option] for option in options)
        combinations = longer
    return combinations


def _cut_windows(inputs: SplitInputs, windows: Mapping[str, int]) -> dict[str, int]:
    """Count the positions that each node loses where its window has the given length."""
    kept_units = {node_name: {"tokens": length} for node_name, length in windows.items()}
    return inputs.predictor.count_cut_positions(kept_units)


def _predict_block_ms(
    inputs: SplitInputs,
    levels: _Levels,
    *,
    windows: Mapping[str, int],
    precisions: Mapping[str, Sequence[str]],
    rows: Rows,
) -> dict[tuple[BlockKey, str], np.ndarray]:
    """Predict the milliseconds of each block at its levels, by block and precision."""
    cut_positions = _cut_windows(inputs, windows)
    block_ms: dict[tuple[BlockKey, str], np.ndarray] = {}
    for node_name in inputs.blocks:
        for precision in precisions[node_name]:
            for deployed in inputs.predictor.deployed[node_name]:
                block_key = (node_name, deployed.name)
                level_ms = []
                for units in levels.units[block_key]:
                    level_ms.append(
                        inputs.predictor.predict_block_ms(
                            node_name,
                            deployed,
                            units=units,
                            precision=precision,
                            rows=rows,
                            cuts=cut_positions,
                        )
                    )
                block_ms[block_key, precision] = np.array(level_ms)
    return block_ms


def _solve_split(
    inputs: SplitInputs,
    levels: _Levels,
    *,
    windows: Mapping[str, int],
    precision: Mapping[str, str],
    block_ms: Mapping[tuple[BlockKey, str], np.ndarray],
    budget_ms: float,
) -> BudgetSplit | None:
    """Solve the knapsack of one combination of windows and precisions; None where nothing fits."""
    predictor = inputs.predictor
    cut_positions = _cut_windows(inputs, windows)
    bases_ms = 0.0
    for node_name in inputs.blocks:
        bases_ms += predictor.predict_base_ms(node_name, precision[node_name], cuts=cut_positions)
    costs = []
    for node_name, block_name in levels.units:
        costs.append(block_ms[(node_name, block_name), precision[node_name]])
    options = choose_options_within_budget(
        costs,
        list(levels.loss_increases.values()),
        budget=budget_ms / predictor.factor - (predictor.overhead_ms + bases_ms),
    )
    if options is None:
        return None

    kept_units: dict[str, KeptUnits] = {node_name: {} for node_name in inputs.blocks}
    for node_name, length in windows.items():
        kept_units[node_name]["tokens"] = length
    for (node_name, block_name), option in zip(levels.units, options, strict=True):
        kept_units[node_name][block_name] = levels.units[node_name, block_name][option]
    candidate = Candidate(kept_units=kept_units, precision=dict(precision))
    return BudgetSplit(
        candidate=candidate,
        loss_increase=inputs.sensitivity.add_losses(candidate, cut_weights=inputs.cut_weights),
    )
