"""Stage: search, and measure the best structure before training, until one fits the target."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from mmcompress.errors import DataError
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Bound, BoundKind, Trial
from mmcompress.results.target_met import list_bounds
from mmcompress.run.approach_target import (
    ApproachOptions,
    ApproachResult,
    FitAttempt,
    Propose,
    approach_target,
    is_clear_miss,
)
from mmcompress.run.explain_structure import explain_structure
from mmcompress.run.fitted_structure import FittedStructure, FitTolerances
from mmcompress.run.learned_corrections import NodeCorrections, read_node_corrections
from mmcompress.run.near_precisions import find_near_precisions, prefer_fp32
from mmcompress.run.next_artifact import ArtifactLimits, Retry, plan_artifact
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.resume import read_valid_structure
from mmcompress.run.structure_benchmark import StructureBenchmark, measure_structure
from mmcompress.run.trim_structure import trim_structure
from mmcompress.search.build_problem import AIMED_SHARE, LoadPredictor, build_problem, find_fastest
from mmcompress.search.evaluator import start_evaluator
from mmcompress.search.linearize import linearize_successively
from mmcompress.search.problem import SearchProblem, list_touched_bounds
from mmcompress.search.run_search import adjust_structure, choose_trial, run_search
from mmcompress.search.run_study import open_run_study
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.short_finetune import FinetunedStructures, rank_by_short_finetuning
from mmcompress.search.study import read_first_error
from mmcompress.spec.schema import Limits
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext, list_precisions

MAX_BUDGET_SHIFT = 0.08
"""Share of a budget by which it may have moved for the last structure to be adjusted; else the
search goes on."""

MAX_SMALLER_BUDGETS = 8
"""Budgets that are tried for a structure that is not excluded."""

SMALLER_BUDGET_STEP = 0.01
"""Share by which each of these budgets is smaller than the one before: a unit or two of a block."""

OpenProposals = Callable[[RunContext, Sensitivity], AbstractContextManager[Propose]]
"""Opens a source of proposals; what it needs (workers) is let go at the end."""


@dataclass(frozen=True, kw_only=True)
class SearchSteps:
    """The functions that make a proposal. What follows a miss is tested with others than these."""

    linearize: Callable[..., tuple[Sensitivity, list[Candidate]]] = linearize_successively
    """Measures loss increases among other cuts, and splits the budget by them."""
    search: Callable[..., list[Trial]] = run_search
    """Runs the study, or goes on with it."""
    choose: Callable[..., Trial | None] = choose_trial
    """Takes the best trial within the budget."""
    rank: Callable[..., Trial | None] = rank_by_short_finetuning
    """Trains the best few a little where cutting destroys the quality."""


@contextmanager
def open_search(
    run: RunContext, sensitivity: Sensitivity, *, steps: SearchSteps | None = None
) -> Iterator[Propose]:
    """Give proposals of the search: the best trial within the budget, or else the fastest one.

    After a small miss the last structure is adjusted to the budget, after a larger one the search
    goes on.
    """
    steps = steps or SearchSteps()
    last: Trial | None = None
    proposed_keys: set[str] = set()
    with start_evaluator(run, sensitivity) as evaluator:

        def propose(predictor: Predictor, budget_ms: float, attempt: int) -> Trial | None:
            nonlocal last
            if last and run.is_search_over():
                return None
            updated, splits = steps.linearize(
                run, sensitivity, predictor=predictor, budget_ms=budget_ms, evaluator=evaluator
            )
            trial = None
            if last and _is_near_budget(last, predictor, budget_ms=budget_ms):
                trial = adjust_structure(
                    run,
                    updated,
                    predictor=predictor,
                    budget_ms=budget_ms,
                    evaluator=evaluator,
                    structure=last.candidate,
                    start=prefer_fp32(last.candidate, predictor, precisions=list_precisions(run)),
                )
            if trial is None or trial.candidate.make_key() in proposed_keys:
                trials = steps.search(
                    run,
                    updated,
                    predictor=predictor,
                    budget_ms=budget_ms,
                    evaluator=evaluator,
                    attempt=attempt,
                    known_candidates=splits,
                )
                trial = steps.rank(
                    run,
                    updated,
                    predictor=predictor,
                    budget_ms=budget_ms,
                    trials=trials,
                    best=steps.choose(run, evaluator, trials=trials, budget_ms=budget_ms),
                )
            last = trial
            if trial:
                proposed_keys.add(trial.candidate.make_key())
            return trial

        yield propose


def exclude_structures(propose: Propose, excluded: Collection[str]) -> Propose:
    """Return a source of proposals that leaves some structures out.

    In place of an excluded one, it proposes what fits a slightly smaller budget.

    Args:
        propose: The source of all proposals.
        excluded: Keys of the structures that are left out.
    """
    if not excluded:
        return propose

    def propose_other(predictor: Predictor, budget_ms: float, attempt: int) -> Trial | None:
        for number in range(MAX_SMALLER_BUDGETS):
            smaller_ms = budget_ms * (1 - SMALLER_BUDGET_STEP) ** number
            trial = propose(predictor, smaller_ms, attempt=attempt)
            if trial is None or trial.candidate.make_key() not in excluded:
                return trial
        return None

    return propose_other


def _is_near_budget(trial: Trial, predictor: Predictor, *, budget_ms: float) -> bool:
    """Return whether a structure can be adjusted to a budget rather than searched for anew."""
    return abs(predictor(trial.candidate) / budget_ms - 1) <= MAX_BUDGET_SHIFT


def fit_structure(
    run: RunContext,
    prepared: PreparedRun,
    *,
    plan: Retry | None = None,
    open_proposals: OpenProposals = open_search,
    tolerances: FitTolerances | None = None,
) -> FittedStructure:
    """Choose a structure and measure it before training; a miss corrects the next prediction.

    Latency does not depend on the weights, so no time is lost on training what would miss the
    target.

    Args:
        run: The run with one target.
        prepared: What the targets share.
        plan: What earlier artifacts taught; by default there were none.
        open_proposals: Where structures come from.
        tolerances: How exactly a structure must measure.

    Returns:
        The structure, read from the run folder where it was fitted before by as long a search.

    Raises:
        DataError: Every trial of the search failed.
    """
    plan = plan or plan_artifact((), ArtifactLimits.from_spec(run.spec))
    effort = ArtifactLimits.from_spec(run.spec).search_effort
    if plan.bounds != run.spec.limits:
        run = replace(run, spec=replace(run.spec, limits=plan.bounds))
    stored = read_valid_structure(run.folder, plan, effort=effort)
    if stored:
        return stored
    trimmed_structure = trim_structure(run, prepared, plan=plan, effort=effort)
    if trimmed_structure:
        write_record(run.folder.fitted, trimmed_structure)
        return trimmed_structure

    dense_latency = prepared.dense.latency_ms
    target_ms = run.goal.compute_target_ms(dense_latency)
    predictor = replace(
        prepared.predictor,
        correction=prepared.predictor.correction * plan.final_to_fitted,
        p95_ratio=run.goal.compute_p95_ratio(dense_latency),
    )
    _report_unreachable_target(run, prepared, predictor=predictor, target_ms=target_ms)
    options = ApproachOptions(
        target_ms=target_ms,
        limits=run.spec.limits,
        final_to_fitted=plan.final_to_fitted,
        first_attempt=plan.first_attempt,
        reference_runs=run.shared.reference_runs,
        tolerances=tolerances or FitTolerances(),
        dense_node_ms={name: latency.p50 for name, latency in prepared.dense.nodes.items()},
        learned_corrections=read_node_corrections(run.shared.node_corrections),
    )
    with open_proposals(run, prepared.sensitivity) as propose_any:
        propose = exclude_structures(propose_any, plan.excluded)
        if run.device_readings:
            result = _take_first_proposal(propose, predictor, options=options)
        else:
            result = _approach_by_measuring(
                run, prepared, propose=propose, predictor=predictor, options=options
            )
    if not result.attempts:
        study = open_run_study(run)
        raise DataError(
            "the search has no trial to choose from: every one failed, "
            f"the first with {read_first_error(study) or '?'}"
        )
    fitted = _record_fit(run, prepared, result=result, options=options, search_effort=effort)
    fitted = replace(fitted, writing_factor=plan.writing_factor)
    write_record(run.folder.fitted, fitted)
    if result.learned_corrections:
        corrections = NodeCorrections(factors=result.learned_corrections)
        write_record(run.shared.node_corrections, corrections)
    return fitted


def _report_unreachable_target(
    run: RunContext, prepared: PreparedRun, *, predictor: Predictor, target_ms: float
) -> None:
    """Tell the user when nothing in the search space is predicted to meet the target."""
    problem = build_problem(run, prepared.sensitivity, predictor=predictor, budget_ms=target_ms)
    floor_ms = predictor(find_fastest(problem, predictor))
    if floor_ms > target_ms:
        run.on_progress(
            "search",
            f"nothing in the search space is predicted to take less than {floor_ms:.2f} ms, "
            f"the target is {target_ms:.2f} ms: the nearest miss will be made",
            None,
        )


def _approach_by_measuring(
    run: RunContext,
    prepared: PreparedRun,
    *,
    propose: Propose,
    predictor: Predictor,
    options: ApproachOptions,
) -> ApproachResult:
    """Approach the target by measuring structures on this machine."""

    def is_clear_miss_ms(ms: float) -> bool:
        return is_clear_miss(options.final_to_fitted * ms / options.target_ms)

    compared_nodes: set[str] = set()

    def measure_candidate(candidate: Candidate, predicted_ms: float) -> StructureBenchmark:
        near_precisions = find_near_precisions(
            candidate, predictor, precisions=list_precisions(run)
        )
        # One comparison of a node is enough.
        for node_name in compared_nodes:
            near_precisions.pop(node_name, None)
        compared_nodes.update(near_precisions)
        message = f"measuring the best structure (predicted {predicted_ms:.2f} ms)"
        for node_name, precision in near_precisions.items():
            message += f", {node_name} also in {precision}"
        with run.time_stage("fit"):
            run.on_progress("fit", message, None)
            return measure_structure(
                run,
                prepared.sensitivity,
                candidate=candidate,
                dense=prepared.dense,
                is_enough=is_clear_miss_ms,
                near_precisions=near_precisions,
            )

    return approach_target(
        propose,
        predictor,
        options=options,
        measure=measure_candidate,
        progress=partial(run.on_progress, "fit"),
    )


def _take_first_proposal(
    propose: Propose, predictor: Predictor, *, options: ApproachOptions
) -> ApproachResult:
    """Take the first proposal as predicted: it can't be measured on another device from here."""
    budget_ms = options.target_ms * AIMED_SHARE
    trial = propose(predictor, budget_ms, attempt=options.first_attempt)
    if trial is None:
        return ApproachResult(
            attempts=(), predictor=predictor, node_corrections={}, exhausted=False
        )
    predicted_ms = predictor(trial.candidate)
    attempt = FitAttempt(
        trial=trial,
        predicted_ms=predicted_ms,
        benchmark=StructureBenchmark(
            ms=predicted_ms, worst_limit_ratio=0.0, margin=0.0, node_ratios={}
        ),
        measured_ms=predicted_ms,
        bounded_ms=predicted_ms,
        expected_ms=predicted_ms,
    )
    return ApproachResult(
        attempts=(attempt,), predictor=predictor, node_corrections={}, exhausted=False
    )


