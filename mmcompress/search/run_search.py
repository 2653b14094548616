"""The search under a budget: what it starts from, how it runs, and which trial is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mmcompress.graph.ports import get_kind
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Trial
from mmcompress.search.build_problem import build_problem, find_fastest
from mmcompress.search.evaluator import TrialEvaluator
from mmcompress.search.linearize import load_interaction_factors
from mmcompress.search.ordered_study import run_ordered_study
from mmcompress.search.problem import (
    BUDGET_SHARE,
    SearchPoint,
    SearchProblem,
    to_search_point,
)
from mmcompress.search.repair import cut_to_budget, grow_to_budget, trade_for_precision
from mmcompress.search.run_study import open_run_study
from mmcompress.search.search_session import (
    SearchEffort,
    SeedCandidates,
    SessionInputs,
    run_study,
)
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.split_budget import split_budget
from mmcompress.search.study import read_finished_trials
from mmcompress.spec.schema import Spec
from mmcompress.spec.space import Dimension
from mmcompress.storage import name_full_disk
from mmcompress.workspace.context import RunContext

EXTRA_TRIALS = 5
"""Proposals, and level switches, that each correction of the budget adds to the search."""


FULL_BUDGET_SHARE = 0.985
"""Share of the budget: a structure that takes less is given units back until it does not."""


MAX_SEED_CANDIDATES = 4
"""Splits of the budget that the search begins with."""


MAX_KNOWN_CANDIDATES = 5
"""Structures that linearization gives the search at most: its best four splits, a new one."""


MAX_START_CANDIDATES = 3
"""Seeds whose points the sampler is given as well."""


MAX_REFITTED_TRIALS = 6
"""Earlier trials, the best ones, that are cut to a budget that has moved."""


MAX_RESTART_POINTS = 2
"""Of these, the trials whose points the sampler is given, to be scaled to the new budget."""


HARMLESS_RATIO = 1.01
"""Loss of the best split / dense loss, up to which the cut did no harm that can be measured."""


HARMLESS_EFFORT = 0.25
"""Share of the trials and level switches that are made where a split does no harm: the others could
find nothing better. (clip_captioner at 2x, dense loss .083: a split has .082, the best of 52 trials
after it .082.)"""


MIN_HARMLESS_EFFORT = 8
"""Trials, and level switches, that are made in any case, unless the spec asks for fewer."""


PLAIN_RATIO = 0.5
"""Share: the ratio of every group in a plain start that treats all nodes alike."""


PLAIN_PERCEIVING_RATIO = 0.2
"""Share: the ratio of nodes that read pictures or sounds in a plain start that spares them."""


PLAIN_REST_RATIO = 0.7
"""Share: the ratio of all other nodes in that start."""


PLAIN_PROTECTION = 2.0
"""Factor: the protection of plain starts, where it is searched."""


def choose_trial(
    run: RunContext, evaluator: TrialEvaluator, *, trials: Sequence[Trial], budget_ms: float
) -> Trial | None:
    """Choose the trial within the budget with the least loss; the best few see more pairs.

    Trials that leave some of the budget unused are passed over: what was grown out of them is among
    the others.

    Args:
        run: The run, for its options and progress.
        evaluator: Evaluates on further pairs; keeps the losses of finalists.
        trials: What the search found.
        budget_ms: Milliseconds that a structure may be predicted to take.

    Returns:
        The trial with that loss; the fastest where none is within the budget, None where there is
            no trial.

    Raises:
        ClusterError: A worker is gone.
    """
    count = run.spec.search.finalists
    finalists = _list_finalists(
        trials, budget_ms, min_ms=FULL_BUDGET_SHARE * budget_ms, count=count
    )
    if not finalists:
        finalists = _list_finalists(trials, budget_ms, min_ms=0.0, count=count)
    if not finalists:
        return min(trials, key=lambda trial: trial.latency_ms, default=None)
    if evaluator.evaluate_again is None or len(finalists) == 1:
        return finalists[0]

    with run.time_stage("search"):
        unknown: dict[str, Candidate] = {}
        for trial in finalists:
            if trial.candidate.make_key() not in evaluator.final_losses:
                unknown[trial.candidate.make_key()] = trial.candidate
        losses = evaluator.evaluate_all(
            unknown,
            evaluate=evaluator.evaluate_again,
            progress=partial(run.on_progress, "search"),
            message=f"the best {len(finalists)} on more pairs",
        )
        evaluator.final_losses.update(losses)
    judged: list[Trial] = []
    for trial in finalists:
        further_loss = evaluator.final_losses[trial.candidate.make_key()]
        first_share = evaluator.first_pairs_share
        loss = first_share * trial.loss + (1 - first_share) * further_loss
        judged.append(replace(trial, loss=loss))
    return min(judged, key=lambda trial: trial.loss)


def _list_finalists(
    trials: Sequence[Trial], budget_ms: float, *, min_ms: float, count: int
) -> list[Trial]:
    """List the best few trials that take at most the budget, and at least `min_ms`."""
    within_budget = [trial for trial in trials if min_ms <= trial.latency_ms <= budget_ms]
    return sorted(within_budget, key=lambda trial: trial.loss)[:count]


def run_search(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    predictor: Predictor,
    budget_ms: float,
    evaluator: TrialEvaluator,
    attempt: int = 0,
    known_candidates: Sequence[Candidate] = (),
) -> list[Trial]:
    """Run the study of this run folder, or go on with it.

    The search begins with structures that are known to be good, or else with splits of the budget.
    Then the sampler and level switches follow. At the end the best structures are grown to the full
    budget.

    Args:
        run: Spec, space, models and run folder.
        sensitivity: Loss increases of cuts and roundings.
        predictor: Predicts latencies.
        budget_ms: Milliseconds that a structure may be predicted to take.
        evaluator: Evaluates trials.
        attempt: How often the budget was corrected before.
        known_candidates: Structures that are known to be good, the best first.

    Returns:
        All trials of the study that the problem allows.
    """
    problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
    effort = _plan_effort(run, evaluator, attempt=attempt)
    with run.time_stage("search"):
        study = _open_study(run, evaluator, attempt=attempt)
        candidates = list(known_candidates)
        if not candidates:
            candidates = split_budget(
                problem,
                sensitivity,
                predictor=predictor,
                budget_ms=budget_ms * BUDGET_SHARE,
            )[:MAX_SEED_CANDIDATES]
        if not candidates:
            candidates = [find_fastest(problem, predictor)]

        starts = [
            to_search_point(problem, candidate) for candidate in candidates[:MAX_START_CANDIDATES]
        ]
        starts += list_plain_starts(problem, run.spec)
        seeds = [("knapsack", candidate) for candidate in candidates]
        if attempt:
            # The budget has moved a little: what was best before it gives the direction.
            known_trials = _read_known_trials(study, evaluator)
            best_trials = sorted(known_trials, key=lambda trial: trial.loss)
            best_trials = best_trials[:MAX_REFITTED_TRIALS]
            starts = [
                to_search_point(problem, trial.candidate)
                for trial in best_trials[:MAX_RESTART_POINTS]
            ]
            repaired_trials = _refit_to_budget(problem, sensitivity, trials=best_trials)
            seeds = repaired_trials + (seeds if known_candidates else seeds[:1])
        trials = _run_study(
            study, problem, run=run, evaluator=evaluator, effort=effort, starts=starts, seeds=seeds
        )

        finalists = _list_finalists(trials, budget_ms, min_ms=0.0, count=run.spec.search.finalists)
        grown_trials = _grow_finalists(problem, sensitivity, finalists=finalists)
        if grown_trials:
            # The effort is spent by now: this evaluates the grown structures alone.
            trials = _run_study(
                study,
                problem,
                run=run,
                evaluator=evaluator,
                effort=effort,
                starts=[],
                seeds=grown_trials,
            )
    return _select_allowed(problem, trials)


def run_unguided_search(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    predictor: Predictor,
    budget_ms: float,
    evaluator: TrialEvaluator,
    attempt: int = 0,
    extra_trials: int = 0,
) -> list[Trial]:
    """Run the study with the sampler alone: no seeds, no level switches, nothing grown.

    The sampler gets as many more trials as all that can come to in `run_search`.

    Args:
        run: Spec, space, models and run folder.
        sensitivity: Loss increases of cuts and roundings.
        predictor: Predicts latencies.
        budget_ms: Milliseconds that a structure may be predicted to take.
        evaluator: Evaluates trials.
        attempt: How often the budget was corrected before.
        extra_trials: Further trials, for what is evaluated before a search begins.

    Returns:
        All trials of the study that the problem allows.
    """
    problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
    planned_effort = _plan_effort(run, evaluator, attempt=attempt)
    grown_trials = (1 + attempt) * (run.spec.search.finalists + len(run.blocks))
    restart_seeds = MAX_REFITTED_TRIALS + MAX_KNOWN_CANDIDATES
    seed_trials = MAX_KNOWN_CANDIDATES + restart_seeds * attempt
    guided_trials = planned_effort.trials + planned_effort.level_switches
    trial_count = guided_trials + grown_trials + seed_trials + extra_trials
    effort = replace(planned_effort, trials=trial_count, level_switches=0)
    with run.time_stage("search"):
        trials = _run_study(
            _open_study(run, evaluator, attempt=attempt),
            problem,
            run=run,
            evaluator=evaluator,
            effort=effort,
            starts=[],
            seeds=[],
        )
    return _select_allowed(problem, trials)


def _open_study(run: RunContext, evaluator: TrialEvaluator, *, attempt: int) -> Any:
    """Open the study of a run folder; a deterministic search begins with what it knows.

    Args:
        run: The run.
        evaluator: Of the search for one artifact.
        attempt: Structures that were measured before. It counts where the search begins.
    """
    study = open_run_study(run)
    if evaluator.ordered is not None:
        evaluator.ordered.begin(study, attempt)
    return study


def _read_known_trials(study: Any, evaluator: TrialEvaluator) -> list[Trial]:
    """Return the finished trials that the search may look at."""
    if evaluator.ordered is not None:
        return evaluator.ordered.trials
    return read_finished_trials(study)


def _plan_effort(run: RunContext, evaluator: TrialEvaluator, *, attempt: int) -> SearchEffort:
    """Plan how much is searched. Every attempt adds a few trials, at most as many as asked for."""
    spec = run.spec
    trials = spec.search.trials
    level_switches = spec.search.level_switches
    if _has_harmless_split(run):
        trials = _cut_effort(trials)
        level_switches = _cut_effort(level_switches)
        is_cut = trials < spec.search.trials or level_switches < spec.search.level_switches
        if is_cut and not attempt:
            run.on_progress(
                "search",
                "a split of the budget loses nothing that the validation pairs show: "
                f"{trials} trials and {level_switches} level switches are enough",
                None,
            )
    return SearchEffort(
        trials=trials + min(EXTRA_TRIALS, trials) * attempt,
        level_switches=level_switches + min(EXTRA_TRIALS, level_switches) * attempt,
        max_results=spec.search.max_trials,
        workers=evaluator.workers,
        retries=spec.search.retries,
        batch=spec.search.batch,
    )


def _has_harmless_split(run: RunContext) -> bool:
    """Return whether a split of the budget loses nothing that the validation pairs show."""
    factors = load_interaction_factors(run.folder)
    return bool(factors.losses) and min(factors.losses) <= HARMLESS_RATIO * factors.dense_loss


def _cut_effort(count: int) -> int:
    """Return how many of some trials or exchanges are made where there is nothing left to gain."""
    return min(count, max(round(HARMLESS_EFFORT * count), MIN_HARMLESS_EFFORT))


def _run_study(
    study: Any,
    problem: SearchProblem,
    *,
    run: RunContext,
    evaluator: TrialEvaluator,
    effort: SearchEffort,
    starts: list[SearchPoint],
    seeds: SeedCandidates,
) -> list[Trial]:
    """Run an open study with the evaluator, the seed and the progress of a run."""
    inputs = SessionInputs(
        executor=evaluator.executor,
        evaluate=evaluator.evaluate,
        effort=effort,
        seed=run.spec.seed,
        starts=starts,
        seeds=seeds,
        sampler=run.spec.search.sampler,
        is_over=run.is_search_over,
        progress=partial(run.on_progress, "search"),
    )
    with name_full_disk(run.folder.study):
        if evaluator.ordered is not None:
            return run_ordered_study(study, problem, inputs=inputs, ordered=evaluator.ordered)
        return run_study(study, problem, inputs=inputs)


def _refit_to_budget(
    problem: SearchProblem, sensitivity: Sensitivity, *, trials: Sequence[Trial]
) -> list[tuple[str, Candidate]]:
    """Cut earlier structures to a budget that has moved; those that can't be are left out."""
    seeds: list[tuple[str, Candidate]] = []
    for trial in trials:
        smaller = cut_to_budget(
            problem, trial.candidate, loss_increase=sensitivity.estimate_loss_increase
        )
        if smaller is not None:
            seeds.append(("trimmed", smaller))
    return seeds


