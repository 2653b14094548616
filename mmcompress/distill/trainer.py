"""Distillation of a pruned pipeline from the original one, all models at once, on the data it serves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from mmcompress.data.base import Dataset
from mmcompress.distill.losses import combined
from mmcompress.graph.pipeline import Models, TorchPipeline
from mmcompress.records import plain, write
from mmcompress.spec.schema import Distill

Progress = Callable[[str, float], None]


def parameters(models: Models) -> list[dict]:
    """Weight decay for matrices only."""
    unique = {id(p): p for m in models.values() for p in m.parameters() if p.requires_grad}
    matrices = [p for p in unique.values() if p.ndim > 1]
    rest = [p for p in unique.values() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]


def distill_(
    pipeline: TorchPipeline,
    student: Models,
    teacher: Models,
    data: Dataset,
    options: Distill,
    seed: int,
    progress: Progress = lambda what, share: None,
    history: Path | None = None,
) -> list[dict[str, float]]:
    """Train `student` in place; returns its loss curve. Ends after `steps` or `minutes`, the rate following both.

    The generator reads the student's own tokens, so it learns to live with what the pruned encoder gives it.
    """
    if options.steps == 0 or options.minutes == 0:
        return []
    torch.manual_seed(seed)
    groups = parameters(student)
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.98), fused=True)
    flat = [p for g in groups for p in g["params"]]
    for m in student.values():
        m.eval()  # what is trained is what is deployed: no dropout, statistics of batch norms as they are
    weights, curve = asdict(options), []
    began, step, share = time.monotonic(), 0, 0.0
    while share < 1:
        batch = pipeline.batch(data.load("train", options.batch, seed=_draw(options, seed, step)))
        with torch.inference_mode():
            target = pipeline.forward(teacher, batch)
        target = {n: {k: v.clone() for k, v in o.items()} for n, o in target.items()}
        parts = combined(pipeline, pipeline.forward(student, batch), target, batch, weights)
        loss = sum(parts.values())
        loss.backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(flat, 1.0)
        rate = options.rate * min(1.0, (step + 1) / 10) * (0.5 * (1 + math.cos(math.pi * share)) * 0.98 + 0.02)
        for g in optimizer.param_groups:
            g["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        share = max(step / options.steps, (time.monotonic() - began) / (options.minutes * 60))
        if step % 5 == 1:
            curve.append({"step": step, "loss": float(loss), **{k: float(v) for k, v in parts.items()}})  # type: ignore[arg-type]
            progress(f"step {step}, loss {float(loss):.3f}", min(share, 1.0))  # type: ignore[arg-type]
    if history:
        write(history, plain(curve))
    return curve


def _draw(options: Distill, seed: int, step: int) -> int:
    """The seed of a step's pairs: fresh ones, or a cycle through `pairs` distinct ones."""
    cycle = max(1, options.pairs // options.batch) if options.pairs else None
    return 1_000_003 * (seed + 1) + (step % cycle if cycle else step)