def choose_attempt(attempts: tuple[FitAttempt, ...], options: ApproachOptions) -> FitAttempt:
    """Return the attempt that is trained.

    Within the target it is the one nearest to the accepted range, then the one of least loss.
    Where all exceed the target, it is the fastest one.
    """
    target_ms = options.target_ms
    meeting_attempts = [
        item for item in attempts if item.compute_target_share(target_ms) <= item.upper_share
    ]
    if not meeting_attempts:
        return min(attempts, key=_get_expected_ms)

    def rank(attempt: FitAttempt) -> tuple[float, float]:
        missing = attempt.lower_share(options.tolerances) - attempt.compute_target_share(target_ms)
        return max(missing, 0.0), attempt.trial.loss

    return min(meeting_attempts, key=rank)


def _get_expected_ms(attempt: FitAttempt) -> float:
    return attempt.expected_ms


def _record_fit(
    run: RunContext,
    prepared: PreparedRun,
    *,
    result: ApproachResult,
    options: ApproachOptions,
    search_effort: int,
) -> FittedStructure:
    """Return the record of the chosen structure, and of what the search space can reach."""
    predictor = result.predictor
    chosen_attempt = choose_attempt(result.attempts, options)
    problem = build_problem(
        run, prepared.sensitivity, predictor=predictor, budget_ms=options.target_ms
    )
    fastest = find_fastest(problem, predictor)
    return FittedStructure(
        candidate=chosen_attempt.trial.candidate,
        predicted_ms=chosen_attempt.predicted_ms,
        measured_ms=chosen_attempt.bounded_ms,
        target_ms=options.target_ms,
        search_effort=search_effort,
        correction=predictor.correction,
        node_corrections=result.node_corrections,
        floor_ms=predictor(fastest),
        fixed_ms=predictor.predict_fixed_ms(fastest),
        fixed_ms_by_node=predictor.predict_fixed_ms_by_node(fastest),
        lowest_reachable=_find_lowest_reachable(
            run.spec.limits,
            LoadPredictor(run, prepared.sensitivity, predictor=predictor),
            problem=problem,
            smallest=fastest,
        ),
        touched_bounds=tuple(list_touched_bounds(problem, chosen_attempt.trial.candidate)),
        attempts=tuple(attempt.to_record(options.target_ms) for attempt in result.attempts),
        final_to_fitted=options.final_to_fitted,
        exhausted=result.exhausted,
        choice_reason=explain_structure(
            chosen_attempt,
            result.attempts,
            target_ms=options.target_ms,
            short_losses=_read_short_losses(run),
        ),
    )


