"""How long the stages of one artifact will take, from the measured pace of this machine. No torch.

With the inputs below and the work W that is planned, in seconds:

    search     start + evaluations / lanes * (cut + pairs * trial_pair * share)
    short      W.short * (refit + training of a tenth + pairs * teacher_pair * share)
    fit        min(W.attempts, 2) * (export / 2 + bench)
    training   2 * refit + min(60 * W.minutes, rate search + steps * step + validations)
    export     nodes * EXPORT_NODE + megabytes * share * EXPORT_MB
    measuring  min(W.parts, 4) * (part_share * comparison + part_share * loads * start of a process)
    judging    test pairs * (dense + compressed request) + memory of both sides

    step        = batch * (draw_pair + new_pairs * teacher_pair + student_pair * share)
    refit       = calibration pairs * (draw_pair + 2 * teacher_pair)
    evaluations = trials + switches + seeds + grown + finalists again + linearization
    share       = target / dense latency: a pruned pipeline takes about that share anywhere

Inputs, and where they come from:

    trial_pair: the dense pipeline on validation pairs, on the threads of a trial
    cut: one structure cut and refitted for a trial
    draw_pair, teacher_pair, student_pair: one training step of the dense pipeline
    cut_pair: the dense pipeline on training pairs, downstream of a cut
    dense request: the profile
    megabytes, nodes, blocks: the dense models
    pairs, steps, lanes, parts: the spec
    new_pairs: share of the training pairs that come for the first time
"""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.measure.latency.bench import (
    MAX_REQUESTS_FACTOR,
    bench_repeats,
    choose_comparison_seconds,
)

PROCESS_SECONDS = 2.5
"""Seconds until a fresh process has loaded ONNX Runtime and the bundles."""

EXPORT_NODE_SECONDS = 0.8
"""Seconds of the export and the proofs of a node, whatever its size."""

EXPORT_MB_SECONDS = 0.1
"""Seconds of the export and the proofs of a megabyte of weights."""

SEED_EVALUATIONS = 8
"""Structures that a search begins with: splits of the budget, and plain starts."""

NEXT_EVALUATIONS = 24
"""Structures that are evaluated when the search goes on for another artifact."""

LINEARIZED_SPLITS = 3
"""Splits of the budget in each round of the linearization."""

LINEARIZATION_EFFORT = 2
"""Evaluations of the linearization / trials and switches, at which no further round begins."""

SHORT_TRAINING_SHARE = 0.1
"""Steps and minutes of a short training / those of the final one."""

RATE_SEARCH_STEPS = 40
"""Training steps that the search for a learning rate takes: two rates are tried as a rule."""

EXPECTED_ATTEMPTS = 2
"""Structures that are measured, as a rule, until one fits the target."""

EXPECTED_LOADS_FACTOR = 1.5
"""Loads of a structure, as a rule, until its ratio is certain enough / those that it has at least.
"""

