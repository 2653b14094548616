"""Successive linearization: loss increases measured among other cuts, and the budget split anew.

Loss increases add up only while little is cut. So the best split of the budget is taken, and each
of its cuts is undone alone. By how much the loss then falls is what that cut does in this split.
The loss increases are scaled towards it, and the budget is split again.

    real    = max(loss(split) - loss(split without the cut), MIN_REAL_SHARE * factor * alone)
    factor <- factor^(1 - STEP_EXPONENT) * (real / alone)^STEP_EXPONENT

`alone` is the loss increase of the cut in the dense pipeline, `factor` starts at 1. Curves keep
their shape. Roundings of whole nodes have factors as well.

No round follows a split whose loss is near that of the dense pipeline. Where even the best split
collapses the quality, the factors are not used. For what repairs a collapsed pipeline before
training is not what training needs most. (clip_captioner at 4x: a structure found so had a loss of
.46 instead of .54 before training, and .137 instead of .127 after it.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.search.build_problem import build_problem
from mmcompress.search.evaluator import TrialEvaluator, has_quality_collapsed
from mmcompress.search.problem import (
    BUDGET_SHARE,
    SearchProblem,
    complete_candidate,
    replace_precision,
    replace_units,
)
from mmcompress.search.repair import cut_to_budget, grow_to_budget
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.split_budget import split_budget
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

STEP_EXPONENT = 0.5
"""Exponent of the new value in a step: at 1 factors swing between two kinds of splits."""

MIN_REAL_SHARE = 0.1
"""Measured / expected loss increase at least: undoing a cut may lower quality by chance."""

SPLITS_PER_ROUND = 3
"""Splits evaluated in a round."""

NEAR_DENSE_RATIO = 1.3
"""Loss of the best split / dense loss, up to which no further round begins. A short training makes
up for so little, and the search goes on from the splits."""

MAX_SEED_SPLITS = 4
"""Evaluated splits that the search starts from."""

MAX_EFFORT_FACTOR = 2
"""Structures evaluated by all rounds / trials of the search at which the rounds end."""

WHOLE_NODE = ""
"""Stands for a block where the precision of a whole node is meant."""

DENSE_KEY = ""
"""Key of the dense pipeline among the structures of the first round."""

CutKey = tuple[str, str]
"""(node, block) of a cut, or (node, WHOLE_NODE) of a rounding."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedSplit:
    """A split of the budget and its loss."""

    candidate: Candidate
    """The structure."""
    loss: float
    """Loss on the validation pairs before training."""