def _read_short_losses(run: RunContext) -> list[float]:
    """Return the losses of the short trainings that went to their end, if there were any."""
    record = run.folder.short_finetunings
    if not record.exists():
        return []
    finetuned = read_record(FinetunedStructures, record)
    return [structure.loss for structure in finetuned.tried if structure.is_finished]


def _find_lowest_reachable(
    limits: Limits, predict_load: LoadPredictor, *, problem: SearchProblem, smallest: Candidate
) -> tuple[Bound, ...]:
    """Return every limit beside the target, with the least that is predicted against it.

    Args:
        limits: The limits of the spec.
        predict_load: Predicts what a candidate takes of each limit.
        problem: The search problem; it has the precisions that each node may have.
        smallest: The smallest structure. Each limit is looked at in the precisions that are
            best for it.
    """

    def minimize_load(kind: BoundKind, node: str) -> float:
        def predict_one_load(candidate: Candidate) -> float:
            return predict_load(candidate, kind, node)

        best = smallest
        for node_name, precisions in problem.precisions.items():
            candidates = [
                replace(best, precision={**best.precision, node_name: precision})
                for precision in precisions
            ]
            best = min(candidates, key=predict_one_load)
        return predict_one_load(best)

    return tuple(list_bounds(limits, minimize_load))
