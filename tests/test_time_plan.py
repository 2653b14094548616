"""How long a run will take, and what is cut so that it ends in time: on a machine of arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
from fake_stages import QUICK_PACE, FakeStages
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import ImpatientClock, StoppedClock

from mmcompress.errors import SpecError
from mmcompress.run.fit_structure import open_search
from mmcompress.run.forecast import (
    RoundWork,
    count_linearization_evaluations,
    forecast_next_round,
    forecast_round,
)
from mmcompress.run.measure_pace import _tell_busy_machine, measure_pace, time_least
from mmcompress.run.stages import prepare_run
from mmcompress.run.time_plan import (
    PLAN_RESERVE,
    has_time_for_another,
    plan_least_work,
    plan_parts,
    plan_round,
    plan_sensitivity_pairs,
    plan_training_minutes,
)
from mmcompress.search.evaluator import start_evaluator
from mmcompress.search.executors import InlineExecutor
from mmcompress.search.linearize import count_max_evaluations
from mmcompress.search.run_search import run_search
from mmcompress.spec.durations import format_duration, parse_max_time
from mmcompress.workspace.context import open_run

PACE = replace(
    QUICK_PACE,
    trial_pair_seconds=0.01,
    cut_seconds=0.2,
    draw_pair_seconds=0.001,
    teacher_pair_seconds=0.004,
    cut_pair_seconds=0.004,
    student_pair_seconds=0.012,
    dense_ms=10.0,
    megabytes=50.0,
    requests=200,
    workers=2,
    worker_start_seconds=5.0,
    validation_pairs=100,
    training_validation_pairs=100,
    final_pairs_factor=3,
    finalists=3,
    calibration_pairs=200,
    sensitivity_pairs=50,
    steps=1000,
    batch=24,
    validations=4,
    judged_pairs=1000,
    measures_memory=True,
)
"""A machine on which an artifact takes some ten minutes."""

WORK = RoundWork(
    trials=40,
    level_switches=16,
    linearization_rounds=4,
    short_finetunings=5,
    attempts=5,
    minutes=4.0,
    parts=6,
)
"""What a spec asks for by default."""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("30m", 1800), ("5400s", 5400), ("1h30m", 5400), ("1.5H", 5400)],
)
def test_a_time_is_read(text, seconds):
    assert parse_max_time(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "0m", "-5m", "2 hours", "h", "1d"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(SpecError, match="2h, 30m or 5400s"):
        parse_max_time(text)


def test_a_time_is_told_in_words():
    told = [format_duration(seconds) for seconds in (44.6, 720, 7500)]
    assert told == ["45 s", "12 min", "2 h 5 min"]


def test_the_forecast_adds_up_what_each_stage_does():
    """Every figure is worked out here by hand, at a third of the dense latency."""
    share = 1 / 3
    forecast = forecast_round(PACE, WORK, share=share)
    # 4 rounds of 3 + 6 + 3, and 3 splits; 8 seeds; 3 + 3 grown; 3 finalists on twice as many pairs.
    evaluations = 51 + 40 + 16 + 8 + 6 + 6
    assert forecast.search == pytest.approx(5 + evaluations * (0.2 + 100 * 0.01 / 3) / 2)
    step = 24 * (0.001 + 0.004 + 0.012 / 3)
    refit = 200 * (0.001 + 0.008)
    check = 100 * 0.004 / 3
    assert forecast.short_trainings == pytest.approx(5 * (refit + 100 * step + check))
    assert forecast.training == pytest.approx(2 * refit + 1040 * step + 6 * check)
    assert forecast.export == pytest.approx(3 * 0.8 + 50 / 3 * 0.1)
    # Two structures, each 2,000 requests to both sides in four processes.
    requests = 2000 * 0.01 * (1 + share)
    # Four loads, and two more until the ratio is certain.
    assert forecast.fit == pytest.approx(2 * (forecast.export / 2 + 1.5 * (requests + 4 * 2.5)))
    assert forecast.measuring == pytest.approx(4 * (requests / 2 + 2 * 2.5))
    assert forecast.judging == pytest.approx(1000 * 0.01 * (1 + share) + 5)
    stages = [getattr(forecast, name) for name in forecast.__dataclass_fields__]
    assert forecast.total == pytest.approx(sum(stages))
    another = forecast_next_round(PACE, WORK, share=share)
    assert another.short_trainings == 0 and another.total < forecast.total
    assert another.training == forecast.training


def test_minutes_bound_the_training():
    share = 1 / 3
    long = forecast_round(replace(PACE, steps=100_000), WORK, share=share)
    assert long.training == pytest.approx(2 * 200 * 0.009 + 240 + 100 * 0.004 / 3)
    assert forecast_round(PACE, replace(WORK, minutes=0.0), share=share).training == 0


def test_as_many_linearization_evaluations_are_counted_as_the_search_allows(
    tiny, machine, tmp_path
):
    for rounds, trials in itertools.product((0, 1, 4), (0, 2, 40)):
        overrides = {"search.linearization_rounds": rounds, "search.trials": trials}
        folder = tmp_path / f"{rounds}-{trials}"
        run = open_run(tiny / "spec.yaml", folder, overrides=overrides, **machine)
        blocks = sum(len(node_blocks) for node_blocks in run.blocks.values())
        pace = replace(PACE, blocks=blocks, nodes=len(run.blocks))
        work = replace(WORK, trials=trials, level_switches=2, linearization_rounds=rounds)
        assert count_linearization_evaluations(pace, work) == count_max_evaluations(run)


@given(seconds=st.floats(0, 5000), more=st.floats(0, 2000), share=st.floats(0.1, 0.9))
@settings(max_examples=60, deadline=None)
def test_a_plan_fits_its_time_and_more_time_never_cuts_more(seconds, more, share):
    work = plan_round(PACE, WORK, share=share, seconds=seconds)
    least = plan_least_work(PACE, WORK)
    fits = PLAN_RESERVE * forecast_round(PACE, work, share=share).total <= seconds
    assert fits or work == least
    longer = plan_round(PACE, WORK, share=share, seconds=seconds + more)
    for name in WORK.__dataclass_fields__:
        assert getattr(least, name) <= getattr(work, name) <= getattr(longer, name)
        assert getattr(longer, name) <= getattr(WORK, name)
    assert work.short_finetunings != 1


def test_with_time_enough_nothing_is_cut():
    assert plan_round(PACE, WORK, share=0.3, seconds=1e5) == WORK


def test_a_training_gets_what_the_stages_behind_it_leave():
    minutes = plan_training_minutes(PACE, WORK, share=1 / 3, seconds=200)
    rest = forecast_round(PACE, plan_least_work(PACE, WORK), share=1 / 3).after_training
    assert 0.2 < minutes < 4 and 60 * minutes + rest <= 200
    assert plan_training_minutes(PACE, WORK, share=1 / 3, seconds=10) == 0.2
    assert plan_training_minutes(PACE, WORK, share=1 / 3, seconds=1e4) == 4
    # An interrupted training counts the minutes that it has behind it.
    resumed = plan_training_minutes(PACE, WORK, share=1 / 3, seconds=200, trained_seconds=60)
    assert resumed == pytest.approx(minutes + 1)


def test_parts_of_measuring_and_a_second_artifact_take_what_is_left():
    assert plan_parts(PACE, WORK, share=1 / 3, seconds=1e4) == 6
    assert plan_parts(PACE, WORK, share=1 / 3, seconds=0) == 2
    assert plan_parts(PACE, WORK, share=1 / 3, seconds=100) == 3
    assert has_time_for_another(PACE, WORK, share=1 / 3, seconds=300)
    assert not has_time_for_another(PACE, WORK, share=1 / 3, seconds=60)


@dataclass
class PassingClock(StoppedClock):
    """A clock that passes when a fake stage says so."""

    seconds: float = 0.0

    def read_seconds(self) -> float:
        return self.seconds


@dataclass
class TimedStages(FakeStages):
    """Fake stages that take the seconds of a machine of their own."""

    clock: PassingClock = field(default_factory=PassingClock)
    slowness: float = 1.0
    """What a stage takes / what the pace says."""
    preparation: float = 100.0
    """Seconds of everything before the search."""
    seen: dict = field(default_factory=dict)
    """What every stage was asked for."""

    def _pass(self, seconds):
        self.clock.seconds += self.slowness * seconds

    def prepare(self, run):
        self.seen["sensitivity_pairs"] = run.spec.data.sensitivity_pairs
        self._pass(self.preparation)
        return super().prepare(run)

    def fit(self, run, prepared, *, plan, tolerances):
        """Trials of a third of a second, until the search is over."""
        self.seen["fit"] = (run.spec.search, tolerances)
        self.seen["fitted_pairs"] = prepared.run.spec.data.sensitivity_pairs
        fitted = super().fit(run, prepared, plan=plan, tolerances=tolerances)
        search = run.spec.search
        for _ in range(
            search.linearization_rounds * 12 + search.trials + search.level_switches + 20
        ):
            if run.is_search_over():
                break
            self._pass(0.27)
        for _ in range(search.short_finetunings):
            if not run.is_search_over():
                self._pass(min(24.0, 6 * run.spec.distill.minutes))
        self._pass(42)
        return fitted

    def compress(self, run, prepared, *, fitted, earlier):
        """A training as long as its minutes allow."""
        if not run.folder.units.exists():
            self.seen["minutes"] = run.spec.distill.minutes
            self.clock.seconds += min(60 * run.spec.distill.minutes, 225)
        super().compress(run, prepared, fitted=fitted, earlier=earlier)
        self._pass(4)

    def evaluate(self, run, prepared, *, fitted, compressed, measuring):
        """As many parts as are allowed."""
        self.seen["parts"] = measuring.max_parts
        self._pass(20 * min(measuring.max_parts, 5) + 18)
        return super().evaluate(
            run, prepared, fitted=fitted, compressed=compressed, measuring=measuring
        )


ASKED = {
    "search.trials": 40,
    "search.level_switches": 16,
    "distill.minutes": 4,
    "distill.steps": 1000,
    "target": "3x",
}
"""The settings that `PACE` is of."""


def run_timed(run_fake, stages, **options):
    """Run timed stages; returns the messages, and the summary or summaries."""
    messages = []
    overrides = ASKED | options.pop("overrides", {})
    result = run_fake(
        stages,
        overrides=overrides,
        clock=stages.clock,
        on_progress=lambda stage, message, share: messages.append((stage, message)),
        **options,
    )
    return messages, result


def test_the_forecast_is_right_within_a_factor(run_fake):
    """The pace says what the stages of this machine take, but not one of their formulas."""
    stages = TimedStages(shares=(0.97,), pace=PACE)
    messages, _ = run_timed(run_fake, stages)
    [before, told] = [m for stage, m in messages if stage == "forecast"]
    assert "until 3x is made" in before and "to measure the dense pipeline and its cuts" in before
    round_seconds = stages.clock.seconds - stages.preparation
    forecast = forecast_round(PACE, WORK, share=1 / 3).total
    assert 1 / 1.5 < forecast / round_seconds < 1.5
    assert told.startswith(f"3x: an artifact takes about {format_duration(forecast)} (search ")
    assert "another one adds" in told
    rest = [m for stage, m in messages if stage == "time"]
    assert len(rest) == 2 and all("left for this artifact" in m for m in rest)


@pytest.mark.parametrize("max_time", ["6m", "8m", "12m", "20m"])
@pytest.mark.parametrize("slowness", [1.0, 1.1])
def test_a_run_ends_in_time_and_says_what_was_cut(run_fake, tmp_path, max_time, slowness):
    stages = TimedStages(shares=(1.03, 0.97), pace=PACE, slowness=slowness)
    _, summary = run_timed(run_fake, stages, max_time=max_time)
    assert stages.clock.seconds <= parse_max_time(max_time)
    assert (tmp_path / "r" / "bundle" / "manifest.json").exists()
    told = [warning for warning in summary.warnings if "--max-time" in warning]
    assert len(told) == bool(summary.time_cuts)
    if max_time == "6m":
        search, tolerances = stages.seen["fit"]
        assert search.trials < 40 and tolerances.max_attempts < 5
        assert "trials in place of 40" in told[0] and "minutes of training in place of 4" in told[0]
        assert "no further artifact" in told[0]
        assert stages.artifacts == 1
    if max_time == "20m":
        assert stages.artifacts == 2


def test_cuts_are_measured_on_fewer_pairs_where_time_is_short(run_fake):
    """Else the sensitivity of a slow pipeline takes all of the time."""
    pace = replace(PACE, blocks=40, sensitivity_pairs=100, cut_pair_seconds=0.02)
    stages = TimedStages(shares=(0.97,), pace=pace)
    messages, summary = run_timed(run_fake, stages, max_time="10m")
    # 4 cuts of 40 blocks take 3.2 s a pair; 30 % of 600 s, with a reserve of 15 %.
    told = "every cut measured on 48 pairs in place of 100"
    assert ("time", f"to end in time: {told}") in messages
    assert summary.time_cuts[0] == told
    assert stages.seen["sensitivity_pairs"] == 48
    # What comes behind it is told the spec as it was written.
    assert stages.seen["fitted_pairs"] == 128


@pytest.mark.parametrize(("seconds", "pairs"), [(1e4, 50), (600, 48), (60, 8), (0, 8), (1e9, 50)])
def test_pairs_of_the_sensitivity_follow_the_time(seconds, pairs):
    pace = replace(PACE, blocks=40, sensitivity_pairs=50, cut_pair_seconds=0.02)
    assert plan_sensitivity_pairs(pace, seconds=seconds) == pairs


def test_a_forecast_counts_the_pairs_that_there_are(tiny, machine, tmp_path):
    """A folder of some dozen files has fewer than a spec asks for by default."""
    overrides = {
        "data.calibration": 1000,
        "data.sensitivity_pairs": 900,
        "data.validation_pairs": 800,
    }
    run = open_run(tiny / "spec.yaml", tmp_path / "r", overrides=overrides, **machine)
    counts = run.data.count_pairs
    run.data.count_pairs = lambda: {**counts(), "train": 12, "val": 5}
    pace = measure_pace(run, None)
    assert pace.calibration_pairs == pace.sensitivity_pairs == 12
    assert pace.validation_pairs == pace.training_validation_pairs == 5
    assert pace.final_pairs_factor == 1


def test_without_a_limit_nothing_is_cut(run_fake):
    stages = TimedStages(shares=(1.03, 0.97), pace=PACE, slowness=5.0)
    _, summary = run_timed(run_fake, stages)
    assert summary.time_cuts == () and stages.artifacts == 2
    search, tolerances = stages.seen["fit"]
    assert search.trials == 40 and tolerances.max_attempts == 5 and stages.seen["minutes"] == 4


def test_too_short_a_time_is_refused_before_the_work(run_fake):
    stages = TimedStages(shares=(0.97,), pace=PACE)
    with pytest.raises(
        SpecError, match=r"too short: measuring the dense pipeline and its cuts takes .* give"
    ):
        run_timed(run_fake, stages, max_time="30s")
    assert stages.calls == [] and stages.clock.seconds == 0


def test_a_time_that_may_be_too_short_is_tried(run_fake, tmp_path):
    """On a busy machine forecasts are too long; a refusal would cost what can be done."""
    stages = TimedStages(shares=(0.97,), pace=PACE)
    messages, _ = run_timed(run_fake, stages, max_time="1m")
    told = [message for stage, message in messages if "may be too short" in message]
    assert len(told) == 1 and "--max-time 60 s" in told[0]
    assert "60 s are left, and the least work is forecast to take 3 min" in told[0]
    assert (tmp_path / "r" / "bundle" / "manifest.json").exists()


class JumpyClock:
    """A clock of a busy machine: most pieces of work seem to take thirty times as long."""

    def __init__(self, seconds):
        self.seconds = list(seconds)
        self.now = 0.0

    def read_seconds(self):
        return self.now

    def work(self):
        self.now += self.seconds.pop(0)


@pytest.mark.parametrize(
    ("seconds", "least", "tries"),
    [
        ([0.03] * 8 + [0.001] + [0.03] * 20, 0.001, 18),
        ([0.6, 0.6, 0.6], 0.6, 2),
        ([2.5, 0.1], 2.5, 1),
        ([0.0, 0.0, 0.0], 0.0, 2),
        ([0.001] * 30, 0.001, 20),
    ],
)
def test_the_pace_is_the_least_of_many_tries_of_quick_work(seconds, least, tries):
    clock = JumpyClock(seconds)
    assert time_least(clock, clock.work) == pytest.approx(least)
    assert len(seconds) - len(clock.seconds) == tries


def test_what_is_no_time_is_refused_before_anything_is_loaded(run_fake, tmp_path):
    with pytest.raises(SpecError, match="--max-time soon"):
        run_fake(FakeStages(shares=(0.97,)), max_time="soon")
    assert not (tmp_path / "r").exists()


def test_several_targets_share_the_time(run_fake, tmp_path):
    stages = TimedStages(shares=(0.97,), pace=PACE)
    messages, summaries = run_timed(
        run_fake,
        stages,
        several_targets=True,
        overrides={"target": "2x,3x"},
        max_time="12m",
    )
    assert len(summaries) == 2 and stages.clock.seconds <= 720
    assert all(summary.time_cuts for summary in summaries)
    # Once before everything, and once for each target.
    assert len([m for stage, m in messages if stage == "forecast"]) == 3
    assert any("for the targets after it" in m for _, m in messages)


def test_a_resumed_run_counts_its_own_time_and_keeps_its_structure(run_fake, tmp_path):
    stages = TimedStages(shares=(0.97,), pace=PACE, interrupt="train")
    with pytest.raises(KeyboardInterrupt):
        run_timed(run_fake, stages, max_time="6m")
    fitted = (tmp_path / "r" / "fitted.json").read_bytes()
    resumed = TimedStages(shares=(0.97,), pace=PACE, preparation=0.0)
    resumed.clock.seconds = 1e6
    messages, _ = run_timed(run_fake, resumed, max_time="8m")
    assert ("resume", "goes on with what the folder holds: a fitted structure") in messages
    assert (tmp_path / "r" / "fitted.json").read_bytes() == fitted
    assert "search" not in resumed.calls and resumed.seen["minutes"] > 2
    assert resumed.clock.seconds <= 1e6 + 480


def test_a_finished_run_is_read_without_measuring_its_pace(run_fake):
    stages = TimedStages(shares=(0.97,), pace=PACE)
    _, summary = run_timed(run_fake, stages, max_time="8m")
    assert summary.time_cuts
    again = TimedStages(shares=(0.97,), pace=None)
    _, same = run_timed(run_fake, again, overrides={"search.trials": 4, "search.level_switches": 2})
    assert same == summary


def test_a_search_ends_between_two_trials(tiny, prepare_tiny, machine, tmp_path):
    """The time is over from the third evaluation on; each is finished, and the best is chosen."""
    overrides = {"search.linearization_rounds": 0, "search.short_finetunings": 0}
    prepare_tiny(tmp_path / "r", overrides)
    run = open_run(tiny / "spec.yaml", tmp_path / "r", overrides=overrides, resume=True, **machine)
    prepared = prepare_run(run)
    clock = PassingClock()
    limited = replace(run, clock=clock, search_ends_at=2.5)
    with start_evaluator(limited, prepared.sensitivity) as evaluator:

        class CountingExecutor(InlineExecutor):
            def submit(self, *args, **kwargs):
                clock.seconds += 1
                return super().submit(*args, **kwargs)

        counting = replace(evaluator, executor=CountingExecutor(evaluator.executor.context))
        trials = run_search(
            limited,
            prepared.sensitivity,
            predictor=prepared.predictor,
            budget_ms=prepared.dense.latency_ms.p50 / 1.2,
            evaluator=counting,
        )
    assert len(trials) == 3 == clock.seconds
    # Nothing is proposed after a first structure when the time is over.
    late = replace(run, clock=clock, search_ends_at=0.0)
    with open_search(late, prepared.sensitivity) as propose:
        budget_ms = prepared.dense.latency_ms.p50 / 1.2
        assert propose(prepared.predictor, budget_ms, attempt=0) is not None
        assert propose(prepared.predictor, budget_ms, attempt=1) is None


def test_the_pace_is_measured_and_leaves_the_run_as_it_was(tiny, run_folder, machine, tmp_path):
    before = sorted(str(path) for path in run_folder.rglob("*"))
    options = {**machine, "clock": ImpatientClock()}
    run = open_run(tiny / "spec.yaml", run_folder, resume=True, **options)
    weights = {
        name: [tensor.clone() for tensor in model.state_dict().values()]
        for name, model in run.models.items()
    }
    prepared = prepare_run(run)
    pace = measure_pace(run, prepared)
    assert pace.trial_pair_seconds > 0 and pace.student_pair_seconds > 0 and pace.cut_seconds > 0
    assert pace.cut_pair_seconds > 0
    assert pace.dense_ms == prepared.dense.latency_ms.p50
    assert (pace.steps, pace.batch, pace.judged_pairs, pace.nodes) == (4, 4, 24, 3)
    rough = measure_pace(run, None)
    assert rough.cut_seconds == 0 and rough.dense_ms > 0
    # What was measured before the profile is not measured again after it.
    completed = measure_pace(run, prepared, known=rough)
    assert completed.cut_seconds > 0 and completed.dense_ms == pace.dense_ms
    assert completed.references == pace.references
    assert completed.teacher_pair_seconds == rough.teacher_pair_seconds
    for name, model in run.models.items():
        for tensor, kept in zip(model.state_dict().values(), weights[name], strict=True):
            assert (tensor == kept).all()
    assert sorted(str(path) for path in run_folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("cpu_seconds", "wall_seconds", "is_told"),
    [(0.4, 1.0, True), (0.9, 1.0, False), (0.0, 0.0, False)],
)
def test_a_forecast_says_when_other_programs_make_it_long(cpu_seconds, wall_seconds, is_told):
    told = []
    run = SimpleNamespace(on_progress=lambda stage, message, share: told.append((stage, message)))
    _tell_busy_machine(run, cpu_seconds=cpu_seconds, wall_seconds=wall_seconds)
    assert len(told) == is_told
    if is_told:
        [(stage, message)] = told
        assert stage == "forecast" and "this one had 40% of a core" in message


def test_the_forecast_counts_as_the_search_does():
    """A forecast needs no torch, so it has these numbers of its own."""
    from mmcompress.run import forecast
    from mmcompress.search import linearize, short_finetune

    assert forecast.LINEARIZED_SPLITS == linearize.SPLITS_PER_ROUND
    assert forecast.LINEARIZATION_EFFORT == linearize.MAX_EFFORT_FACTOR
    assert forecast.SHORT_TRAINING_SHARE == short_finetune.FINETUNE_BUDGET_SHARE


def test_a_schedule_without_an_end_is_forecast_to_take_its_minutes():
    from mmcompress.run.measure_pace import UNLIMITED_STEPS, _find_most_steps
    from mmcompress.spec.schema import Distill

    assert _find_most_steps(Distill(schedule="until_converged")) == UNLIMITED_STEPS
    assert _find_most_steps(Distill(steps=7)) == 7
