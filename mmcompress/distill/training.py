"""The steps of one training: which pairs are drawn, what the loss is, how the weights follow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from mmcompress.data.base import Dataset, Pairs, join_pairs
from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.losses import (
    compute_block_output_losses,
    drop_cut_positions,
    record_block_outputs,
    weigh_losses,
)
from mmcompress.distill.pair_plan import MIXED_DRAWS, PlannedPair, plan_pairs
from mmcompress.distill.product_type import choose_product_type, multiply_in
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.worker_group import StepRequest, WorkerGroup, fail_together
from mmcompress.graph.losses import resolve_loss_weights
from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.models.device import free_memory
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.runtime.timing import Clock, SystemClock
from mmcompress.spec.schema import Distill

ADAM_BETAS = (0.9, 0.98)
"""Decay of AdamW's running means, as for CLIP's vision transformers (Radford et al. 2021)."""

WEIGHT_DECAY = 0.01
"""Weight decay of matrices. Vectors (biases, scales of norms) have none."""

MAX_GRADIENT_NORM = 1.0
"""Norm that the gradient of all weights together is clipped to."""

PAIR_SEED_FACTOR = 1_000_003
"""Factor on the seed of a run: two runs draw the same pairs only after that many steps."""


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """What a student learns from."""

    pipeline: TorchPipeline
    """The graph that student and teacher run in."""
    teacher: Teacher
    """The models to learn from. One that taught others before knows its outputs for their pairs."""
    data: Dataset
    """Where the training pairs come from."""
    validation: Batch | None = None
    """Pairs that the pipeline's own loss is taken on, on the way. Without them, the last weights
    are kept whatever happened."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a student is trained."""

    settings: Distill
    """The `distill` section of a spec: the budget, the weights of the losses, the learning rate."""
    budget_share: float = 1.0
    """Share of the steps and minutes of the settings that this training has."""
    loss_ratio: float | None = None
    """Loss before training / dense loss, where it is known before. `steps: auto` needs it; without
    it, it is measured if there are validations."""
    stop_share: float = 1.0
    """Share of the schedule at which the training stops for now. Below 1 it needs a checkpoint,
    from which another call goes on."""
    seed: int = 0
    """Seed of the pairs that are drawn."""
    first_step: int = 0
    """Steps of earlier trainings. Their pairs are not drawn again."""
    hold_weights_: Callable[[], None] | None = None
    """Called after every step, to restore weights that must not change (zeros that must stay)."""
    progress: StageProgress = ignore_progress
    """Called with a message and the share of the budget that is used up, 0 .. 1."""
    history: Path | None = None
    """A file for the losses of training and validation, written at the end."""
    checkpoint: Checkpoint | None = None
    """Where an interrupted training goes on from."""
    clock: Clock = field(default_factory=SystemClock)
    """The clock that minutes are counted by."""
    group: WorkerGroup | None = None
    """The processes that share every step; None: this process trains alone."""