def _grow_finalists(
    problem: SearchProblem, sensitivity: Sensitivity, *, finalists: Sequence[Trial]
) -> list[tuple[str, Candidate]]:
    """Grow the finalists that leave budget unused; where steps are too large, trade units."""
    full_ms = FULL_BUDGET_SHARE * problem.budget_ms
    seeds: list[tuple[str, Candidate]] = []
    for trial in finalists:
        if trial.latency_ms < full_ms:
            larger = grow_to_budget(
                problem,
                trial.candidate,
                loss_increase=sensitivity.estimate_loss_increase,
                rounding=sensitivity.rounding,
            )
            seeds.append(("filled", larger))
    # The next step up of these is too large for the budget.
    still_small = [candidate for _, candidate in seeds if problem.predict(candidate) < full_ms]
    if still_small:
        traded_candidates = trade_for_precision(
            problem,
            still_small[0],
            loss_increase=sensitivity.estimate_loss_increase,
            rounding=sensitivity.rounding,
        )
        seeds += [("exchanged", candidate) for candidate in traded_candidates]
    return seeds


def _select_allowed(problem: SearchProblem, trials: list[Trial]) -> list[Trial]:
    """Select the trials that the problem allows; all where an older journal holds no such one."""
    allowed_trials = [trial for trial in trials if problem.is_allowed(trial.candidate)]
    return allowed_trials or trials


