"""Methods side by side: each fitted to the target by its own rule, everything else the same."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from simulated import SimulatedBenchmarker, StoppedClock

from mmcompress.errors import SpecError
from mmcompress.experiments.ablate import ablate, remove_fixed_dimensions
from mmcompress.experiments.baselines import BASELINES
from mmcompress.experiments.cells import CLAIMS, REFERENCE_CELL, list_cells
from mmcompress.experiments.claims import Claim, judge_claim, measure_side_by_side
from mmcompress.experiments.compare import compare
from mmcompress.experiments.make_cell import plan_training
from mmcompress.experiments.proposals import choose_fastest_precisions
from mmcompress.graph.blocks import count_steps
from mmcompress.run.fit_structure import SearchSteps, open_search
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.profile import profile_pipeline
from mmcompress.stats import PerSampleScores, decide_claim, estimate_paired_difference
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import open_run
from mmcompress.workspace.folder import RunFolder

QUICK = {
    "target": "1.2x",
    "search.trials": 2,
    "search.level_switches": 1,
    "search.linearization_rounds": 1,
    "search.short_finetunings": 0,
    "distill.steps": 1,
}


@pytest.fixture(scope="module")
def compare_tiny(tiny, prepare_tiny, machine):
    """`compare_tiny(out)`: compare methods on the tiny pipeline from what `prepare_tiny` leaves."""

    def compare_prepared(out, **options):
        prepare_tiny(out, QUICK)
        return compare(tiny / "spec.yaml", out, overrides=QUICK, resume=True, **options, **machine)

    return compare_prepared


@pytest.fixture(scope="module")
def compared(compare_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "c"
    return folder, compare_tiny(folder, methods=("student", "uniform", "int8"))


@pytest.mark.very_slow
def test_every_method_goes_the_whole_way(compared, tiny, machine, tmp_path):
    """Those of `compared` are there already."""
    folder = tmp_path / "all"
    shutil.copytree(compared[0], folder)
    found = compare(tiny / "spec.yaml", folder, overrides=QUICK, resume=True, **machine)
    assert set(found) == set(BASELINES)
    assert (
        found["longer"].compressed.nodes["vision"].precision == "fp32"
        and found["longer"].unimodal_ratio == 0
    )


@pytest.mark.very_slow
def test_every_method_leaves_a_summary_and_a_row(compared):
    folder, found = compared
    assert list(found) == ["searched", "student", "uniform", "int8"]
    rows = json.loads((folder / "compare.json").read_text())
    assert set(rows) == set(found) and all(r["speedup"] > 0 for r in rows.values())
    for name in found:
        assert (
            all(p.passed for p in found[name].proofs)
            and name in (folder / "compare.html").read_text()
        )
        assert f"| {name} |" in (folder / "compare.md").read_text()
    said = json.loads((folder / "uniform" / "outcomes.json").read_text())
    for side in ("baseline", "compressed"):
        for metric, q in getattr(found["uniform"], side).quality.items():
            assert sum(said[side][metric]["numerators"]) / q.n == pytest.approx(q.value)
    assert "The search keeps more than 'uniform': **" in (folder / "compare.md").read_text()
    told = json.loads((folder / "claims.json").read_text())
    assert {c["claim"] for c in told} >= {
        "The search keeps more than 'uniform'",
        "The search keeps more than 'int8'",
    }


@pytest.mark.very_slow
def test_methods_are_what_they_say(compared):
    _, found = compared
    blocks = {
        (n, b.name): b
        for n, bs in found["uniform"].blocks.items()
        for b in bs
        if b.group != "tokens"
    }
    cuts = lambda s: {
        at: (b.units - s.kept_units[at[0]].get(b.name, b.units)) / b.granularity / count_steps(b)
        for at, b in blocks.items()
    }
    shares = list(cuts(found["uniform"]).values())
    assert max(shares) - min(shares) <= 0.5  # blocks of four heads can be cut by quarters only
    assert set(cuts(found["int8"]).values()) == {0.0}
    assert found["int8"].compressed.nodes["text"].precision == "int8"
    assert found["student"].kept_units == found["searched"].kept_units
    assert found["student"].samples != found["searched"].samples


@pytest.mark.very_slow
def test_a_done_method_is_not_done_again(compared, tiny, machine):
    folder, _ = compared
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/summary.json")}
    options = {"overrides": QUICK, "resume": True, **machine}
    compare(tiny / "spec.yaml", folder, methods=("uniform", "int8"), **options)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_an_unknown_method_is_refused(tiny, tmp_path):
    with pytest.raises(SpecError, match="unknown method 'unifrom'; did you mean 'uniform'"):
        compare(tiny / "spec.yaml", tmp_path / "c", methods=("unifrom",))


@pytest.mark.very_slow
def test_an_ablation_makes_its_cells_and_judges_its_claims(tiny, tmp_path, machine, prepare_tiny):
    changes = {**QUICK, "prune.rounds": 2}
    prepare_tiny(tmp_path / "a", changes)
    options = {"tables": ("order", "schedule"), "resume": True, **machine}
    found = ablate(tiny / "spec.yaml", tmp_path / "a", overrides=changes, **options)
    assert {REFERENCE_CELL, "order-prune", "order-prune__refit", "schedule-gradual"} <= set(found)
    assert found["order-prune"].kept_units == found[REFERENCE_CELL].kept_units
    precisions = lambda name: {n.precision for n in found[name].compressed.nodes.values()}
    assert all(
        precisions(f"order-{name}") == {"fp32"}
        for name in ("prune", "prune__refit", "prune__refit__distil")
    )
    assert precisions("order-prune__refit__int8") == precisions(REFERENCE_CELL)
    claims = json.loads((tmp_path / "a" / "claims.json").read_text())
    assert "Refit helps without training" in {c["claim"] for c in claims}
    told = ("supported", "not supported", "undecided at this n", "not at equal latency (")
    assert all(c["verdict"].startswith(told) for c in claims)
    page = (tmp_path / "a" / "ablation.html").read_text()
    assert all(c["claim"] in page for c in claims) and "<h2>order</h2>" in page
    with pytest.raises(SpecError, match="unknown table 'odrer'"):
        ablate(tiny / "spec.yaml", tmp_path / "b", overrides=QUICK, tables=("odrer",))


def test_what_a_cell_fixes_is_not_searched():
    from mmcompress.spec.space import Dimension, Space

    space = Space(
        name="s",
        dimensions={
            "prune.protection": Dimension(low=1.0, high=4.0),
            "nodes.a.prune.ffn": Dimension(low=0.0, high=0.5),
        },
    )
    assert set(
        remove_fixed_dimensions(space, {"prune.protection": 1.0, "distill.steps": 0}).dimensions
    ) == {"nodes.a.prune.ffn"}


def test_every_claim_names_cells_that_are_made(spec):
    made = {c.folder for c in list_cells(spec)}
    assert all({*c.better, *c.worse} <= made for c in CLAIMS)
    assert all(c.structure_of in made or not c.structure_of for c in list_cells(spec))
    order = [c.folder for c in list_cells(spec)]
    assert all(
        order.index(c.structure_of) < order.index(c.folder)
        for c in list_cells(spec)
        if c.structure_of
    )


def test_a_verdict_needs_more_than_its_interval():
    right = lambda share, error=False: [
        {
            "m": PerSampleScores(
                numerators=tuple(float(i < 100 * share) for i in range(100)), is_error_rate=error
            )
        }
    ]
    assert decide_claim(right(0.9), right(0.8))[0] == "supported"
    assert decide_claim(right(0.8), right(0.9))[0] == "not supported"
    assert decide_claim(right(0.81), right(0.8))[0] == "undecided at this n"
    assert decide_claim(right(0.8), right(0.8)) == ("undecided at this n", 0.0, 0.0)
    assert decide_claim(right(0.1, True), right(0.2, True))[0] == "supported"


def test_a_gap_is_paired_and_metrics_are_drawn_together():
    rng = np.random.default_rng(1)
    base = rng.random(1000) < 0.9
    other = base.copy()
    other[rng.choice(np.flatnonzero(base), 15, replace=False)] = False
    tally = lambda x: PerSampleScores(numerators=tuple(map(float, x)))
    one, two = [{"a": tally(base)}], [{"a": tally(other)}]
    found, half = estimate_paired_difference(one, two)
    assert found == pytest.approx(0.015) and half == pytest.approx(
        1.96 * np.sqrt(0.015 * 0.985 / 1000), rel=0.1
    )
    twice = estimate_paired_difference(
        [{"a": tally(base), "b": tally(base)}], [{"a": tally(other), "b": tally(other)}]
    )
    assert twice == pytest.approx((found, half))  # the same metric twice tells nothing more
    mean = estimate_paired_difference([{"a": tally(base)}, {"a": tally(other)}], two)
    assert mean[0] == pytest.approx(found / 2)
    words = [
        {
            "wer": PerSampleScores(
                numerators=(1.0, 0.0), denominators=(10.0, 10.0), is_error_rate=True
            )
        }
    ]
    assert estimate_paired_difference(
        words,
        [
            {
                "wer": PerSampleScores(
                    numerators=(3.0, 0.0), denominators=(10.0, 10.0), is_error_rate=True
                )
            }
        ],
    )[0] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["knapsack", "linearized", "separate"])
def test_a_method_that_nothing_satisfies_gives_the_fastest(name, run_folder, tiny, tmp_path):
    from mmcompress.run.stages import prepare_run
    from mmcompress.search.build_problem import build_problem, find_fastest
    from mmcompress.workspace import context as workflow

    r = workflow.open_run(tiny / "spec.yaml", run_folder, resume=True)
    prepared = prepare_run(r)
    predict, sensitivity = prepared.predictor, prepared.sensitivity
    r = dataclasses.replace(r, folder=RunFolder(path=tmp_path))
    with BASELINES[name].open_proposals(r, sensitivity) as propose:
        found = propose(predict, 1e-6, 0)
    assert (
        found.candidate
        == find_fastest(build_problem(r, sensitivity, predictor=predict, budget_ms=1e-6), predict)
        and found.latency_ms > 1e-6
    )


def test_uniform_cuts_come_block_by_block(run_folder, tiny):
    """Blocks of one size that all lose a unit together would jump over the target."""
    from mmcompress.graph.blocks import apportion_cuts
    from mmcompress.run.stages import prepare_run
    from mmcompress.workspace import context as workflow

    assert [sum(apportion_cuts([4, 4, 4, 16], k)) for k in range(29)] == list(range(29))
    assert apportion_cuts([4, 4, 4, 16], 7) == [1, 1, 1, 4] and apportion_cuts([4, 4, 4], 2) == [
        1,
        1,
        0,
    ]
    r = workflow.open_run(tiny / "spec.yaml", run_folder, resume=True)
    prepared = prepare_run(r)
    predict, sensitivity = prepared.predictor, prepared.sensitivity
    predict = dataclasses.replace(predict, overhead_ms=0.0)  # all of it may be cut
    ms = predict(dataclasses.replace(_whole(r), precision=choose_fastest_precisions(r, predict)))
    with BASELINES["uniform"].open_proposals(r, sensitivity) as propose:
        slow, quick = (propose(predict, share * ms, 0) for share in (0.97, 0.95))
    removed = lambda t: sum(
        b.units - t.candidate.kept_units[n][b.name] for n, bs in r.blocks.items() for b in bs
    )
    assert removed(slow) <= removed(quick) and slow.latency_ms >= quick.latency_ms
    left = lambda t: t.candidate.kept_units["vision"]["tokens"]
    [window] = [b for b in r.blocks["vision"] if b.group == "tokens"]
    with BASELINES["shortened"].open_proposals(r, sensitivity) as propose:
        short = propose(predict, 0.9 * ms, 0)
    assert left(quick) == window.units > left(short) and short.latency_ms <= 0.9 * ms


def test_what_misses_by_little_is_fitted_and_what_misses_by_much_is_searched_for_anew(
    run_folder, tiny, tmp_path
):
    from mmcompress.results.records import Trial
    from mmcompress.run.stages import prepare_run
    from mmcompress.search import build_problem as choose
    from mmcompress.search import repair as moves
    from mmcompress.search.run_search import FULL_BUDGET_SHARE
    from mmcompress.workspace import context as workflow

    r = workflow.open_run(tiny / "spec.yaml", run_folder, resume=True)
    sensitivity = prepare_run(r).sensitivity
    r = dataclasses.replace(r, folder=RunFolder(path=tmp_path))

    @dataclasses.dataclass(frozen=True)
    class Line:  # a step of any block takes about as long
        correction: float = 1.0

        def __call__(self, c):
            weighed = (
                c.kept_units[n][b.name] / b.granularity for n, bs in r.blocks.items() for b in bs
            )
            return self.correction * sum(weighed)

    whole, searches = _whole(r), []
    budget = 0.75 * Line()(whole)
    p = choose.build_problem(r, sensitivity, predictor=Line(), budget_ms=budget)
    first = moves.cut_to_budget(p, whole, loss_increase=sensitivity.estimate_loss_increase)

    def search(run, sensitivity, *, predictor, budget_ms, evaluator, attempt, known_candidates):
        searches.append(attempt)
        return [
            Trial(
                number=0,
                origin="seed",
                overrides={},
                candidate=first,
                latency_ms=predictor(first),
                loss=0.0,
                quality={},
                evaluation_seconds=0.0,
            )
        ]

    def keep_sensitivity(run, sensitivity, **_):
        return sensitivity, []

    def take_first(run, evaluator, *, trials, budget_ms):
        return trials[0]

    def take_best(run, sensitivity, *, best, **_):
        return best

    steps = SearchSteps(
        linearize=keep_sensitivity, search=search, choose=take_first, rank=take_best
    )
    with open_search(r, sensitivity, steps=steps) as propose:
        assert propose(Line(), budget, 0).candidate == first and searches == [0]
        near = propose(Line(1.05), budget, 1)
        assert searches == [0] and near.origin == "adjusted" and np.isfinite(near.loss)
        p = dataclasses.replace(
            choose.build_problem(r, sensitivity, predictor=Line(1.05), budget_ms=budget),
            precisions={},
        )
        assert near.candidate == moves.grow_to_budget(
            p,
            moves.cut_to_budget(p, first, loss_increase=sensitivity.estimate_loss_increase),
            loss_increase=sensitivity.estimate_loss_increase,
            rounding=sensitivity.rounding,
        )
        assert FULL_BUDGET_SHARE * budget <= Line(1.05)(near.candidate) <= budget
        propose(Line(1.05 * 1.2), budget, 2)
    assert searches == [0, 2]


def _whole(r):
    from mmcompress.graph.structure import Candidate

    return Candidate(
        kept_units={n: {b.name: b.units for b in bs} for n, bs in r.blocks.items()},
        precision=dict.fromkeys(r.blocks, "fp32"),
    )


class RecordingBenchmarker(SimulatedBenchmarker):
    """A simulated machine that notes which bundles it measures beside each other."""

    def __init__(self):
        self.bundles = []

    def benchmark_bundles(self, job, folder):
        self.bundles.append(list(job.bundles))
        return super().benchmark_bundles(job, folder)


@pytest.fixture()
def three_methods(tiny, prepare_tiny, run_folder, tmp_path):
    """(run, benchmarker): two methods with the structure of `run_folder`, and the dense one in int8."""
    benchmarker = RecordingBenchmarker()
    folder = tmp_path / "c"
    prepare_tiny(folder, QUICK)
    options = {"overrides": QUICK, "resume": True, "bench": benchmarker, "clock": StoppedClock()}
    run = open_run(tiny / "spec.yaml", folder, **options)
    fitted = read_record(FittedStructure, run_folder / "fitted.json")
    methods = {
        "searched": (fitted.candidate, run_folder / "bundle"),
        "student": (fitted.candidate, run_folder / "bundle"),
        "int8": (_whole(run), run_folder / "rounded" / "int8"),
    }
    for name, (candidate, bundle) in methods.items():
        shutil.copytree(bundle, folder / name / "bundle")
        shutil.copy(run_folder / "outcomes.json", folder / name)
        write_record(
            folder / name / "fitted.json", dataclasses.replace(fitted, candidate=candidate)
        )
    return run, benchmarker


def test_equal_latency_is_measured_side_by_side(three_methods):
    r, benchmarker = three_methods
    folder, asked = r.folder.path, benchmarker.bundles
    dense = profile_pipeline(r)
    found = measure_side_by_side(r, ("searched", "int8"), dense=dense)
    count = len(asked)
    assert count and all(names == ["fp32", "searched", "int8"] for names in asked)
    assert all(0 < x < 3 for x in found.values())
    assert measure_side_by_side(r, ("searched", "int8"), dense=dense) == found
    assert len(asked) == count
    assert len(set(measure_side_by_side(r, ("searched", "student"), dense=dense).values())) == 1
    assert len(asked) == count  # one structure

    def claimed(ours: float, theirs: float, gap: float) -> str:
        (folder / "side_by_side.json").write_text(
            json.dumps({"searched int8": {"searched": ours, "int8": theirs}})
        )
        scores = json.loads((folder / "searched" / "outcomes.json").read_text())
        for name, sign in (("searched", 1), ("int8", -1)):
            for metric in scores["compressed"].values():
                # Every second input is answered by one side alone; without a gap these cancel out.
                metric["numerators"] = [
                    0.5 + sign * (gap / 2 if gap else 0.5 - i % 2)
                    for i in range(len(metric["numerators"]))
                ]
            write_record(folder / name / "outcomes.json", scores)
        claim = Claim(text="it is so", better=("searched",), worse=("int8",))
        return judge_claim(r, claim, dense=dense).verdict

    unequal = "not at equal latency (50.0% and 54.0% of the dense pipeline's)"
    assert claimed(0.5, 0.54, 0.0) == claimed(0.54, 0.5, 0.2) == claimed(0.5, 0.54, -0.2) == unequal
    assert (
        claimed(0.5, 0.54, 0.2) == "supported" and claimed(0.54, 0.5, -0.2) == "not supported"
    )  # and faster
    assert claimed(0.5, 0.51, 0.0) == "undecided at this n"


def test_what_a_space_does_not_hold_is_told_before_the_work(tiny, tmp_path, machine):
    told = []
    with pytest.raises(SpecError, match="no node may be int8"):
        compare(
            tiny / "spec.yaml", tmp_path / "c", methods=("searched", "int8"), space="search_spaces/prune_only.yaml", overrides=QUICK,
            on_progress=lambda stage, *a: told.append(stage), **machine,
        )  # fmt: skip
    assert "search" not in told
    off = {**QUICK, "search.linearization_rounds": 0}
    with pytest.raises(SpecError, match="'linearized' is of no use here"):
        compare(tiny / "spec.yaml", tmp_path / "d", methods=("linearized",), overrides=off)


def test_the_task_loss_alone_teaches_the_generator(spec):
    from dataclasses import replace

    quiet = replace(spec, distill=replace(spec.distill, losses={"caption": 0.0}))
    (cell,) = [c for c in list_cells(quiet) if c.name == "task loss alone"]
    assert cell.changes["distill.losses.caption"] == 1.0
    assert cell.changes["distill.losses.logits"] == 0.0
    trained = plan_training(quiet, BASELINES["longer"], steps=5)
    assert trained.losses["caption"] == 1.0 and trained.losses["logits"] == 0.0


def test_a_number_of_steps_ends_a_schedule_that_has_no_end_of_its_own(spec):
    open_ended = dataclasses.replace(
        spec, distill=dataclasses.replace(spec.distill, schedule="until_converged")
    )
    trained = plan_training(open_ended, BASELINES["searched"], steps=5)
    assert (trained.steps, trained.schedule) == (5, "cosine")
    assert plan_training(open_ended, BASELINES["searched"], steps=0).schedule == "until_converged"