@dataclass(frozen=True, kw_only=True)
class InteractionFactors:
    """How much more a cut does among other cuts than alone, and the rounds that measured it."""

    rounds: int = 0
    """Rounds finished; more than `search.linearization_rounds`: there is no other."""
    cuts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Factor on the loss increase of a cut, by node and block; 1 where it is missing."""
    rounding: dict[str, float] = field(default_factory=dict)
    """Factor on the loss increase of a rounding, by node; 1 where it is missing."""
    splits: tuple[EvaluatedSplit, ...] = ()
    """Every split evaluated so far, oldest first."""
    measured_splits: tuple[str, ...] = ()
    """Keys of the splits whose cuts were undone one by one."""
    evaluations: int = 0
    """Structures evaluated so far."""
    losses: tuple[float, ...] = ()
    """Least loss among the splits of each round."""
    dense_loss: float = 0.0
    """Loss of the dense pipeline on the same pairs."""


def load_interaction_factors(folder: RunFolder) -> InteractionFactors:
    """Load the factors of a run folder; those of no round where there are none."""
    if not folder.interaction_factors.exists():
        return InteractionFactors()
    return read_record(InteractionFactors, folder.interaction_factors)


def count_max_evaluations(run: RunContext) -> int:
    """Count the structures that all rounds together evaluate at most."""
    search = run.spec.search
    if search.evaluator == "estimated" or not search.linearization_rounds:
        return 0
    block_count = sum(len(blocks) for blocks in run.blocks.values())
    per_round = SPLITS_PER_ROUND + block_count + len(run.blocks)
    by_rounds = search.linearization_rounds * per_round
    # The round that crosses the limit is finished.
    by_effort = _limit_evaluations(run) + per_round
    # After the last round its splits are evaluated, but not measured.
    return min(by_rounds, by_effort) + SPLITS_PER_ROUND


def _limit_evaluations(run: RunContext) -> int:
    """Return the evaluated structures at which no further round begins."""
    return MAX_EFFORT_FACTOR * (run.spec.search.trials + run.spec.search.level_switches)


def linearize_successively(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    predictor: Predictor,
    budget_ms: float,
    evaluator: TrialEvaluator,
    split: Callable[..., list[Candidate]] = split_budget,
    near_dense_ratio: float = NEAR_DENSE_RATIO,
) -> tuple[Sensitivity, list[Candidate]]:
    """Measure loss increases among other cuts, round by round.

    Every round is kept in the run folder. Factors hold for a budget that has moved a little, too.
    The splits are then fitted to it, and one new split is added that is not evaluated yet.

    Args:
        run: Says how many rounds; its folder keeps them.
        sensitivity: Loss increases of every cut alone.
        predictor: Latency of a structure.
        budget_ms: Milliseconds a structure may take.
        evaluator: Measures losses.
        split: Splits the budget, the best split first.
        near_dense_ratio: Loss of the best split / dense loss, up to which no further round begins.

    Returns:
        The sensitivity as it is among other cuts, and the best splits, least loss first. Where all
        splits collapse the quality, or there is no round: the sensitivity as it was, and no split.

    Raises:
        ClusterError: A worker process died.
    """
    if not count_max_evaluations(run):
        return sensitivity, []
    linearizer = _Linearizer(
        run=run,
        sensitivity=sensitivity,
        predictor=predictor,
        problem=build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms),
        evaluator=evaluator,
        split=split,
        near_dense_ratio=near_dense_ratio,
    )
    factors = load_interaction_factors(run.folder)
    with run.time_stage("linearize"):
        while factors.rounds <= run.spec.search.linearization_rounds and not run.is_search_over():
            next_factors = linearizer.run_round(factors)
            if next_factors is None:
                # Nothing is written: another budget may be in reach, or the workers be back.
                break
            factors = next_factors
            write_record(run.folder.interaction_factors, factors)
        if not factors.losses or has_quality_collapsed(min(factors.losses), factors.dense_loss):
            return sensitivity, []
        scaled_sensitivity = linearizer.scale_sensitivity(factors)
        best_splits = sorted(factors.splits, key=lambda split: split.loss)[:MAX_SEED_SPLITS]
        candidates = linearizer.fit_to_budget(
            [split.candidate for split in best_splits], scaled_sensitivity
        )
        candidates += linearizer.propose_splits(scaled_sensitivity)[:1]
    unique_candidates = {candidate.make_key(): candidate for candidate in candidates}
    return scaled_sensitivity, list(unique_candidates.values())


@dataclass(frozen=True, kw_only=True)
class _Linearizer:
    """What every round works with."""

    run: RunContext
    """The run: its settings, its folder, and who hears of progress."""
    sensitivity: Sensitivity
    """Loss increases of every cut alone."""
    predictor: Predictor
    """Latency of a structure."""
    problem: SearchProblem
    """Budget and limits that every split keeps."""
    evaluator: TrialEvaluator
    """Measures the loss of a structure."""
    split: Callable[..., list[Candidate]]
    """Splits the budget, the best split first."""
    near_dense_ratio: float
    """Loss of the best split / dense loss, up to which no further round begins."""

    def run_round(self, factors: InteractionFactors) -> InteractionFactors | None:
        """Run one round: split, evaluate the splits, and measure the cuts of the best one.

        Returns:
            The factors after it; None where no split fits the budget or none could be evaluated.
        """
        scaled_sensitivity = self.scale_sensitivity(factors)
        candidates = {
            candidate.make_key(): candidate for candidate in self.propose_splits(scaled_sensitivity)
        }
        factors = self._evaluate_splits(candidates, factors)
        evaluated = {split.candidate.make_key(): split for split in factors.splits}
        round_splits = [evaluated[key] for key in candidates if key in evaluated]
        if not round_splits:
            return None
        round_splits.sort(key=lambda split: split.loss)
        best_loss = round_splits[0].loss
        self.run.on_progress("search", f"{self._name_round(factors)}: loss {best_loss:.3f}", None)
        factors = replace(factors, losses=(*factors.losses, best_loss))

        unmeasured_splits = [
            split
            for split in round_splits
            if split.candidate.make_key() not in factors.measured_splits
        ]
        is_near_dense = best_loss <= self.near_dense_ratio * factors.dense_loss
        if not unmeasured_splits or is_near_dense or self._is_last_round(factors):
            return replace(factors, rounds=self.run.spec.search.linearization_rounds + 1)
        return self._measure_cuts(unmeasured_splits[0], factors)

    def scale_sensitivity(self, factors: InteractionFactors) -> Sensitivity:
        """Return the sensitivity among other cuts, as far as it was measured."""
        return self.sensitivity.scale_loss_increases(factors.cuts, factors.rounding)

    def propose_splits(self, sensitivity: Sensitivity) -> list[Candidate]:
        """Propose the best few splits of the budget, fitted to every limit."""
        candidates = self.split(
            self.problem,
            sensitivity,
            predictor=self.predictor,
            budget_ms=self.problem.budget_ms * BUDGET_SHARE,
        )
        return self.fit_to_budget(candidates[:SPLITS_PER_ROUND], sensitivity)

    def fit_to_budget(
        self, candidates: Sequence[Candidate], sensitivity: Sensitivity
    ) -> list[Candidate]:
        """Cut candidates to the budget and grow them up to it; leave out those that cannot fit."""
        fitted = []
        for candidate in candidates:
            smaller = cut_to_budget(
                self.problem, candidate, loss_increase=sensitivity.estimate_loss_increase
            )
            if smaller is None:
                continue
            fitted.append(
                grow_to_budget(
                    self.problem,
                    smaller,
                    loss_increase=sensitivity.estimate_loss_increase,
                    rounding=sensitivity.rounding,
                )
            )
        return fitted

    def _name_round(self, factors: InteractionFactors) -> str:
        """Name a round for a person; after the last one its splits are evaluated once more."""
        round_count = self.run.spec.search.linearization_rounds
        return f"split {factors.rounds + 1} of {round_count + 1}"

    def _is_last_round(self, factors: InteractionFactors) -> bool:
        """Return whether rounds or effort are used up."""
        return (
            factors.rounds == self.run.spec.search.linearization_rounds
            or factors.evaluations >= _limit_evaluations(self.run)
        )

    def _evaluate_splits(
        self, candidates: Mapping[str, Candidate], factors: InteractionFactors
    ) -> InteractionFactors:
        """Evaluate the splits that are new, and in the first round the dense pipeline."""
        known_keys = {split.candidate.make_key() for split in factors.splits}
        new_candidates = {
            key: candidate for key, candidate in candidates.items() if key not in known_keys
        }
        if factors.rounds == 0:
            new_candidates[DENSE_KEY] = self._make_dense_candidate()
        losses = self.evaluator.evaluate_all(
            new_candidates,
            evaluate=self.evaluator.evaluate,
            progress=partial(self.run.on_progress, "search"),
            message=self._name_round(factors),
        )
        dense_loss = losses.pop(DENSE_KEY, factors.dense_loss)
        new_splits = [
            EvaluatedSplit(candidate=new_candidates[key], loss=loss)
            for key, loss in losses.items()
            if math.isfinite(loss)
        ]
        return replace(
            factors,
            splits=(*factors.splits, *new_splits),
            evaluations=factors.evaluations + len(new_candidates),
            dense_loss=dense_loss,
        )

    def _measure_cuts(
        self, split: EvaluatedSplit, factors: InteractionFactors
    ) -> InteractionFactors:
        """Evaluate a split without each of its cuts, and move the factors."""
        candidates = self._undo_each_cut(split.candidate)
        losses_without = self.evaluator.evaluate_all(
            candidates,
            evaluate=self.evaluator.evaluate,
            progress=partial(self.run.on_progress, "search"),
            message=f"the loss without each cut, round {factors.rounds + 1}",
        )
        moved_factors = _move_factors(
            factors, self.sensitivity, split=split, losses_without=losses_without
        )
        return replace(
            moved_factors,
            rounds=factors.rounds + 1,
            measured_splits=(*factors.measured_splits, split.candidate.make_key()),
            evaluations=factors.evaluations + len(candidates),
        )

    def _make_dense_candidate(self) -> Candidate:
        """Make the candidate in which nothing is cut or rounded."""
        kept_units = {}
        for node_name, blocks in self.run.blocks.items():
            kept_units[node_name] = {block.name: block.units for block in blocks}
        return Candidate(kept_units=kept_units, precision=dict.fromkeys(kept_units, "fp32"))

    def _undo_each_cut(self, candidate: Candidate) -> dict[CutKey, Candidate]:
        """Undo each cut and rounding of a candidate alone; what the spec fixes stays."""
        candidate = complete_candidate(self.problem, candidate)
        candidates: dict[CutKey, Candidate] = {}
        for node_name, blocks in self.run.blocks.items():
            for block in blocks:
                is_cut = candidate.kept_units[node_name][block.name] < block.units
                choices = self.problem.list_unit_choices(node_name, block.name)
                if is_cut and len(choices) != 1:
                    candidates[node_name, block.name] = replace_units(
                        candidate, node_name, block_name=block.name, units=block.units
                    )
            is_rounded = candidate.precision[node_name] != "fp32"
            precisions = self.problem.precisions.get(node_name, ())
            if is_rounded and len(precisions) != 1:
                candidates[node_name, WHOLE_NODE] = replace_precision(
                    candidate, node_name, precision="fp32"
                )
        return candidates


def _move_factors(
    factors: InteractionFactors,
    sensitivity: Sensitivity,
    *,
    split: EvaluatedSplit,
    losses_without: Mapping[CutKey, float],
) -> InteractionFactors:
    """Move the factor of every cut of a split towards what the cut does in it.

    Args:
        factors: The factors so far.
        sensitivity: Loss increases of every cut alone.
        split: The split and its loss.
        losses_without: Loss of the split without one cut, by cut; skipped if it is not finite.

    Returns:
        The factors with `cuts` and `rounding` moved.
    """
    # Unscaled, but with a floor: no loss increase is zero.
    scaled_table = sensitivity.scale_loss_increases({}, {})
    cuts = {node_name: dict(node_factors) for node_name, node_factors in factors.cuts.items()}
    rounding = dict(factors.rounding)
    for (node_name, block_name), loss_without in losses_without.items():
        if not math.isfinite(loss_without):
            continue
        measured = split.loss - loss_without
        if block_name == WHOLE_NODE:
            precision = split.candidate.precision[node_name]
            rounding[node_name] = _move_factor(
                rounding.get(node_name, 1.0),
                single_increase=scaled_table.rounding[node_name][precision],
                measured=measured,
            )
        else:
            kept = split.candidate.kept_units[node_name][block_name]
            node_factors = cuts.setdefault(node_name, {})
            node_factors[block_name] = _move_factor(
                node_factors.get(block_name, 1.0),
                single_increase=scaled_table.estimate_loss_increase(
                    node_name, block_name, kept=kept
                ),
                measured=measured,
            )
    return replace(factors, cuts=cuts, rounding=rounding)


def _move_factor(factor: float, *, single_increase: float, measured: float) -> float:
    """Move one factor by the formula at the top of this file.

    Args:
        factor: The factor so far.
        single_increase: Loss increase of the cut in the dense pipeline.
        measured: By how much the loss falls when the cut is undone in the split.
    """
    bounded_increase = max(measured, MIN_REAL_SHARE * factor * single_increase)
    ratio = bounded_increase / single_increase
    return float(factor ** (1 - STEP_EXPONENT) * ratio**STEP_EXPONENT)
