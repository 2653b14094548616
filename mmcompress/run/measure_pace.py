"""Measure the pace of this machine shortly: an evaluation, a training step, and what both need."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from mmcompress.data.base import Pairs, count_available
from mmcompress.distill.pair_plan import count_distinct_draws
from mmcompress.distill.product_type import multiply_in
from mmcompress.distill.step_plan import choose_step_count
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.training import Training, TrainingInputs, TrainingOptions
from mmcompress.graph.structure import cut_each_block
from mmcompress.kinds.base import Batch
from mmcompress.measure.latency.bench import has_time_budget
from mmcompress.models.counts import FP32_BYTES, count_params
from mmcompress.run.forecast import Pace
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.runtime.machine import describe_cpu
from mmcompress.runtime.timing import Clock
from mmcompress.search.short_finetune import MAX_VALIDATION_PAIRS
from mmcompress.search.worker import prune_node
from mmcompress.spec.schema import Distill
from mmcompress.spec.target import parse_target, split_targets
from mmcompress.workspace.context import RunContext, list_precisions

PACE_SEED = 999_983
"""Seed of the pairs that the pace is measured on: no stage draws them."""

MAX_PACE_SECONDS = 2.0
"""Seconds that one measured step may be expected to take; else it has fewer pairs."""

MIN_PACE_TRIES = 2
"""Times that each piece of work is timed, unless it is slow."""

MAX_PACE_TRIES = 20
"""Times that quick work is timed at most. Where other work takes turns with it on the processor,
most of its times are far too long, and one of many is not."""

QUICK_PACE_SECONDS = 0.5
"""Seconds for which quick work is timed again."""

MIN_CPU_SHARE = 0.75
"""Share of a core that work without pauses has on a machine that nobody else uses."""

STEP_PASSES = 5
"""Forward passes that a training step, with that of the teacher, is expected to last as long as."""

TIMED_SHARE = 0.5
"""Share of the units of the structure whose cutting is timed."""

START_SECONDS = {"inline": 0.0, "process": 8.0, "ray": 15.0}
"""Seconds until workers answer, by executor: each imports torch and receives the models."""

OTHER_START_SECONDS = 15.0
"""The same for the executor of a plug-in."""

UNLIMITED_STEPS = 1_000_000
"""Steps of a schedule without an end of its own: its minutes end it, as far as a forecast goes."""

UNKNOWN_PAIRS = 500
"""Pairs of a split whose number its data does not tell."""


def measure_pace(
    run: RunContext, prepared: PreparedRun | None, *, known: Pace | None = None
) -> Pace:
    """Measure what a forecast needs, in a few seconds.

    Args:
        run: The run; its data need not be labelled.
        prepared: What the targets share; None before it is made. Then a request is taken to last
            as long as the models need for one pair, and the cutting is left out.
        known: The pace that was measured before `prepared` was made. Only what was left out then is
            measured now.
    """
    with run.time_stage("forecast"):
        if known is not None and prepared is not None:
            return _complete_pace(run, prepared, known=known)
        run.on_progress("forecast", "measuring an evaluation and a training step", None)
        return _measure_pace(run, prepared)


def _complete_pace(run: RunContext, prepared: PreparedRun, *, known: Pace) -> Pace:
    """Add the cutting and the measured request to a pace."""
    dense_ms = prepared.dense.latency_ms.p50
    return replace(
        known,
        cut_seconds=_time_cut(run, prepared),
        dense_ms=dense_ms,
        references=_count_references(run, dense_ms=dense_ms),
    )


def _time_cut(run: RunContext, prepared: PreparedRun | None) -> float:
    """Return the seconds in which a trial cuts a structure; 0 where that is not known."""
    # Where losses are estimated, no trial cuts anything.
    if prepared is None or run.spec.search.evaluator != "measured":
        return 0.0
    is_inline = run.spec.search.executor == "inline"
    with _use_threads(run.spec.measure.threads if is_inline else 1):
        return time_least(run.clock, lambda: _cut_models(run, prepared))


def _measure_pace(run: RunContext, prepared: PreparedRun | None) -> Pace:
    """Measure what a forecast needs."""
    spec = run.spec
    search = spec.search
    is_inline = search.executor == "inline"
    first_seconds = time_least(run.clock, lambda: _forward(run, count=2, split="train"))
    step_pairs = _choose_pairs(first_seconds / 2, passes=STEP_PASSES, wanted=spec.distill.batch)
    trial_pairs = _choose_pairs(first_seconds / 2, passes=1, wanted=spec.data.validation_pairs)
    with _use_threads(spec.measure.threads if is_inline else 1):
        cpu_start = time.thread_time()
        wall_start = run.clock.read_seconds()
        trial_seconds = time_least(run.clock, lambda: _forward(run, count=trial_pairs, split="val"))
        _tell_busy_machine(
            run,
            cpu_seconds=time.thread_time() - cpu_start,
            wall_seconds=run.clock.read_seconds() - wall_start,
        )
    draw_seconds, teacher_seconds, student_seconds = _time_step(run, pairs=step_pairs)
    dense_ms = 1e3 * first_seconds / 2
    if prepared is not None:
        dense_ms = prepared.dense.latency_ms.p50
    data = spec.data
    # A folder may hold fewer pairs than the spec would use.
    validation_pairs = count_available(run.data, "val", wanted=data.validation_pairs)
    final_pairs = count_available(
        run.data, "val", wanted=data.validation_pairs * data.final_pairs_factor
    )
    calibration_pairs = count_available(run.data, "train", wanted=data.calibration)
    is_sensitivity_measured = spec.prune.sensitivity == "measured"
    megabytes = sum(count_params(model) for model in run.models.values()) * FP32_BYTES / 1e6
    judged_pairs = sum(_count_pairs(run, split) for split in ("test", *data.report))
    return Pace(
        trial_pair_seconds=trial_seconds / trial_pairs,
        cut_seconds=_time_cut(run, prepared),
        draw_pair_seconds=draw_seconds / step_pairs,
        teacher_pair_seconds=teacher_seconds / step_pairs,
        cut_pair_seconds=_time_behind_cuts(run, pairs=step_pairs) / step_pairs,
        student_pair_seconds=student_seconds / step_pairs,
        dense_ms=dense_ms,
        megabytes=megabytes,
        nodes=len(run.models),
        blocks=sum(len(blocks) for blocks in run.blocks.values()),
        references=_count_references(run, dense_ms=dense_ms),
        requests=spec.measure.requests,
        workers=1 if is_inline else min(search.workers, describe_cpu()["cores"]),
        worker_start_seconds=START_SECONDS.get(search.executor, OTHER_START_SECONDS),
        validation_pairs=validation_pairs if search.evaluator == "measured" else 0,
        training_validation_pairs=min(validation_pairs, MAX_VALIDATION_PAIRS),
        final_pairs_factor=final_pairs / max(validation_pairs, 1),
        finalists=search.finalists,
        calibration_pairs=calibration_pairs if spec.prune.refit else 0,
        sensitivity_pairs=(
            min(data.sensitivity_pairs, calibration_pairs) if is_sensitivity_measured else 0
        ),
        steps=_find_most_steps(spec.distill),
        new_pairs_share=_find_new_pairs_share(run),
        batch=count_available(run.data, "train", wanted=spec.distill.batch),
        validations=spec.distill.validations,
        judged_pairs=judged_pairs,
        further_splits=len(data.report),
        measures_memory=spec.measure.memory,
    )


def _tell_busy_machine(run: RunContext, *, cpu_seconds: float, wall_seconds: float) -> None:
    """Tell that a forecast is long since other programs take turns with this one.

    Args:
        run: The run.
        cpu_seconds: Seconds of the processor that this thread had while it worked.
        wall_seconds: Seconds that it took.
    """
    if wall_seconds <= 0 or cpu_seconds / wall_seconds >= MIN_CPU_SHARE:
        return
    share = cpu_seconds / wall_seconds
    run.on_progress(
        "forecast",
        f"other programs use the processor: this one had {share:.0%} of a core. "
        "Alone, it takes less time than told here",
        None,
    )


def _find_most_steps(settings: Distill) -> int:
    """Return the steps that a training is expected to have at most, if its minutes afford them."""
    if settings.schedule == "until_converged":
        return UNLIMITED_STEPS
    return choose_step_count(settings, loss_ratio=None, share=1.0)


def _find_new_pairs_share(run: RunContext) -> float:
    """Return the share of the pairs of a training that come for the first time."""
    settings = run.spec.distill
    steps = _find_most_steps(settings)
    if not steps:
        return 1.0
    if _load_pairs(run, "train", count=1).names:
        # Files come again in every pass, and what the dense pipeline makes of them is kept.
        asked_pairs = steps * settings.batch
        return count_available(run.data, "train", wanted=asked_pairs) / asked_pairs
    if not settings.store_gb:
        return 1.0
    return min(count_distinct_draws(steps, settings.max_passes) / steps, 1.0)


def time_least(clock: Clock, work: Callable[[], object]) -> float:
    """Return the least seconds that some work takes: what else runs on a machine only adds time."""
    least = math.inf
    start = clock.read_seconds()
    for tries in range(1, MAX_PACE_TRIES + 1):
        try_start = clock.read_seconds()
        work()
        now = clock.read_seconds()
        least = min(least, now - try_start)
        spent = now - start
        # A clock that stands still, as in a run without time, tells no more by another try.
        is_enough = spent > QUICK_PACE_SECONDS or spent == 0
        if spent > MAX_PACE_SECONDS or (tries >= MIN_PACE_TRIES and is_enough):
            break
    return least


def _choose_pairs(pair_seconds: float, *, passes: int, wanted: int) -> int:
    """Return how many pairs are timed: all that are wanted, or fewer where they are slow."""
    if pair_seconds <= 0:
        return wanted
    return min(max(int(MAX_PACE_SECONDS / (passes * pair_seconds)), 2), wanted)


def _load_pairs(run: RunContext, split: str, *, count: int) -> Pairs:
    """Load pairs; where the dense pipeline labels them, their own texts stand in for its texts."""
    pairs = run.data.load(split, count, seed=PACE_SEED)
    return replace(pairs, generated_texts=pairs.texts)


@torch.inference_mode()
def _forward(run: RunContext, *, count: int, split: str) -> None:
    """Run the dense models on some pairs."""
    batch = run.pipeline.collate(_load_pairs(run, split, count=count))
    run.pipeline.forward_in_pieces(run.models, batch)


@torch.inference_mode()
def _cut_models(run: RunContext, prepared: PreparedRun) -> None:
    """Cut every model as a trial does."""
    sensitivity = prepared.sensitivity
    for node_name, model in run.models.items():
        prune_node(
            model,
            cut_each_block(model.blocks, 1 - TIMED_SHARE),
            scores=sensitivity.scores[node_name],
            grams=sensitivity.grams[node_name] if run.spec.prune.refit else None,
            ridge=run.spec.prune.ridge,
        )


def _time_step(run: RunContext, *, pairs: int) -> tuple[float, float, float]:
    """Return the seconds of drawing, of the teacher and of the student in one training step."""
    draw_seconds = time_least(run.clock, lambda: _draw(run, pairs))
    batch = _draw(run, pairs)
    teacher = Teacher(run.pipeline, run.models, cache_bytes=0)
    inputs = TrainingInputs(pipeline=run.pipeline, teacher=teacher, data=run.data)
    student = {node_name: copy.deepcopy(model) for node_name, model in run.models.items()}
    options = TrainingOptions(settings=run.spec.distill, clock=run.clock)
    training = Training(student, inputs, options=options)
    optimizer = training.make_optimizer()
    with multiply_in(training.product_type, training.device):
        teacher_seconds = time_least(run.clock, lambda: teacher(batch))
    # The first step allocates the gradients and the moments.
    training.advance_(optimizer, batch[slice(0, 2)], rate=0.0)
    step_seconds = time_least(run.clock, lambda: training.advance_(optimizer, batch, rate=0.0))
    return draw_seconds, teacher_seconds, max(step_seconds - teacher_seconds, 0.0)


@torch.inference_mode()
def _time_behind_cuts(run: RunContext, *, pairs: int) -> float:
    """Return the seconds of what is run again for a cut, mean over the blocks of all models."""
    batch = _draw(run, pairs)
    outputs = run.pipeline.forward_in_pieces(run.models, batch)
    seconds = 0.0
    blocks = 0
    for node_name, node_blocks in run.blocks.items():
        if not node_blocks:
            continue
        downstream = run.pipeline.list_downstream(node_name)
        known = {name: values for name, values in outputs.items() if name not in downstream}
        start = run.clock.read_seconds()
        run.pipeline.forward_in_pieces(run.models, batch, known_outputs=known)
        seconds += len(node_blocks) * (run.clock.read_seconds() - start)
        blocks += len(node_blocks)
    return seconds / max(blocks, 1)


def _draw(run: RunContext, pairs: int) -> Batch:
    """Draw training pairs and make tensors of them."""
    return run.pipeline.collate(_load_pairs(run, "train", count=pairs))


@contextmanager
def _use_threads(count: int) -> Iterator[None]:
    """Let torch use some threads in the block."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)


def _count_references(run: RunContext, *, dense_ms: float) -> int:
    """Return how many other bundles are measured beside the dense and the compressed one."""
    goals = [parse_target(target) for target in split_targets(run.spec)]
    is_compared = any(goal.kind == "speedup" for goal in goals)
    if not is_compared or not has_time_budget(dense_ms):
        return 0
    searched: set[str] = set()
    for precisions in list_precisions(run).values():
        searched |= set(precisions)
    return min(len(searched - {"fp32"}), 1)


def _count_pairs(run: RunContext, split: str) -> int:
    """Return the pairs of a split without loading it."""
    count_pairs = getattr(run.data, "count_pairs", None)
    if count_pairs is not None:
        counts: dict[str, int] = count_pairs()
        return counts.get(split, UNKNOWN_PAIRS)
    count = getattr(run.data, split, UNKNOWN_PAIRS)
    return count if isinstance(count, int) else UNKNOWN_PAIRS
