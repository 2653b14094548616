"""Which structures are worth a short training: the best ones, each unlike the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mmcompress.graph.structure import Candidate
from mmcompress.results.records import Trial
from mmcompress.search.linearize import load_interaction_factors
from mmcompress.search.problem import SearchProblem, complete_candidate, scale_to_budget
from mmcompress.search.repair import cut_to_budget, grow_to_budget
from mmcompress.search.run_search import FULL_BUDGET_SHARE, list_plain_starts
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext

MIN_WEIGHT_DIFFERENCE = 0.03
"""Share of the weights: of structures that differ by no more, one is trained."""

MAX_LEAST_ADDED_LOSS = 2
"""Structures of least added loss that may be trained."""

MAX_LINEARIZED_SPLITS = 2
"""Splits of the successive linearization that are trained, whatever their loss before training."""

NamedCandidate = tuple[str, Candidate]
"""(why it is trained, structure)."""


def list_distinct_structures(
    problem: SearchProblem,
    sensitivity: Sensitivity,
    *,
    run: RunContext,
    trials: Sequence[Trial],
) -> list[NamedCandidate]:
    """List structures worth a training: within the budget, unlike each other, the best ones first.

    They are the best trial and the two best splits of the linearization. Then comes the best trial
    that drops other sub-layers, or has other precisions. Plain splits and further trials follow.

    Args:
        problem: The budget and its space.
        sensitivity: Loss increases of every cut.
        run: Its folder keeps the splits of the linearization.
        trials: All trials of the search.
    """
    in_budget = [trial for trial in trials if trial.latency_ms <= problem.budget_ms]
    full_ms = FULL_BUDGET_SHARE * problem.budget_ms
    filling = [trial for trial in in_budget if trial.latency_ms >= full_ms]
    trials = sorted(filling or in_budget, key=_get_loss)

    by_loss = [(f"{trial.origin}, least loss", trial.candidate) for trial in trials]
    by_added_loss = [
        (f"{trial.origin}, least added loss", trial.candidate)
        for trial in sorted(trials, key=lambda trial: sensitivity.add_losses(trial.candidate))
    ][:MAX_LEAST_ADDED_LOSS]
    ranked = [
        *by_loss[:1],
        *_list_linearized_splits(problem, sensitivity, run=run),
        *_find_other_kind(problem, trials),
        *by_added_loss[:1],
        *_list_plain_splits(problem, sensitivity, run=run),
        *by_loss[1:],
        *by_added_loss[1:],
    ]
    return _drop_alike(problem, ranked)


def grow_candidate(
    problem: SearchProblem, sensitivity: Sensitivity, *, candidate: Candidate
) -> Candidate:
    """Grow a candidate up to the budget."""
    return grow_to_budget(
        problem,
        candidate,
        loss_increase=sensitivity.estimate_loss_increase,
        rounding=sensitivity.rounding,
    )


def _get_loss(trial: Trial) -> float:
    """Return the loss of a trial before training."""
    return trial.loss


def _list_linearized_splits(
    problem: SearchProblem, sensitivity: Sensitivity, *, run: RunContext
) -> list[NamedCandidate]:
    """List the best splits of the linearization, fitted to the budget.

    A collapsed loss before training says little of the loss after it, so the splits are not
    dropped for it.
    """
    splits = sorted(load_interaction_factors(run.folder).splits, key=lambda split: split.loss)
    fitted: list[NamedCandidate] = []
    for split in splits[:MAX_LINEARIZED_SPLITS]:
        smaller = cut_to_budget(
            problem, split.candidate, loss_increase=sensitivity.estimate_loss_increase
        )
        if smaller is not None:
            grown = grow_candidate(problem, sensitivity, candidate=smaller)
            fitted.append(("split of the linearization", grown))
    return fitted


def _find_other_kind(problem: SearchProblem, trials: Sequence[Trial]) -> list[NamedCandidate]:
    """Find the best trial that drops other sub-layers, or has other precisions, than the first.

    Args:
        problem: Its blocks say what a structure drops.
        trials: The trials, least loss first.
    """
    if not trials:
        return []
    first = trials[0].candidate
    first_drops = _list_dropped(problem, first)
    for trial in trials[1:]:
        is_other = trial.candidate.precision != first.precision
        if is_other or _list_dropped(problem, trial.candidate) != first_drops:
            return [(f"{trial.origin}, other sub-layers or precisions", trial.candidate)]
    return []


def _list_dropped(problem: SearchProblem, candidate: Candidate) -> set[tuple[str, str]]:
    """List the (node, block) of sub-layers that a structure drops whole."""
    complete = complete_candidate(problem, candidate)
    dropped: set[tuple[str, str]] = set()
    for node_name, units_by_block in complete.kept_units.items():
        for block_name, units in units_by_block.items():
            if units == 0:
                dropped.add((node_name, block_name))
    return dropped


def _list_plain_splits(
    problem: SearchProblem, sensitivity: Sensitivity, *, run: RunContext
) -> list[NamedCandidate]:
    """List plain splits of the budget: those that no search was needed for."""
    plain: list[NamedCandidate] = []
    for point in list_plain_starts(problem, run.spec):
        _, candidate = scale_to_budget(problem, point)
        if problem.predict(candidate) <= problem.budget_ms:
            grown = grow_candidate(problem, sensitivity, candidate=candidate)
            plain.append(("plain split", grown))
    return plain


def _drop_alike(problem: SearchProblem, ranked: Iterable[NamedCandidate]) -> list[NamedCandidate]:
    """Drop what hardly differs from a structure further ahead."""
    distinct: list[NamedCandidate] = []
    for origin, candidate in ranked:
        differences = [measure_difference(problem, candidate, other=other) for _, other in distinct]
        if all(difference > MIN_WEIGHT_DIFFERENCE for difference in differences):
            distinct.append((origin, candidate))
    return distinct


def measure_difference(problem: SearchProblem, candidate: Candidate, *, other: Candidate) -> float:
    """Return the share of weights in blocks that one structure has and the other has not.

    Shares of positions are added. Structures of other precisions differ infinitely.
    """
    if candidate.precision != other.precision:
        return math.inf
    candidate = complete_candidate(problem, candidate)
    other = complete_candidate(problem, other)
    all_weights = 0.0
    different_weights = 0.0
    different_positions = 0.0
    for node_name, blocks in problem.blocks.items():
        for block in blocks:
            units = candidate.kept_units[node_name][block.name]
            other_units = other.kept_units[node_name][block.name]
            different_units = abs(units - other_units)
            if block.group == "tokens":
                different_positions += different_units / block.units
            else:
                different_weights += block.rows_and_columns_per_unit * different_units
                all_weights += block.rows_and_columns_per_unit * block.units
    return different_weights / max(all_weights, 1.0) + different_positions