EXPECTED_PARTS = 4
"""Parts of the final measuring, as a rule, until the ratio is certain enough."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """The pace of this machine, and what the spec fixes: the inputs of a forecast."""

    trial_pair_seconds: float
    """Seconds of the dense pipeline for a validation pair, on the threads of a trial."""
    cut_seconds: float
    """Seconds to cut and refit a structure for a trial."""
    draw_pair_seconds: float
    """Seconds to draw a training pair and make tensors of it."""
    teacher_pair_seconds: float
    """Seconds of the dense pipeline for a training pair, on all threads."""
    cut_pair_seconds: float
    """Seconds of the dense pipeline for a training pair behind a cut, mean over the cuts. What lies
    upstream is not run again."""
    student_pair_seconds: float
    """Seconds of a training pair forward and backward, of a student of the dense size."""
    dense_ms: float
    """Milliseconds of a request to the dense bundle."""
    megabytes: float
    """Megabytes of the weights of all dense models."""
    nodes: int
    """Models of the pipeline."""
    blocks: int
    """Prunable blocks of all models."""
    references: int
    """Bundles that are measured beside the dense and the compressed one."""
    requests: int
    """Requests that the spec asks for (`measure.requests`)."""
    workers: int
    """Trials at a time, at most as many as cores."""
    worker_start_seconds: float
    """Seconds until the workers of a search answer."""
    validation_pairs: int
    """Pairs of every trial; 0 where losses are estimated."""
    training_validation_pairs: int
    """Pairs that a training is validated on."""
    final_pairs_factor: float
    """Factor to the pairs of finalists."""
    finalists: int
    """Trials that are evaluated on more pairs."""
    calibration_pairs: int
    """Training pairs of a refit; 0 without one."""
    sensitivity_pairs: int
    """Training pairs that the loss of every single cut is measured on; 0 where it is estimated."""
    steps: int
    """Training steps of the spec."""
    batch: int
    """Pairs of a training step."""
    validations: int
    """Times that a training is validated on the way."""
    judged_pairs: int
    """Pairs of the test split and of further splits that are reported."""
    further_splits: int
    """Splits that are reported beside the test split."""
    new_pairs_share: float = 1.0
    """Share of the pairs of a training that come for the first time: the others cost no forward
    pass of the dense pipeline."""
    measures_memory: bool = True
    """Whether the memory of both sides is measured."""


@dataclass(frozen=True, kw_only=True)
class RoundWork:
    """What one artifact is worked on for: everything here can be cut to a time."""

    trials: int
    """Proposals of the sampler."""
    level_switches: int
    """Exchanges of units after them."""
    linearization_rounds: int
    """Rounds in which loss increases are measured among other cuts."""
    short_finetunings: int
    """Structures that are trained for a short while."""
    attempts: int
    """Structures that are measured before the training."""
    minutes: float
    """Minutes of training at most."""
    parts: int
    """Parts of the final measuring."""


@dataclass(frozen=True, kw_only=True)
class RoundForecast:
    """Seconds of every stage of one artifact."""

    search: float
    """Linearization and trials."""
    short_trainings: float
    """All short trainings; none is made where the cut does little harm."""
    fit: float
    """Structures measured before the training."""
    training: float
    """The training of the artifact."""
    export: float
    """Its bundle, with proofs."""
    measuring: float
    """Its latency."""
    judging: float
    """Its quality and its memory."""

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return self.until_training + self.training + self.after_training

    @property
    def until_training(self) -> float:
        """Seconds of the stages before the training."""
        return self.search + self.short_trainings + self.fit

    @property
    def after_training(self) -> float:
        """Seconds of the stages behind the training."""
        return self.export + self.measuring + self.judging


def forecast_round(pace: Pace, work: RoundWork, *, share: float) -> RoundForecast:
    """Forecast the stages of the first artifact for a target.

    Args:
        pace: The pace of this machine.
        work: What is planned.
        share: Target / latency of the dense pipeline.
    """
    evaluations = count_evaluations(pace, work)
    search = pace.worker_start_seconds + _time_evaluations(pace, evaluations, share=share)
    refit = _time_refit(pace)
    short = _time_training(
        pace,
        steps=round(SHORT_TRAINING_SHARE * pace.steps),
        minutes=SHORT_TRAINING_SHARE * work.minutes,
        share=share,
        validations=1,
    )
    export = forecast_export(pace, share=share)
    attempts = min(work.attempts, EXPECTED_ATTEMPTS)
    fit = attempts * (export / 2 + forecast_bench(pace, share=share))
    expected_parts = max(EXPECTED_PARTS, count_base_parts(pace))
    training = 0.0
    if pace.steps and work.minutes:
        training = 2 * refit + _time_training(
            pace,
            steps=pace.steps + RATE_SEARCH_STEPS,
            minutes=work.minutes,
            share=share,
            validations=pace.validations + 2,
        )
    return RoundForecast(
        search=search,
        short_trainings=work.short_finetunings * (refit + short),
        fit=fit,
        training=training,
        export=export,
        measuring=min(work.parts, expected_parts) * forecast_part(pace, share=share),
        judging=forecast_judging(pace, share=share),
    )


def forecast_next_round(pace: Pace, work: RoundWork, *, share: float) -> RoundForecast:
    """Forecast the stages of another artifact: the search only goes on, with one attempt."""
    first = forecast_round(pace, work, share=share)
    return RoundForecast(
        search=pace.worker_start_seconds + _time_evaluations(pace, NEXT_EVALUATIONS, share=share),
        short_trainings=0.0,
        fit=first.export / 2 + forecast_bench(pace, share=share),
        training=first.training,
        export=first.export,
        measuring=first.measuring,
        judging=first.judging,
    )


def count_evaluations(pace: Pace, work: RoundWork) -> float:
    """Count the evaluations of a search on as many pairs as a trial takes."""
    grown = pace.finalists + pace.nodes
    again = pace.finalists * (pace.final_pairs_factor - 1)
    searched = work.trials + work.level_switches
    return SEED_EVALUATIONS + searched + grown + again + count_linearization_evaluations(pace, work)


def count_linearization_evaluations(pace: Pace, work: RoundWork) -> int:
    """Count the structures that the rounds of the linearization evaluate at most."""
    if not work.linearization_rounds or not pace.validation_pairs:
        return 0
    per_round = LINEARIZED_SPLITS + pace.blocks + pace.nodes
    by_effort = LINEARIZATION_EFFORT * (work.trials + work.level_switches) + per_round
    return min(work.linearization_rounds * per_round, by_effort) + LINEARIZED_SPLITS


def _time_evaluations(pace: Pace, count: float, *, share: float) -> float:
    """Return the seconds of some evaluations of structures on the workers."""
    pairs_seconds = pace.validation_pairs * pace.trial_pair_seconds * share
    return count * (pace.cut_seconds + pairs_seconds) / max(pace.workers, 1)


def _time_refit(pace: Pace) -> float:
    """Return the seconds of a refit of all models, in order."""
    return pace.calibration_pairs * (pace.draw_pair_seconds + 2 * pace.teacher_pair_seconds)


def _time_training(
    pace: Pace, *, steps: int, minutes: float, share: float, validations: int
) -> float:
    """Return the seconds of a training, which its minutes bound."""
    teacher_seconds = pace.new_pairs_share * pace.teacher_pair_seconds
    step_seconds = pace.batch * (
        pace.draw_pair_seconds + teacher_seconds + pace.student_pair_seconds * share
    )
    validation_seconds = pace.training_validation_pairs * pace.teacher_pair_seconds * share
    worked_seconds = steps * step_seconds + validations * validation_seconds
    return min(60 * minutes + validation_seconds, worked_seconds)


def forecast_export(pace: Pace, *, share: float) -> float:
    """Return the seconds of the export of an artifact, with proofs."""
    return pace.nodes * EXPORT_NODE_SECONDS + pace.megabytes * share * EXPORT_MB_SECONDS


def forecast_bench(pace: Pace, *, share: float) -> float:
    """Return the seconds in which a structure is measured beside the dense pipeline."""
    round_ms = pace.dense_ms * (1 + share + pace.references)
    asked = MAX_REQUESTS_FACTOR * pace.requests * round_ms / 1e3
    sending = min(choose_comparison_seconds(pace.dense_ms), asked)
    loads = bench_repeats(pace.dense_ms)
    seconds = sending + loads * PROCESS_SECONDS
    # A slow pipeline is loaded once.
    return seconds if loads == 1 else EXPECTED_LOADS_FACTOR * seconds


def forecast_part(pace: Pace, *, share: float) -> float:
    """Return the seconds of one part of the final measuring."""
    part_share = (1 + pace.references / 2) / count_base_parts(pace)
    loads = max(1, round(part_share * bench_repeats(pace.dense_ms)))
    # A part counts its share of the requests, however long they take.
    round_ms = pace.dense_ms * (1 + share + pace.references)
    least = pace.requests / count_base_parts(pace) * round_ms / 1e3
    asked = MAX_REQUESTS_FACTOR * least
    sending = min(max(part_share * choose_comparison_seconds(pace.dense_ms), least), asked)
    return sending + loads * PROCESS_SECONDS


def count_base_parts(pace: Pace) -> int:
    """Return the parts that are measured around the evaluation in any case."""
    return 2 + pace.further_splits


def forecast_judging(pace: Pace, *, share: float) -> float:
    """Return the seconds in which both sides answer the splits that are reported."""
    asking = pace.judged_pairs * pace.dense_ms * (1 + share) / 1e3
    return asking + 2 * PROCESS_SECONDS * pace.measures_memory