class Training:
    """A student with what one step of its training needs."""

    def __init__(self, student: Models, inputs: TrainingInputs, *, options: TrainingOptions):
        """Make a training.

        Args:
            student: The models to train, by node.
            inputs: What they learn from.
            options: How they are trained.
        """
        settings = options.settings
        self.student = student
        self.inputs = inputs
        self.options = options
        self.group = options.group
        self.settings = settings
        self.clock = options.clock
        self.loss_weights = resolve_loss_weights(settings)
        self.compares_blocks = bool(self.loss_weights["hidden"] or self.loss_weights["cross"])
        pipeline = inputs.pipeline
        self.device = pipeline.device
        self.product_type = choose_product_type(pipeline.spec.compute.precision, self.device)
        # Small gradients would be zero in float16: the loss is scaled up for them.
        self._scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.product_type == torch.float16
        )
        self.parts_per_step = 1
        self.matrices, self.vectors = split_parameters(student)
        self.weights = [*self.matrices, *self.vectors]
        self._recent_draws: OrderedDict[int, Pairs] = OrderedDict()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the AdamW of this training, with weight decay for matrices only."""
        groups = [
            {"params": self.matrices, "weight_decay": WEIGHT_DECAY},
            {"params": self.vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.settings.learning_rate, betas=ADAM_BETAS, fused=True
        )

    def draw_batch(self, step: int, *, distinct_draws: int = 0, first_draw: int = 0) -> Batch:
        """Return the pairs of a step: fresh ones, or some that came before in another mix.

        Args:
            step: The step, counted from the one that takes the first draw.
            distinct_draws: Draws after which pairs come again; 0: they never do. Pairs of files are
                drawn anew for each step whatever it is: there are only so many files.
            first_draw: Number of the first draw.
        """
        settings = self.settings
        first_draw += self.options.first_step
        may_mix = not self._pairs_are_named
        if settings.distinct_pairs:
            # The same pairs serve all trainings of a run.
            distinct_draws = max(1, settings.distinct_pairs // settings.batch)
            step += first_draw
            first_draw = 0
            may_mix = True
        if not may_mix or not distinct_draws or step < distinct_draws:
            return self._collate_draw(first_draw + step)
        # Each process of a group mixes its own share of the draws.
        pair_count = len(self._list_own_places())
        planned = plan_pairs(step, distinct_draws, batch=pair_count, seed=self.options.seed)
        return self._mix_draws([(first_draw + draw, place) for draw, place in planned])

    @cached_property
    def repeats_draws(self) -> bool:
        """Whether pairs come again, and what the teacher puts out for them is kept on disk."""
        return (
            self.inputs.teacher.store is not None
            and not self.settings.distinct_pairs
            and not self.compares_blocks
            and not self._pairs_are_named
        )

    def is_new_draw(self, step: int) -> bool:
        """Return whether the teacher learns the pairs of a step, were they drawn afresh."""
        if not self.repeats_draws:
            return False
        return self.inputs.teacher.can_store(self._name_draw(self.options.first_step + step))

    @cached_property
    def _pairs_are_named(self) -> bool:
        """Whether the pairs come from files."""
        return bool(self.inputs.data.load("train", 1, seed=self._choose_seed(0)).names)

    def _choose_seed(self, draw: int) -> int:
        """Return the seed of a draw."""
        return PAIR_SEED_FACTOR * (self.options.seed + 1) + draw

    def _name_draw(self, draw: int) -> str:
        """Return the name of a draw: all trainings of a run with its pairs use it."""
        name = f"{self._choose_seed(draw)}-{self.settings.batch}"
        if self.group is None:
            return name
        return f"{name}-{self.group.rank}-of-{self.group.count}"

    def _list_own_places(self) -> range:
        """List the places of a draw that this process takes: all of them, or its share."""
        if self.group is None:
            return range(self.settings.batch)
        return self.group.list_own_places(self.settings.batch)

    def _load_draw(self, draw: int) -> Pairs:
        """Load the pairs of a draw, or this process's share. The last few stay in memory."""
        if draw not in self._recent_draws:
            pairs = self.inputs.data.load(
                "train", self.settings.batch, seed=self._choose_seed(draw)
            )
            if self.group is not None:
                pairs = join_pairs([(pairs, place) for place in self._list_own_places()])
            self._recent_draws[draw] = pairs
            if len(self._recent_draws) > MIXED_DRAWS:
                self._recent_draws.popitem(last=False)
        return self._recent_draws[draw]

    def _collate_draw(self, draw: int) -> Batch:
        """Make a batch of the pairs of one draw."""
        batch = self.inputs.pipeline.collate(self._load_draw(draw))
        return replace(batch, draw=self._name_draw(draw))

    def _mix_draws(self, planned: Sequence[PlannedPair]) -> Batch:
        """Make a batch of pairs of several draws. The teacher learns to know those draws first."""
        teacher = self.inputs.teacher
        for draw in sorted({draw for draw, _ in planned}):
            if not self.compares_blocks and teacher.can_store(self._name_draw(draw)):
                teacher(self._collate_draw(draw))
        pairs = join_pairs([(self._load_draw(draw), place) for draw, place in planned])
        sources = tuple((self._name_draw(draw), place) for draw, place in planned)
        return replace(self.inputs.pipeline.collate(pairs), sources=sources)

    def compute_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted parts of the loss of a batch."""
        return compute_losses(
            self.student,
            batch,
            inputs=self.inputs,
            loss_weights=self.loss_weights,
            product_type=self.product_type,
            group=self.group,
        )

    def begin_step(self, request: StepRequest) -> Batch:
        """Return the pairs of a step. The other processes of a group begin it, too.

        Args:
            request: The step.
        """
        if self.group is not None:
            self.group.send(replace(request, loss_scale=self._scaler.get_scale()))
            self.group.spread_weights_(self.weights)
        return self._draw_requested(request)

    def help_with_step(self, request: StepRequest) -> None:
        """Do what the leader of the group asks for: add the gradients of the own share to its own.

        Args:
            request: The step.
        """
        assert self.group is not None, "a process alone has no leader"
        self.group.spread_weights_(self.weights)
        batch = self._draw_requested(request)
        self._take_gradients_(batch, scale_loss=lambda loss: loss * request.loss_scale)
        self._drop_gradients_()

    def _draw_requested(self, request: StepRequest) -> Batch:
        """Return the pairs of a requested step."""
        return self.draw_batch(
            request.step,
            distinct_draws=request.distinct_draws,
            first_draw=request.first_draw,
        )

    def advance_(
        self, optimizer: torch.optim.Optimizer, batch: Batch, *, rate: float
    ) -> dict[str, float]:
        """Do one step at a learning rate.

        Returns:
            The weighted parts of the loss before the step.
        """
        losses = self._take_gradients_(batch, scale_loss=self._scaler.scale)
        self._scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self.weights, MAX_GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad()
        if self.options.hold_weights_ is not None:
            self.options.hold_weights_()
        return losses

    def _take_gradients_(
        self, batch: Batch, *, scale_loss: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Add the gradients of a batch to those of the weights; return the parts of its loss.

        Where the memory of a GPU runs out, the batch is taken in halves, from then on. A loss that
        compares the pairs of a batch then compares those of a half. All processes of a group halve
        their shares together.
        """
        # Every process must be able to take as many parts as the others.
        smallest_share = len(batch)
        if self.group is not None:
            smallest_share = self.settings.batch // self.group.count
        while True:
            try:
                parts = batch.split_into(self.parts_per_step)
                return self._add_gradients_(parts, scale_loss=scale_loss)
            except torch.OutOfMemoryError:
                if 2 * self.parts_per_step > smallest_share:
                    raise
            # Behind the handler: what it holds keeps the tensors of the step that failed.
            self.parts_per_step *= 2
            self._drop_gradients_()
            free_memory(self.device)
            self.options.progress(
                f"the memory of the device ran out: steps take their {len(batch)} pairs in "
                f"{self.parts_per_step} parts (distill.batch)",
                None,
            )

    def _drop_gradients_(self) -> None:
        """Forget the gradients of all weights."""
        for weight in self.weights:
            weight.grad = None

    def _add_gradients_(
        self, parts: Sequence[Batch], *, scale_loss: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Add the mean gradients of the parts of a batch; return the parts of its mean loss.

        Every pair counts alike, in a large part and in a small one.
        """
        totals: dict[str, float] = {}
        pair_counts = [len(part) for part in parts]
        if self.group is not None:
            pair_counts = self.group.add_counts(pair_counts)
        for part, pair_count in zip(parts, pair_counts, strict=True):
            share = pair_count / sum(pair_counts)
            losses = self.compute_losses(part)
            loss = torch.stack(list(losses.values())).sum() * share
            with fail_together(self.group):
                scale_loss(loss).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) * share
        if self.group is not None:
            self.group.add_gradients_(self.weights)
        return totals


def split_parameters(models: Models) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained parameters of models, tied ones once: matrices, then vectors."""
    unique: dict[int, nn.Parameter] = {}
    for model in models.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                unique[id(parameter)] = parameter
    matrices = [parameter for parameter in unique.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in unique.values() if parameter.ndim <= 1]
    return matrices, vectors


def compute_losses(
    student: Models,
    batch: Batch,
    *,
    inputs: TrainingInputs,
    loss_weights: Mapping[str, float],
    product_type: torch.dtype = torch.float32,
    group: WorkerGroup | None = None,
) -> dict[str, Tensor]:
    """Return the weighted parts of the distillation loss of one batch.

    The generator reads the tokens of the student's own encoder, so it learns to live with what the
    pruned encoder gives it.

    Args:
        student: The models to train.
        batch: The inputs of b pairs.
        inputs: The pipeline and the teacher.
        loss_weights: Weights by name of the loss; `hidden` and `cross` cost nothing at 0.
        product_type: What the models multiply in. Losses are computed in float32.
        group: Processes that each have a share of the batch; None: `batch` is the whole one.
    """
    pipeline = inputs.pipeline
    compares_blocks = bool(loss_weights["hidden"] or loss_weights["cross"])
    recorded_models: Models = student if compares_blocks else {}
    with fail_together(group):
        with (
            torch.inference_mode(),
            record_block_outputs(inputs.teacher.models, recorded_models) as teacher_blocks,
            multiply_in(product_type, pipeline.device),
        ):
            if compares_blocks:
                # Blocks can only be recorded while the models run: cached outputs would not do.
                teacher_outputs = pipeline.forward(inputs.teacher.models, batch)
            else:
                teacher_outputs = inputs.teacher(batch)
            teacher_outputs = drop_cut_positions(teacher_outputs, student)
        # Tensors of inference mode can't take part in a backward pass; copies can.
        target = _cast_to_float(_copy_outputs(teacher_outputs))
        with (
            record_block_outputs(student, recorded_models) as student_blocks,
            multiply_in(product_type, pipeline.device),
        ):
            student_outputs = pipeline.forward(student, batch)
        answers = _cast_to_float(student_outputs)
    if group is not None:
        target = group.gather_outputs(target)
        answers = group.gather_outputs(answers)
        batch = group.gather_batch(batch)
    block_losses: dict[str, Tensor] = {}
    with fail_together(group):
        losses = weigh_losses(pipeline, answers, teacher=target, batch=batch, weights=loss_weights)
        if compares_blocks:
            block_losses = compute_block_output_losses(
                student, student_blocks, teacher_outputs=_copy_outputs(teacher_blocks)
            )
    for name, loss in block_losses.items():
        weight = loss_weights[name.split(".")[0]]
        if weight:
            mean_loss = loss if group is None else group.average(loss)
            losses[name] = weight * mean_loss
    return losses


def _copy_outputs(outputs: Outputs) -> Outputs:
    """Copy every tensor."""
    copies: Outputs = {}
    for node_name, tensors in outputs.items():
        copies[node_name] = {name: tensor.clone() for name, tensor in tensors.items()}
    return copies


def _cast_to_float(outputs: Outputs) -> Outputs:
    """Cast every tensor to float32; those that are already stay the same."""
    casts: Outputs = {}
    for node_name, tensors in outputs.items():
        casts[node_name] = {name: tensor.float() for name, tensor in tensors.items()}
    return casts
