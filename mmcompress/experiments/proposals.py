"""Rules that choose a structure for a latency budget, to be compared with the search.

Each rule is a context manager: it takes a run and its sensitivity, and gives a `Propose`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from mmcompress.graph.blocks import Block, count_units_after
from mmcompress.graph.structure import Candidate, KeptUnits, cut_whole_pipeline
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.results.records import Trial
from mmcompress.run.approach_target import Propose
from mmcompress.run.predictor import build_predictor
from mmcompress.run.profile import Profile
from mmcompress.search.bisection import bisect_share
from mmcompress.search.build_problem import build_problem, find_fastest
from mmcompress.search.evaluator import start_evaluator
from mmcompress.search.linearize import count_max_evaluations, linearize_successively
from mmcompress.search.problem import SearchProblem
from mmcompress.search.repair import cut_to_budget, grow_to_budget, restore_dropped
from mmcompress.search.run_search import choose_trial, run_unguided_search
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.short_finetune import rank_by_short_finetuning
from mmcompress.search.split_budget import split_budget
from mmcompress.storage import read_record
from mmcompress.workspace.context import RunContext, list_precisions

CutByShare = Callable[[float], dict[str, KeptUnits]]
"""Gives the units that each block of each node keeps when a share (0 to 1) is removed."""

SHARE_HALVINGS = 14
"""Steps of the bisection: the share is exact to 1 / 2 ** 14, finer than one unit of any block."""


@contextmanager
def propose_uniform(
    run: RunContext, sensitivity: Sensitivity, *, cut_positions: bool = False
) -> Iterator[Propose]:
    """Cut the same share of every block.

    Args:
        run: The run; its blocks are cut.
        sensitivity: Builds the search problem, which holds the limits.
        cut_positions: Whether image patches and the end of an audio window lose that share too.
    """

    def cut_blocks(share: float) -> dict[str, KeptUnits]:
        return cut_whole_pipeline(run.blocks, share, cut_positions=cut_positions)

    yield _propose_least_share(run, sensitivity, cut_by_share=cut_blocks, origin="uniform")


@contextmanager
def propose_by_ranking(run: RunContext, sensitivity: Sensitivity) -> Iterator[Propose]:
    """Cut what lies below one threshold over all models, on scores divided by their block's mean.

    The normalization is that of Torch-Pruning (Fang et al. 2023, DepGraph).
    """
    ranking = _rank_unit_groups(run, sensitivity)

    def cut_lowest(share: float) -> dict[str, KeptUnits]:
        removed_shares: dict[tuple[str, str], int] = {}
        for _, node_name, block_name in ranking[: round(share * len(ranking))]:
            removed_shares[node_name, block_name] = (
                removed_shares.get((node_name, block_name), 0) + 1
            )
        kept_units: dict[str, KeptUnits] = {}
        for node_name, blocks in run.blocks.items():
            kept_units[node_name] = {
                block.name: int(
                    count_units_after(block, removed_shares.get((node_name, block.name), 0))
                )
                for block in blocks
            }
        return kept_units

    yield _propose_least_share(run, sensitivity, cut_by_share=cut_lowest, origin="ranking")


@contextmanager
def propose_by_knapsack(run: RunContext, sensitivity: Sensitivity) -> Iterator[Propose]:
    """Split the budget by measured loss increases; evaluate no structure."""

    def propose(predictor: Predictor, budget_ms: float, attempt: int) -> Trial:
        return _propose_split(run, sensitivity, predictor=predictor, budget_ms=budget_ms)

    yield propose


@contextmanager
def propose_linearized(run: RunContext, sensitivity: Sensitivity) -> Iterator[Propose]:
    """Take the split after the linearization rounds that the search begins with.

    Without a split that improves on it, the split before these rounds is taken.
    """
    with start_evaluator(run, sensitivity) as evaluator:

        def propose(predictor: Predictor, budget_ms: float, attempt: int) -> Trial:
            _, splits = linearize_successively(
                run, sensitivity, predictor=predictor, budget_ms=budget_ms, evaluator=evaluator
            )
            if not splits:
                return _propose_split(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
            problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
            return _make_trial("linearized", splits[0], latency_ms=problem.predict(splits[0]))

        yield propose


@contextmanager
def propose_separately(run: RunContext, sensitivity: Sensitivity) -> Iterator[Propose]:
    """Give each model a budget of its own: all must become faster by the factor of the pipeline.

    No budget moves from one model to another. A model that can't meet its budget becomes as fast as
    it can.
    """

    def propose(predictor: Predictor, budget_ms: float, attempt: int) -> Trial:
        problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
        split = _split_each_node(
            run, sensitivity, problem=problem, predictor=predictor, budget_ms=budget_ms
        )
        candidate = restore_dropped(
            problem, split, loss_increase=sensitivity.estimate_loss_increase
        )
        # A block that was restored is paid for by cuts elsewhere.
        affordable_candidate = cut_to_budget(
            problem, candidate, loss_increase=sensitivity.estimate_loss_increase
        )
        candidate = affordable_candidate or candidate
        return _make_trial("separate", candidate, latency_ms=problem.predict(candidate))

    yield propose


@contextmanager
def propose_at_random(run: RunContext, sensitivity: Sensitivity) -> Iterator[Propose]:
    """Evaluate as many structures as the search, drawn at random."""
    search = run.spec.search
    unguided = replace(
        search, sampler="random", trials=search.trials + search.level_switches, level_switches=0
    )
    random_run = replace(run, spec=replace(run.spec, search=unguided))
    with start_evaluator(random_run, sensitivity) as evaluator:

        def propose(predictor: Predictor, budget_ms: float, attempt: int) -> Trial | None:
            trials = run_unguided_search(
                random_run,
                sensitivity,
                predictor=predictor,
                budget_ms=budget_ms,
                evaluator=evaluator,
                attempt=attempt,
                extra_trials=count_max_evaluations(random_run),
            )
            return rank_by_short_finetuning(
                random_run,
                sensitivity,
                predictor=predictor,
                budget_ms=budget_ms,
                trials=trials,
                best=choose_trial(random_run, evaluator, trials=trials, budget_ms=budget_ms),
            )

        yield propose


@contextmanager
def propose_with_placebo(
    run: RunContext, sensitivity: Sensitivity, *, draw: int
) -> Iterator[Propose]:
    """Split the budget while random unimodal blocks are protected in place of the cross-modal ones.

    The random blocks take about as much latency as the cross-modal ones. If protecting these helps
    no more than that, what they do is no reason to protect them.

    Args:
        run: The run; its seed and `draw` seed the choice.
        sensitivity: Loss increases of cuts.
        draw: The number of the draw.
    """
    predictor = build_predictor(run, read_record(Profile, run.shared.profile))
    block_ms = _predict_whole_blocks(predictor)
    protected: dict[str, dict[str, str]] = {node_name: {} for node_name in run.blocks}
    missing_ms = 0.0
    unimodal: list[tuple[str, str]] = []
    for (node_name, block_name), milliseconds in block_ms.items():
        if block_name in run.cross_modal[node_name]:
            missing_ms += milliseconds
        else:
            unimodal.append((node_name, block_name))
    for index in np.random.default_rng([run.spec.seed, draw]).permutation(len(unimodal)):
        node_name, block_name = unimodal[index]
        milliseconds = block_ms[node_name, block_name]
        # A block that would overshoot by more than is missing is left out for a smaller one.
        if 2 * missing_ms > milliseconds:
            protected[node_name][block_name] = "by lot"
            missing_ms -= milliseconds
    with propose_by_knapsack(replace(run, cross_modal=protected), sensitivity) as propose:
        yield propose


def choose_fastest_precisions(run: RunContext, predictor: Predictor) -> dict[str, str]:
    """Return the precision in which each whole node is fastest, of those that it may have."""
    whole_units: dict[str, dict[str, int]] = {}
    for node_name, blocks in run.blocks.items():
        whole_units[node_name] = {block.name: block.units for block in blocks}
    choices = list_precisions(run)
    first_choices = {node_name: precisions[0] for node_name, precisions in choices.items()}
    fastest: dict[str, str] = {}
    for node_name, precisions in choices.items():
        latencies_ms: dict[str, float] = {}
        for precision in precisions:
            candidate = Candidate(
                kept_units=whole_units, precision={**first_choices, node_name: precision}
            )
            latencies_ms[precision] = predictor(candidate)
        fastest[node_name] = min(latencies_ms, key=latencies_ms.__getitem__)
    return fastest


def _propose_least_share(
    run: RunContext, sensitivity: Sensitivity, *, cut_by_share: CutByShare, origin: str
) -> Propose:
    """Propose the least removed share that meets the budget and every other limit."""

    def propose(predictor: Predictor, budget_ms: float, attempt: int) -> Trial:
        problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
        precisions = choose_fastest_precisions(run, predictor)

        def cut_allowed(share: float, drop_blocks: bool) -> Candidate:
            kept_units = _move_to_allowed(
                cut_by_share(share), problem=problem, drop_blocks=drop_blocks
            )
            return Candidate(kept_units=kept_units, precision=precisions)

        # Where units are not enough to meet the budget, whole blocks are dropped too.
        drop_blocks = problem.predict(cut_allowed(1.0, drop_blocks=False)) > budget_ms

        def fits_budget(share: float) -> bool:
            return problem.predict(cut_allowed(share, drop_blocks)) <= budget_ms

        _, share = bisect_share(fits_budget, low=0.0, high=1.0, steps=SHARE_HALVINGS)
        candidate = cut_allowed(share, drop_blocks)
        return _make_trial(origin, candidate, latency_ms=problem.predict(candidate))

    return propose


def _move_to_allowed(
    kept_units: dict[str, KeptUnits], *, problem: SearchProblem, drop_blocks: bool
) -> dict[str, KeptUnits]:
    """Move each block to the nearest size that the space allows; what the spec fixes stays."""
    allowed_units: dict[str, KeptUnits] = {}
    for node_name, units_by_block in kept_units.items():
        allowed_units[node_name] = {}
        for block_name, units in units_by_block.items():
            choices = [
                choice
                for choice in problem.unit_choices[node_name][block_name]
                if choice or drop_blocks
            ]
            nearest = _find_nearest(choices or [0], units)
            allowed_units[node_name][block_name] = nearest
    return allowed_units


def _find_nearest(choices: list[int], units: int) -> int:
    """Return the choice nearest to a number of units, the first one of equals."""
    nearest = choices[0]
    for choice in choices:
        if abs(choice - units) < abs(nearest - units):
            nearest = choice
    return nearest


def _rank_unit_groups(run: RunContext, sensitivity: Sensitivity) -> list[tuple[float, str, str]]:
    """Return (normalized score, node, block) of every group of units, the lowest score first."""
    ranking: list[tuple[float, str, str]] = []
    for node_name, blocks in run.blocks.items():
        for block in blocks:
            if block.group != "tokens":
                ranking += _score_unit_groups(node_name, block, sensitivity=sensitivity)
    ranking.sort(key=_get_score)
    return ranking


def _score_unit_groups(
    node_name: str, block: Block, *, sensitivity: Sensitivity
) -> list[tuple[float, str, str]]:
    """Return (normalized score, node, block) of the groups of one block."""
    scores = sensitivity.scores[node_name][block.name].sort().values
    # Scores of movement have a sign. A block of zeros keeps its zeros.
    mean = float(scores.abs().mean()) or 1.0
    return [
        (float(group.mean()) / mean, node_name, block.name)
        for group in scores.split(block.granularity)
    ]


def _get_score(row: tuple[float, str, str]) -> float:
    return row[0]


def _propose_split(
    run: RunContext, sensitivity: Sensitivity, *, predictor: Predictor, budget_ms: float
) -> Trial:
    """Return the best split of a budget; where none meets it, the fastest structure."""
    problem = build_problem(run, sensitivity, predictor=predictor, budget_ms=budget_ms)
    splits = split_budget(problem, sensitivity, predictor=predictor, budget_ms=budget_ms)
    for split in splits:
        if problem.predict(split) <= budget_ms:
            # Levels and costs of the knapsack are rounded: like the search, use up the rest.
            candidate = grow_to_budget(
                problem,
                split,
                loss_increase=sensitivity.estimate_loss_increase,
                rounding=sensitivity.rounding,
            )
            break
    else:
        candidate = find_fastest(problem, predictor)
    return _make_trial("knapsack", candidate, latency_ms=problem.predict(candidate))


def _split_each_node(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    problem: SearchProblem,
    predictor: Predictor,
    budget_ms: float,
) -> Candidate:
    """Split the budget of each node over its own blocks."""
    dense = Candidate(
        kept_units={node_name: {} for node_name in run.blocks},
        precision=dict.fromkeys(run.blocks, "fp32"),
    )
    overhead_ms = predictor.factor * predictor.overhead_ms
    remaining_share = (budget_ms - overhead_ms) / (predictor(dense) - overhead_ms)
    # The overhead belongs to no node, so none pays for it.
    node_predictor = replace(predictor, overhead_ms=0.0)
    fastest = find_fastest(problem, predictor)
    kept_units: dict[str, KeptUnits] = {}
    precisions: dict[str, str] = {}
    for node_name in run.blocks:
        dense_ms = predictor.predict_node_ms(node_name, dense)
        splits = split_budget(
            problem,
            sensitivity,
            predictor=node_predictor,
            budget_ms=remaining_share * predictor.p95_ratio * dense_ms,
            nodes=[node_name],
        )
        best = splits[0] if splits else fastest
        kept_units[node_name] = best.kept_units[node_name]
        precisions[node_name] = best.precision[node_name]
    return Candidate(kept_units=kept_units, precision=precisions)


def _predict_whole_blocks(predictor: Predictor) -> dict[tuple[str, str], float]:
    """Return the predicted milliseconds a request of every whole block in fp32."""
    rows = predictor.table.index_rows()
    block_ms: dict[tuple[str, str], float] = {}
    for node_name, blocks in predictor.deployed.items():
        for block in blocks:
            block_ms[node_name, block.name] = predictor.predict_block_ms(
                node_name, block, units=block.units, precision="fp32", rows=rows
            )
    return block_ms


def _make_trial(origin: str, candidate: Candidate, *, latency_ms: float) -> Trial:
    """Return the record of a structure that no evaluator has seen."""
    return Trial(
        number=0,
        origin=origin,
        overrides={},
        candidate=candidate,
        latency_ms=latency_ms,
        loss=0.0,
        quality={},
        evaluation_seconds=0.0,
    )
