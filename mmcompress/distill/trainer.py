"""Distillation of a pruned pipeline from the original one, all models at once, on the data it serves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcompress.data.base import Dataset
from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.losses import (
    block_output_losses,
    drop_cut_positions,
    record_block_outputs,
    weighted_losses,
)
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.runtime.timing import Clock, SystemClock, min_of_medians
from mmcompress.spec.schema import Distill
from mmcompress.storage import to_plain, write_record

Progress = Callable[[str, float], None]


HARMFUL_LOSS_RATIO = 1.05
"""A loss on choosing pairs this many times the best one seen is harm done."""


BF16_MAX_TIME_SHARE = 0.8
"""The share of the time of an fp32 product that one of bfloat16 takes at most to be used."""


WARMUP_STEPS, RATE_TRIAL_STEPS, RATE_MAX_LOSS_RATIO, MAX_RATE_HALVINGS, RATE_SEARCH_SHARE = (
    10,
    16,
    1.25,
    4,
    0.1,
)
"""Steps over which the rate rises; steps that a rate is tried for, and how many times the loss before any of them the
last of those may give; how often it is halved at most, and the share of the budget that may be spent on finding it."""


def group_parameters(models: Models) -> list[dict]:
    """Weight decay for matrices only."""
    unique = {id(p): p for m in models.values() for p in m.parameters() if p.requires_grad}
    matrices = [p for p in unique.values() if p.ndim > 1]
    rest = [p for p in unique.values() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]


def distill_(
    pipeline: TorchPipeline,
    student: Models,
    teacher: Models | Teacher,
    data: Dataset,
    options: Distill,
    seed: int,
    progress: Progress = lambda what, share: None,
    history: Path | None = None,
    choosing: Batch | None = None,
    hold_: Callable[[], None] = lambda: None,
    checkpoint: Checkpoint | None = None,
    first: int = 0,
    *,
    clock: Clock | None = None,
) -> list[dict[str, float]]:
    """Train `student` in place; returns its loss curve. Ends after `steps` or `minutes`, the rate following both.

    The generator reads the student's own tokens, so it learns to live with what the pruned encoder gives it. On the
    pairs `choosing` the pipeline's own loss is taken at the start and `checks` times on the way: when it was clearly
    lower before the end, the student is left as it was then, for little data can do harm. `hold_` is called after
    every step (weights that must stay zero). With a `checkpoint` a training that was cut off goes on from it. A
    `Teacher` that has taught others before knows its answers to what comes again. `first`: steps of trainings before
    this one, whose pairs are not drawn again.
    """
    clock = clock or SystemClock()
    if options.steps == 0 or options.minutes == 0:
        return []
    torch.manual_seed(seed)
    for m in student.values():
        m.eval()  # what is trained is what is deployed: no dropout, statistics of batch norms as they are
    known = teacher if isinstance(teacher, Teacher) else Teacher(pipeline, teacher)
    training, curve = (
        _Training(
            pipeline,
            student,
            teacher=known,
            data=data,
            options=options,
            seed=seed,
            hold_=hold_,
            first=first,
            clock=clock,
        ),
        [],
    )
    optimizer = torch.optim.AdamW(
        group_parameters(student), lr=options.learning_rate, betas=(0.9, 0.98), fused=True
    )
    best = _Best(
        pipeline, student, teacher=known.models, choosing=choosing, checks=options.validations
    )
    began, step, share, highest = clock.now(), 0, 0.0, options.learning_rate
    if checkpoint and (found := checkpoint.load_(training.flat, optimizer)):
        state, best.kept = found
        step, share, curve, began = (
            state["step"],
            state["share"],
            state["curve"],
            began - state["elapsed"],
        )
        best.seen, best.looked, best.waited = state["seen"], state["looked"], state["waited"]
        best.at = best.looked / best.checks if best.checks else 0.0
        highest = state.get("rate", highest)
    elif options.steps >= 10 * RATE_TRIAL_STEPS and options.find_learning_rate:
        limit = began + RATE_SEARCH_SHARE * options.minutes * 60
        highest = training.bearable(limit)
        progress(f"rate {highest:.2g}", 0.0)
    while share < 1:
        best.look(share, step)
        if step == 0 and best.seen:
            progress(
                f"the loss on choosing pairs is {best.seen[0]['choosing']:.3f}, was {best.dense:.3f}",
                0.0,
            )
        if options.patience and best.waited >= options.patience:
            break
        rate = (
            highest
            * min(1.0, (step + 1) / WARMUP_STEPS)
            * (0.5 * (1 + math.cos(math.pi * share)) * 0.98 + 0.02)
        )
        parts = training.advance_(optimizer, training.drawn(step), rate)
        step += 1
        elapsed = clock.now() - began
        share = max(step / options.steps, elapsed / (options.minutes * 60))
        if step % 5 == 1:
            curve.append({"step": step, "loss": sum(parts.values()), **parts})
            progress(f"step {step}, loss {curve[-1]['loss']:.3f}", min(share, 1.0))
        if checkpoint and checkpoint.is_due(elapsed):
            state = {"step": step, "share": share, "curve": curve, "rate": highest, **best.record()}
            checkpoint.save(
                elapsed, training.flat, optimizer=optimizer, best=best.kept, state=state
            )
    if curve and curve[-1]["step"] != step:
        curve.append({"step": step, "loss": sum(parts.values()), **parts})
    best.look(1.0, step)
    best.restore_()
    if history:
        write_record(
            history,
            to_plain(
                [{"step": 0, "rate": highest, "bf16": float(training.half)}, *curve, *best.seen]
            ),
        )
    if checkpoint:
        checkpoint.remove()
    return curve


class _Training:
    """The steps of one training: what is drawn, what it loses, and how weights follow."""

    def __init__(
        self,
        pipeline: TorchPipeline,
        student: Models,
        *,
        teacher: Teacher,
        data: Dataset,
        options: Distill,
        seed: int,
        hold_: Callable[[], None],
        first: int,
        clock: Clock,
    ):
        self.pipeline, self.student, self.teacher, self.data = pipeline, student, teacher, data
        self.options, self.seed, self.hold_, self.first = options, seed, hold_, first
        self.clock = clock
        self.weights = asdict(options)
        self.half = options.precision == "bf16" or (
            options.precision == "auto" and is_bf16_faster()
        )
        self.flat = [p for g in group_parameters(student) for p in g["params"]]

    def drawn(self, step: int) -> Batch:
        """The pairs of a step: fresh ones, or a cycle through `pairs` distinct ones."""
        o, step = self.options, self.first + step
        cycle = max(1, o.distinct_pairs // o.batch) if o.distinct_pairs else None
        seed = 1_000_003 * (self.seed + 1) + (step % cycle if cycle else step)
        return self.pipeline.collate(self.data.load("train", o.batch, seed=seed))

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        return _losses(
            self.pipeline,
            self.student,
            teacher=self.teacher,
            batch=batch,
            weights=self.weights,
            half=self.half,
        )

    def advance_(
        self, optimizer: torch.optim.Optimizer, batch: Batch, rate: float
    ) -> dict[str, float]:
        """One step; returns the weighted parts of the loss before it."""
        parts = self.losses(batch)
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.flat, 1.0)
        for g in optimizer.param_groups:
            g["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        self.hold_()
        return {k: float(v.detach()) for k, v in parts.items()}

    def _forward_seconds(self, step: int) -> float:
        batch, began = self.drawn(step), self.clock.now()
        with torch.no_grad():
            self.losses(batch)
        return self.clock.now() - began

    def bearable(self, limit: float) -> float:
        """The rate, halved until a few steps of it no longer make the loss `WORSE`; weights are left as they were.

        A structure that lost much learns fastest at a rate that throws one which lost little far from where it was.
        `limit`: when it has to be found, on the monotonic clock; it is not looked for where steps are too slow.
        """
        forward = min(self._forward_seconds(i) for i in range(2))  # the first one is slow
        if self.clock.now() + 4 * RATE_TRIAL_STEPS * forward > limit:
            return self.options.learning_rate
        rate, batches = self.options.learning_rate, [self.drawn(i) for i in range(RATE_TRIAL_STEPS)]
        start = [p.detach().clone() for p in self.flat]
        with torch.no_grad():
            before = sum(float(v) for b in batches[WARMUP_STEPS:] for v in self.losses(b).values())
        for _ in range(MAX_RATE_HALVINGS):
            optimizer = torch.optim.AdamW(
                self.flat, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            )
            told = [
                self.advance_(optimizer, b, rate * min(1.0, (i + 1) / WARMUP_STEPS))
                for i, b in enumerate(batches)
            ]
            with torch.no_grad():
                for p, first in zip(self.flat, start, strict=True):
                    p.copy_(first)
            if (
                sum(sum(parts.values()) for parts in told[WARMUP_STEPS:])
                <= RATE_MAX_LOSS_RATIO * before
            ):
                break
            rate /= 2
            if self.clock.now() > limit:
                break
        return rate


@cache
def is_bf16_faster() -> bool:
    """Whether this processor multiplies bfloat16 in clearly less time than fp32, by trying: flags do not say.

    Of two with avx512_bf16, one is twice as quick with it and one half as quick.
    """
    took = {}
    for kind in (torch.float32, torch.bfloat16):
        x, w = torch.zeros(512, 384, dtype=kind), torch.zeros(1536, 384, dtype=kind)
        took[kind] = min_of_medians(
            lambda x=x, w=w: nn.functional.linear(x, w), 3, rounds=20, limit=0.3
        )
    return took[torch.bfloat16] < BF16_MAX_TIME_SHARE * took[torch.float32]


def _losses(
    pipeline: TorchPipeline,
    student: Models,
    *,
    teacher: Teacher,
    batch: Batch,
    weights: Mapping[str, float],
    half: bool = False,
) -> dict[str, torch.Tensor]:
    """The weighted parts of the loss of one batch; with `half` the models multiply in bfloat16."""
    inside = weights["hidden"] or weights["cross"]
    watched: Models = student if inside else {}
    with (
        torch.inference_mode(),
        record_block_outputs(teacher.models, watched) as theirs,
        torch.autocast("cpu", enabled=half),
    ):
        # what its blocks add is seen only while they run
        target = drop_cut_positions(
            pipeline.forward(teacher.models, batch) if inside else teacher(batch), student
        )
    target = {n: {k: v.clone().float() for k, v in o.items()} for n, o in target.items()}
    with record_block_outputs(student, watched) as ours:
        with torch.autocast("cpu", enabled=half):
            out = pipeline.forward(student, batch)
        out = {n: {k: v.float() for k, v in o.items()} for n, o in out.items()}
        parts = weighted_losses(pipeline, out, teacher=target, batch=batch, weights=weights)
    if inside:
        wanted = {n: {b: v.clone() for b, v in by.items()} for n, by in theirs.items()}
        for name, loss in block_output_losses(student, ours, teacher=wanted).items():
            if weight := weights[name.split(".")[0]]:
                parts[name] = weight * loss
    return parts


class _Best:
    """The weights that did best on the choosing pairs so far."""

    def __init__(
        self,
        pipeline: TorchPipeline,
        student: Models,
        *,
        teacher: Models,
        choosing: Batch | None,
        checks: int,
    ):
        self.pipeline, self.student, self.choosing, self.checks = (
            pipeline,
            student,
            choosing,
            checks,
        )
        self.anchors: Outputs = {}
        self.dense = 0.0
        if choosing is not None and checks:
            self.anchors = pipeline.reference_outputs(teacher, choosing)
            self.dense = pipeline.loss_of_models(teacher, choosing, dense=self.anchors)
        self.seen: list[dict[str, float]] = []
        self.kept: list[torch.Tensor] = []
        self.at, self.looked, self.waited = 0.0, 0, 0

    def look(self, share: float, step: int) -> None:
        """Take the loss when the next check is due."""
        if self.choosing is None or not self.checks or share < self.at:
            return
        self.looked += 1
        self.at = self.looked / self.checks
        loss = self.pipeline.loss_of_models(self.student, self.choosing, dense=self.anchors)
        lower = not self.seen or loss < min(s["choosing"] for s in self.seen)
        self.waited = 0 if lower else self.waited + 1
        if lower:
            self.kept = [p.detach().clone() for m in self.student.values() for p in m.parameters()]
        self.seen.append({"step": step, "choosing": loss, "dense": self.dense})

    def record(self) -> dict[str, Any]:
        return {"seen": self.seen, "looked": self.looked, "waited": self.waited}

    def restore_(self) -> None:
        """Go back to the best weights, if the last ones are worse by more than such a loss can tell."""
        if not self.seen:
            return
        least = min(self.seen, key=lambda s: s["choosing"])
        if self.seen[-1]["choosing"] <= HARMFUL_LOSS_RATIO * least["choosing"]:
            return
        self.seen.append({**least, "step": self.seen[-1]["step"], "restored": least["step"]})
        with torch.no_grad():
            for p, best in zip(
                (p for m in self.student.values() for p in m.parameters()), self.kept, strict=False
            ):
                p.copy_(best)