def adjust_structure(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    predictor: Predictor,
    budget_ms: float,
    evaluator: TrialEvaluator,
    structure: Candidate,
    start: Candidate | None = None,
) -> Trial | None:
    """Adjust a structure to a budget that has moved a little, and evaluate it.

    Of many structures the search finds those that the predictor underrates (the winner's curse). Of
    this one it is known by how much.

    Args:
        run: Spec, space, models and run folder.
        sensitivity: Loss increases of cuts and roundings.
        predictor: Predicts latencies, as corrected by what was measured.
        budget_ms: Milliseconds that the structure may be predicted to take.
        evaluator: Evaluates trials.
        structure: The structure that was measured.
        start: The same structure with other precisions, where a measurement speaks for them.

    Returns:
        The trial; None where no unit is small enough for the change, or where the trial failed.
    """
    problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
    # In another precision it would be another structure.
    problem = replace(problem, precisions={})
    adjusted_structure = start or structure
    smaller = cut_to_budget(
        problem, adjusted_structure, loss_increase=sensitivity.estimate_loss_increase
    )
    if smaller is not None:
        adjusted_structure = grow_to_budget(
            problem,
            smaller,
            loss_increase=sensitivity.estimate_loss_increase,
            rounding=sensitivity.rounding,
        )
    fills_budget = FULL_BUDGET_SHARE * budget_ms <= problem.predict(adjusted_structure) <= budget_ms
    if adjusted_structure == structure or not fills_budget:
        return None
    effort = SearchEffort(
        trials=0,
        level_switches=0,
        workers=evaluator.workers,
        retries=run.spec.search.retries,
    )
    with run.time_stage("search"):
        trials = _run_study(
            _open_study(run, evaluator, attempt=0),
            problem,
            run=run,
            evaluator=evaluator,
            effort=effort,
            starts=[],
            seeds=[("adjusted", adjusted_structure)],
        )
    adjusted_key = adjusted_structure.make_key()
    matching = [trial for trial in trials if trial.candidate.make_key() == adjusted_key]
    return matching[0] if matching else None


