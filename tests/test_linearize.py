"""Loss increases that do not add up, and the split that is found all the same."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest

from mmcompress.errors import ClusterError
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.footprint import Footprint
from mmcompress.run.stages import prepare_run
from mmcompress.search import repair as moves
from mmcompress.search.evaluator import COLLAPSE_RATIO, TrialEvaluator, has_quality_collapsed
from mmcompress.search.executors import InlineExecutor
from mmcompress.search.linearize import (
    MAX_SEED_SPLITS,
    MIN_REAL_SHARE,
    STEP_EXPONENT,
    WHOLE_NODE,
    EvaluatedSplit,
    InteractionFactors,
    _move_factors,
    count_max_evaluations,
)
from mmcompress.search.linearize import (
    linearize_successively as linearize_with,
)
from mmcompress.search.run_search import _plan_effort
from mmcompress.search.sensitivity.curves import SensitivityCurve, SensitivityTable
from mmcompress.search.worker import EstimateContext, estimate_candidate
from mmcompress.storage import read_record, to_plain, write_record
from mmcompress.workspace import context as workflow
from mmcompress.workspace.folder import RunFolder


def line(run):
    """Milliseconds: the steps of all blocks that are left, and nothing else."""

    @dataclasses.dataclass(frozen=True)
    class Line:
        reads: dict = dataclasses.field(default_factory=dict)
        size_fits: dict = dataclasses.field(default_factory=dict)

        def __call__(self, c):
            return sum(
                c.kept_units[n].get(b.name, b.units) / b.granularity
                for n, bs in run.blocks.items()
                for b in bs
            )

    return Line()


def cut_whole_to_budget(problem, sensitivity, *, predictor, budget_ms):
    """Split a budget by cutting where it costs least: one split, or none."""
    whole = Candidate(
        kept_units={
            node: {b.name: b.units for b in blocks} for node, blocks in problem.blocks.items()
        },
        precision=dict.fromkeys(problem.blocks, "fp32"),
    )
    smaller = moves.cut_to_budget(
        dataclasses.replace(problem, budget_ms=budget_ms),
        whole,
        loss_increase=sensitivity.estimate_loss_increase,
    )
    return [smaller] if smaller else []


def linearize_successively(run, sensitivity, near_dense_ratio=0.0, **options):
    return linearize_with(
        run,
        sensitivity,
        split=cut_whole_to_budget,
        near_dense_ratio=near_dense_ratio,
        **options,
    )


@pytest.fixture()
def compounding(run_folder, tiny, tmp_path):
    """(run, sensitivity, predictor, budget, evaluate, what it was asked): cuts of a text tower harm more the more there are.

    Alone each of its blocks can be cut for next to nothing; those of the other models cost what they cost.
    """
    r = workflow.open_run(tiny / "spec.yaml", run_folder, resume=True)
    sensitivity = prepare_run(r).sensitivity
    r = dataclasses.replace(r, folder=RunFolder(path=tmp_path))
    lost = lambda n, by: {b.name: 1 - by.get(b.name, b.units) / b.units for b in r.blocks[n]}
    asked = []

    def evaluate(context, candidate):
        asked.append(candidate)
        loss = 1.0
        for n, by in candidate["kept_units"].items():
            gone = sum(lost(n, by).values())
            loss += 0.02 * gone**4 if n == "text" else 0.3 * gone
            loss += 0.01 * (candidate["precision"][n] != "fp32")
        return {"loss": loss, "quality": {}, "seconds": 0.0}

    alone = lambda n, b, k: (
        0.02 * (1 - k / b.units) ** 4 if n == "text" else 0.3 * (1 - k / b.units)
    )
    curve = lambda n, b: SensitivityCurve(
        kept_units=(0, b.units // 2, b.units),
        loss_increases=tuple(alone(n, b, k) for k in (0, b.units // 2, b.units)),
    )
    curves = {n: {b.name: curve(n, b) for b in bs} for n, bs in r.blocks.items()}
    rounding = {n: {p: 0.01 * (p != "fp32") for p in of} for n, of in sensitivity.rounding.items()}
    sensitivity = dataclasses.replace(sensitivity, curves=curves, rounding=rounding)
    predict = line(r)
    whole = Candidate(
        kept_units={n: {b.name: b.units for b in bs} for n, bs in r.blocks.items()},
        precision=dict.fromkeys(r.blocks, "fp32"),
    )
    budget = 0.8 * predict(whole)
    return r, sensitivity, predict, budget, evaluate, asked


def test_loss_increases_are_measured_within_a_split_and_the_split_made_again(compounding):
    r, sensitivity, predict, budget, evaluate, asked = compounding
    evaluator = TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1)
    inside, good = linearize_successively(
        r, sensitivity, predictor=predict, budget_ms=budget, evaluator=evaluator
    )
    loss = lambda c: evaluate(None, dataclasses.asdict(c))["loss"] - 1.0
    known = read_record(InteractionFactors, r.folder.interaction_factors)
    assert min(known.losses) == min(s.loss for s in known.splits)
    first, losses = known.splits[0], [loss(c) for c in good[:MAX_SEED_SPLITS]]
    assert losses[0] < 0.9 * (first.loss - 1.0) and all(predict(c) <= budget for c in good)
    assert losses == sorted(losses)
    cut = [b.name for b in r.blocks["text"] if first.candidate.kept_units["text"][b.name] < b.units]
    assert len(cut) > 1 and all(known.cuts["text"][b] > 2 for b in cut)  # they were underrated
    others = list(known.cuts["vision"].values())
    assert others and others == pytest.approx([1.0] * len(others), rel=0.05)  # these add up
    assert (
        inside.curves["text"][cut[0]].loss_increases[0]
        > 2 * sensitivity.curves["text"][cut[0]].loss_increases[0]
    )
    assert len(asked) - len(losses) == known.evaluations <= count_max_evaluations(r)


def test_no_round_follows_a_split_that_is_nearly_as_good_as_the_dense_pipeline(compounding):
    r, sensitivity, predict, budget, evaluate, asked = compounding
    evaluator = TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1)
    _, good = linearize_successively(
        r,
        sensitivity,
        predictor=predict,
        budget_ms=budget,
        evaluator=evaluator,
        near_dense_ratio=2.0,
    )
    known = read_record(InteractionFactors, r.folder.interaction_factors)
    assert len(known.losses) == 1 and not known.measured_splits
    assert known.losses[0] <= 2.0 * known.dense_loss
    # The dense pipeline and the first split: nothing was undone.
    assert len(asked) == 2 and good[0] == known.splits[0].candidate


def test_what_was_measured_is_kept_and_goes_on_where_it_stopped(compounding):
    r, sensitivity, predict, budget, evaluate, asked = compounding
    evaluator = TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1)

    def killed(stage, what, share):
        if "split 2" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linearize_successively(
            dataclasses.replace(r, on_progress=killed),
            sensitivity,
            predictor=predict,
            budget_ms=budget,
            evaluator=evaluator,
        )
    assert read_record(InteractionFactors, r.folder.interaction_factors).rounds == 1
    before = len(asked)
    inside, good = linearize_successively(
        r, sensitivity, predictor=predict, budget_ms=budget, evaluator=evaluator
    )
    known, again = (
        read_record(InteractionFactors, r.folder.interaction_factors),
        len(asked) - before,
    )
    assert known.rounds == r.spec.search.linearization_rounds + 1 and again > 0
    same, found = linearize_successively(
        r, sensitivity, predictor=predict, budget_ms=budget, evaluator=evaluator
    )
    assert len(asked) == before + again and found == good and same.curves == inside.curves
    for share in (0.95, 1.05):  # what no longer fits is trimmed, what would be too small filled up
        ms = [
            predict(c)
            for c in linearize_successively(
                r, sensitivity, predictor=predict, budget_ms=share * budget, evaluator=evaluator
            )[1]
        ]
        assert ms and all(0.97 * share * budget <= x <= share * budget for x in ms)
    assert len(asked) == before + again


def test_it_is_left_out_where_no_model_is_run(compounding):
    r, sensitivity, predict, budget, evaluate, asked = compounding
    for search in ({"evaluator": "estimated"}, {"linearization_rounds": 0}):
        spec = dataclasses.replace(r.spec, search=dataclasses.replace(r.spec.search, **search))
        off = dataclasses.replace(r, spec=spec)
        assert linearize_successively(
            off,
            sensitivity,
            predictor=predict,
            budget_ms=budget,
            evaluator=TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1),
        ) == (
            sensitivity,
            [],
        )
        assert not asked and count_max_evaluations(off) == 0


def test_structures_that_cannot_be_evaluated_are_told_and_left_out(compounding):
    r, sensitivity, predict, budget, evaluate, _ = compounding
    told = []

    whole = {n: {b.name: b.units for b in bs} for n, bs in r.blocks.items()}

    def failing(context, candidate):  # wherever the text tower was cut and its first block is whole
        kept = {n: {**whole[n], **by} for n, by in candidate["kept_units"].items()}
        first = next(iter(whole["text"]))
        if kept["text"] != whole["text"] and kept["text"][first] == whole["text"][first]:
            raise ValueError("odd")
        return evaluate(context, candidate)

    say = lambda stage, what, share: told.append(what)
    evaluator = TrialEvaluator(evaluate=failing, executor=InlineExecutor(None), workers=1)
    linearize_successively(
        dataclasses.replace(r, on_progress=say),
        sensitivity,
        predictor=predict,
        budget_ms=0.8 * budget,  # less than the text tower alone can give back
        evaluator=evaluator,
    )
    known = read_record(InteractionFactors, r.folder.interaction_factors)
    assert any("ValueError: odd" in t for t in told)
    assert next(iter(whole["text"])) not in known.cuts["text"] and known.cuts["vision"]
    r.folder.interaction_factors.unlink()
    nothing = TrialEvaluator(
        evaluate=lambda *_: {"loss": math.nan}, executor=InlineExecutor(None), workers=1
    )
    assert linearize_successively(
        r, sensitivity, predictor=predict, budget_ms=budget, evaluator=nothing
    ) == (sensitivity, [])
    assert not r.folder.interaction_factors.exists()  # another time they may be judged

    class Gone(InlineExecutor):
        def submit(self, *a, **k):
            from concurrent.futures import BrokenExecutor

            raise BrokenExecutor

    with pytest.raises(ClusterError, match="--resume"):
        TrialEvaluator(evaluate=evaluate, executor=Gone(None), workers=1).evaluate_all(
            {"c": Candidate(kept_units={}, precision={})},
            evaluate=evaluate,
            progress=lambda *a: None,
            message="it",
        )


def test_what_fails_by_chance_is_tried_again():
    tries = []

    def once(context, candidate):
        tries.append(1)
        if len(tries) == 1:
            raise OSError("lost")
        return {"loss": 2.0}

    evaluator = TrialEvaluator(evaluate=once, executor=InlineExecutor(None), workers=1, retries=1)
    losses = evaluator.evaluate_all(
        {"c": Candidate(kept_units={}, precision={})},
        evaluate=once,
        progress=lambda *a: None,
        message="it",
    )
    assert losses == {"c": 2.0} and len(tries) == 2


def test_splits_keep_other_limits_as_well(compounding):
    r, sensitivity, predict, budget, evaluate, _ = compounding
    weight = lambda c: sum(
        c.kept_units["text"].get(b.name, b.units) * b.rows_and_columns_per_unit
        for b in r.blocks["text"]
    )
    most = 0.15 * sum(b.units * b.rows_and_columns_per_unit for b in r.blocks["text"])
    limits = dataclasses.replace(r.spec.limits, params_m=most / 1e6)
    bound = dataclasses.replace(r, spec=dataclasses.replace(r.spec, limits=limits))
    per_unit = {b.name: b.rows_and_columns_per_unit for b in r.blocks["text"]}
    units = {b.name: b.units for b in r.blocks["text"]}
    footprint = Footprint(
        dense_params={"text": sum(per_unit[name] * units[name] for name in units)},
        params_per_unit={"text": per_unit},
        size_fits={},
        units={"text": units},
    )
    bound = dataclasses.replace(bound, shared=RunFolder(path=bound.folder.path))
    write_record(bound.shared.footprint, footprint)
    _, good = linearize_successively(
        bound,
        sensitivity,
        predictor=predict,
        budget_ms=budget,
        evaluator=TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1),
    )
    assert good and all(weight(c) <= most for c in good)
    _, free = linearize_successively(
        dataclasses.replace(r, folder=r.folder.get_subfolder("free")),
        sensitivity,
        predictor=predict,
        budget_ms=budget,
        evaluator=TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1),
    )
    assert any(weight(c) > most for c in free)


def test_curves_rise_and_what_is_next_to_nothing_has_a_trace(compounding):
    _, sensitivity, *_ = compounding
    [name, *_] = sensitivity.curves["text"]
    odd = {
        **sensitivity.curves,
        "text": {
            **sensitivity.curves["text"],
            name: SensitivityCurve(
                kept_units=(0, 2, 4, 6, 8), loss_increases=(1.0, 0.0, 0.2, 0.0, 0.0)
            ),
        },
    }
    now = dataclasses.replace(sensitivity, curves=odd).scale_loss_increases(
        {"text": {name: 3.0}}, {}
    )
    increases = now.curves["text"][name].loss_increases
    assert increases[0] > increases[1] > increases[2] > increases[3] > increases[4] == 0
    assert increases[:3] == pytest.approx((3.0, 0.6, 0.6), rel=1e-3) and increases[3] < 1e-3


def test_factors_move_half_the_way_and_rounding_has_its_own(compounding):
    _, sensitivity, *_ = compounding
    alone = sensitivity.scale_loss_increases({}, {})
    [name, *_] = sensitivity.curves["text"]
    split = EvaluatedSplit(
        candidate=Candidate(
            kept_units={"text": {name: 0}}, precision={"text": "int8", "vision": "int8"}
        ),
        loss=1.0,
    )
    cut, rounding = (
        alone.estimate_loss_increase("text", name, kept=0),
        alone.rounding["text"]["int8"],
    )
    losses_without = {
        ("text", name): 1.0 - 16 * cut,
        ("text", WHOLE_NODE): 1.0 - 4 * rounding,
        ("vision", WHOLE_NODE): math.inf,
    }
    moved = _move_factors(
        InteractionFactors(), sensitivity, split=split, losses_without=losses_without
    )
    assert moved.cuts == {"text": {name: pytest.approx(4.0)}}
    assert moved.rounding == {"text": pytest.approx(2.0)}
    less = _move_factors(
        InteractionFactors(cuts={"text": {name: 4.0}}),
        sensitivity,
        split=split,
        losses_without={("text", name): 1.5},  # without it the loss is higher
    )
    assert less.cuts["text"][name] == pytest.approx(4.0 * MIN_REAL_SHARE**STEP_EXPONENT)


def test_a_budget_out_of_reach_does_not_end_the_rounds(compounding):
    r, sensitivity, predict, budget, evaluate, _ = compounding
    evaluator = TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1)
    assert (
        linearize_successively(
            r, sensitivity, predictor=predict, budget_ms=1e-6, evaluator=evaluator
        )[1]
        == []
        and not r.folder.interaction_factors.exists()
    )
    assert (
        linearize_successively(
            r, sensitivity, predictor=predict, budget_ms=budget, evaluator=evaluator
        )[1]
        and read_record(InteractionFactors, r.folder.interaction_factors).losses
    )


def test_what_is_measured_where_quality_collapsed_is_not_used(compounding):
    r, sensitivity, predict, budget, evaluate, asked = compounding
    evaluator = TrialEvaluator(evaluate=evaluate, executor=InlineExecutor(None), workers=1)
    assert linearize_successively(
        r, sensitivity, predictor=predict, budget_ms=budget, evaluator=evaluator
    )[1]
    known, before = read_record(InteractionFactors, r.folder.interaction_factors), len(asked)
    assert known.dense_loss == 1.0 and not has_quality_collapsed(
        min(known.losses), known.dense_loss
    )
    # Beside so small a loss of the dense pipeline, the same losses are those of a collapse.
    dense_loss = 0.99 * min(known.losses) / COLLAPSE_RATIO
    write_record(r.folder.interaction_factors, dataclasses.replace(known, dense_loss=dense_loss))
    assert (
        linearize_successively(
            r, sensitivity, predictor=predict, budget_ms=budget, evaluator=evaluator
        )
        == (sensitivity, [])
        and len(asked) == before
    )


def test_loss_increases_add_up_by_weight():
    """One function adds them for splits, estimates and short trainings."""
    table = SensitivityTable(
        curves={
            "vision": {"0": SensitivityCurve(kept_units=(0, 4), loss_increases=(8.0, 0.0))},
            "text": {"0": SensitivityCurve(kept_units=(0, 4), loss_increases=(2.0, 0.0))},
        },
        rounding={"vision": {"fp32": 0.0, "int8": 0.25}, "text": {"fp32": 0.0, "int8": 0.5}},
    )
    candidate = Candidate(
        kept_units={"vision": {"0": 2}, "text": {"0": 1}},
        precision={"vision": "int8", "text": "fp32"},
    )
    assert table.add_losses(candidate) == 4.0 + 1.5 + 0.25
    weights = {"vision": {"0": 3.0}}
    assert table.add_losses(candidate, cut_weights=weights) == 3.0 * 4.0 + 1.5 + 0.25
    context = EstimateContext(table=table, base_loss=1.0)
    assert estimate_candidate(context, to_plain(candidate))["loss"] == 1.0 + 5.75


@pytest.mark.parametrize(
    ("losses", "trials", "made"),
    [
        ((0.5, 0.1), 40, (10, 9)),
        ((0.1,), 12, (8, 9)),
        ((0.1,), 4, (4, 9)),
        ((0.12,), 40, (40, 36)),
        ((), 40, (40, 36)),
    ],
)
def test_a_search_is_short_where_a_split_does_no_harm(
    tiny, machine, tmp_path, losses, trials, made
):
    """At mild targets nothing better can be found, and trials cost minutes."""
    messages = []
    options = {**machine, "on_progress": lambda *told: messages.append(told[1])}
    overrides = {"search.trials": trials, "search.level_switches": 36}
    run = workflow.open_run(tiny / "spec.yaml", tmp_path / "r", overrides=overrides, **options)
    factors = InteractionFactors(losses=losses, dense_loss=0.1)
    write_record(run.folder.interaction_factors, factors)
    evaluator = SimpleNamespace(workers=1)
    effort = _plan_effort(run, evaluator, attempt=0)
    assert (effort.trials, effort.level_switches) == made
    told = [message for message in messages if "loses nothing" in message]
    assert len(told) == (made != (trials, 36))
