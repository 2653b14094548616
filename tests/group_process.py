"""One process of a training: `group_process.py SPEC RANK COUNT MEETING OUT LOSSES SCARCE_RANK`.

COUNT processes meet at the file MEETING. The leader writes the loss of every step to OUT as JSON, and
the trained weights beside it. With COUNT 1 the process trains alone. LOSSES are the weights of the
losses as JSON. The memory of the process SCARCE_RANK runs out on more than `LARGEST_SHARE` pairs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill.help_leader import help_leader
from mmcompress.distill.step_loop import StepLoop
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.distill.worker_group import StepRequest, WorkerGroup
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.structure import cut_each_block
from mmcompress.kinds.base import Batch, Models
from mmcompress.models.sources import load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.surgery import copy_resized
from mmcompress.spec.schema import Distill

STEPS = 50

LARGEST_SHARE = 2
"""Pairs that the process with little memory can take at once."""


def make_memory_scarce_(pipeline: TorchPipeline) -> None:
    """Let the memory run out where the student runs on more than a few pairs."""
    forward = pipeline.forward

    def run_few(models: Models, batch: Batch, **options: object) -> object:
        if torch.is_grad_enabled() and len(batch) > LARGEST_SHARE:
            raise torch.OutOfMemoryError("out of memory")
        return forward(models, batch, **options)

    pipeline.forward = run_few


def train(
    spec_path: str, rank: int, count: int, meeting: str, out: Path, *, has_little_memory: bool
) -> None:
    torch.set_num_threads(1)
    group = None
    if count > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count
        )
        group = WorkerGroup(torch.device("cpu"))
    spec = load_spec(spec_path, {"target": "2x"})
    models = load_models(spec)
    pipeline = TorchPipeline(spec, models)
    if has_little_memory:
        make_memory_scarce_(pipeline)
    student = {
        name: copy_resized(model, cut_each_block(model.blocks, 0.5))
        for name, model in models.items()
    }
    store = TeacherStore(folder=out.parent / "teacher", max_bytes=10**9)
    inputs = TrainingInputs(
        pipeline=pipeline,
        teacher=Teacher(pipeline, models, store=store),
        data=open_dataset(spec.data),
    )
    settings = Distill(
        steps=STEPS, minutes=30, validations=0, find_learning_rate=False, batch=9, losses=LOSSES
    )
    told: list[str] = []
    options = TrainingOptions(
        settings=settings, group=group, progress=lambda message, _: told.append(message)
    )
    if group is not None and not group.is_leader:
        help_leader(student, inputs, options=options, report=print)
        return
    losses: list[float] = []
    advance_ = StepLoop.advance_

    def advance_and_note_(loop: StepLoop, rate: float) -> None:
        advance_(loop, rate)
        losses.append(sum(loop._losses.values()))

    StepLoop.advance_ = advance_and_note_
    distill_models_(student, inputs, options=options)
    if group is not None:
        group.send(StepRequest(is_end=True))
    out.write_text(json.dumps(losses), encoding="utf-8")
    out.with_suffix(".txt").write_text("\n".join(told), encoding="utf-8")
    weights = {}
    for name, model in student.items():
        for key, weight in model.named_parameters():
            weights[f"{name}.{key}"] = weight.detach().clone()
    save_file(weights, out.with_suffix(".safetensors"))


LOSSES: dict[str, float] = {}

if __name__ == "__main__":
    spec_path, rank, count, meeting, out, losses, scarce_rank = sys.argv[1:]
    LOSSES = json.loads(losses)
    train(
        spec_path,
        int(rank),
        int(count),
        meeting,
        Path(out),
        has_little_memory=rank == scarce_rank,
    )