def list_plain_starts(problem: SearchProblem, spec: Spec) -> list[SearchPoint]:
    """List two plain points: one ratio everywhere, and one that spares what sees and hears.

    Both are in int8 where that is allowed.

    Args:
        problem: The space whose dimensions the points fill.
        spec: Kinds of the nodes.

    Returns:
        Points to be scaled to the budget.
    """
    ratios = dict.fromkeys(spec.list_model_nodes(), PLAIN_RATIO)
    sparing_ratios: dict[str, float] = {}
    for node_name, node in spec.list_model_nodes().items():
        # All that follows depends on what these nodes see and hear.
        perceives = get_kind(node.kind).perceives
        sparing_ratios[node_name] = PLAIN_PERCEIVING_RATIO if perceives else PLAIN_REST_RATIO
    starts: list[SearchPoint] = []
    for ratio_by_node in (ratios, sparing_ratios):
        point: SearchPoint = {}
        for path, dimension in problem.space.dimensions.items():
            point[path] = _find_plain_value(path, dimension, ratio_by_node=ratio_by_node)
        starts.append(point)
    return starts


def _find_plain_value(
    path: str, dimension: Dimension, *, ratio_by_node: dict[str, float]
) -> float | str:
    """Find the value of one dimension in a plain start."""
    if dimension.choices:
        return "int8" if "int8" in dimension.choices else dimension.choices[0]
    if path.endswith(".drop"):
        return 0
    if path.startswith("nodes."):
        node_name = path.split(".")[1]
        return min(dimension.high or 0.0, ratio_by_node[node_name])
    return min(max(PLAIN_PROTECTION, dimension.low or 0.0), dimension.high or PLAIN_PROTECTION)
