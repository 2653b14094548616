"""Distillation losses, each by the name of its weight in the spec's `distill.losses`.

Shapes in this file:
    B  batch                  D  width of an embedding
    N  tokens, or positions   W  width of a token or of the residual stream
    T  tokens of a text       V  size of the vocabulary
    Q, K  queries and keys of a join (both B while training)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.kinds.base import SIMILARITY_SCALE, Batch, Models, Outputs
from mmcompress.models.base import TokenSelector
from mmcompress.pipeline.forward import TorchPipeline

MIN_VARIANCE = 1e-6
"""Least variance that a squared error is divided by: outputs of a small batch may be constant."""


def compute_embedding_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Return the mean squared distance of embeddings of length 1 (CLIP-KD, Yang et al. 2024)."""
    distances_B = (student_BD - teacher_BD).square().sum(-1)
    return distances_B.mean()


def compute_token_loss(student_BNW: Tensor, teacher_BNW: Tensor) -> Tensor:
    """Return the mean squared error of token states, or scores, / the teacher's variance over the
    batch."""
    error = F.mse_loss(student_BNW, teacher_BNW)
    variance = teacher_BNW.var().clamp(min=MIN_VARIANCE)
    return error / variance


def compute_affinity_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Return the divergence of similarities from the teacher's (TinyCLIP, Wu et al. 2023).

    It is the mean of two KL divergences from the teacher: of the keys for each query, and of the
    queries for each key.

    Args:
        student: Query [b, d] and key [b, d] embeddings of the student.
        teacher: The same of the teacher.
    """
    student_QK = _scale_similarities(student)
    teacher_QK = _scale_similarities(teacher)
    rows = F.kl_div(
        student_QK.log_softmax(1),
        teacher_QK.log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
    columns_sum = F.kl_div(
        student_QK.log_softmax(0), teacher_QK.log_softmax(0), log_target=True, reduction="sum"
    )
    columns = columns_sum / student_QK.shape[1]
    return (rows + columns) / 2


def _scale_similarities(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return the scaled similarities of queries and keys [q, k]."""
    query_QD, key_KD = pair
    return SIMILARITY_SCALE * query_QD @ key_KD.T


def compute_logit_loss(student_BTV: Tensor, teacher_BTV: Tensor, *, keep: Tensor) -> Tensor:
    """Return the divergence of next-token distributions from the teacher's (Hinton et al. 2015).

    Args:
        student_BTV: Logits of the student.
        teacher_BTV: Logits of the teacher.
        keep: [b, t] the positions that count.
    """
    return F.kl_div(
        student_BTV[keep].log_softmax(-1),
        teacher_BTV[keep].log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


@contextmanager
def record_block_outputs(models: Models, blocks: Models) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Record what blocks add to their streams while models run.

    Args:
        models: The models that run.
        blocks: Models whose blocks are recorded; `models` must have the same ones.

    Yields:
        Outputs of the blocks, filled while the models run: node -> block -> [b, n, w] in float32.
    """
    outputs: dict[str, dict[str, Tensor]] = {node_name: {} for node_name in models}
    with ExitStack() as stack:
        for node_name, model in blocks.items():
            for block in model.weighted_blocks:
                record = _make_recorder(outputs[node_name], block.name)
                reader = models[node_name].get_submodule(block.reader)
                handle = reader.register_forward_hook(record)
                stack.callback(handle.remove)
        yield outputs


def _make_recorder(
    outputs: dict[str, Tensor], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Make a forward hook that keeps the output of a module under a name."""

    def record_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs[name] = output.float()

    return record_output


def compute_block_output_losses(
    student: Models,
    student_outputs: Mapping[str, Mapping[str, Tensor]],
    *,
    teacher_outputs: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return the mean error of what the blocks of each model add / the teacher's variance.

    Args:
        student: The pruned models. Blocks that are gone do not count.
        student_outputs: What `record_block_outputs` gave for the student.
        teacher_outputs: What it gave for the teacher.

    Returns:
        `hidden.<node>` and, for cross-attention, `cross.<node>`.
    """
    losses: dict[str, list[Tensor]] = {}
    for node_name, model in student.items():
        selector = model.token_selector
        for block in model.weighted_blocks:
            student_BNW = student_outputs[node_name].get(block.name)
            teacher_BNW = teacher_outputs[node_name].get(block.name)
            if student_BNW is None or teacher_BNW is None:
                continue
            if student_BNW.ndim == 3 and student_BNW.shape != teacher_BNW.shape:
                teacher_BNW = _drop_positions(teacher_BNW, selector)
            if student_BNW.shape != teacher_BNW.shape:
                continue
            loss_name = "cross" if block.kind == "cross_attention" else "hidden"
            block_losses = losses.setdefault(f"{loss_name}.{node_name}", [])
            block_losses.append(compute_token_loss(student_BNW, teacher_BNW))
    return {name: torch.stack(values).mean() for name, values in losses.items()}


def _drop_positions(x_BNW: Tensor, selector: TokenSelector | None) -> Tensor:
    """Leave out the positions that the student has cut; what never had them stays as it is."""
    if selector is None or x_BNW.shape[1] < selector.count:
        return x_BNW
    return selector.select_positions(x_BNW, selector.index)


def drop_cut_positions(teacher: Outputs, student: Models) -> Outputs:
    """Return the teacher's outputs without the positions that the student has cut."""
    outputs = {node_name: dict(values) for node_name, values in teacher.items()}
    for node_name, model in student.items():
        selector = model.token_selector
        if selector is not None and selector.kept_count < selector.count:
            tokens_BNW = outputs[node_name]["tokens"]
            outputs[node_name]["tokens"] = _drop_positions(tokens_BNW, selector)
    return outputs


def weigh_losses(
    pipeline: TorchPipeline,
    student: Outputs,
    *,
    teacher: Outputs,
    batch: Batch,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """Return every weighted part of the distillation loss of one batch, over all models.

    Args:
        pipeline: The graph: its joins, and its own losses.
        student: Outputs of the pruned models.
        teacher: Outputs of the dense models, without the positions that the student has cut.
        batch: The inputs of both.
        weights: Weights by name of the loss.

    Returns:
        Scalar losses by `<name>.<node or join>`; their sum is the loss.
    """
    losses: dict[str, Tensor] = {}
    for node_name, outputs in student.items():
        target = teacher[node_name]
        for name in outputs.keys() & {"embedding", "keys"}:
            distance = compute_embedding_loss(outputs[name], target[name])
            losses[f"{name}.{node_name}"] = weights["embedding"] * distance
        if "tokens" in outputs:
            error = compute_token_loss(outputs["tokens"], target["tokens"])
            losses[f"tokens.{node_name}"] = weights["tokens"] * error
        if "scores" in outputs:
            error = compute_token_loss(outputs["scores"], target["scores"])
            losses[f"scores.{node_name}"] = weights["scores"] * error
        if "logits" in outputs:
            keep = pipeline.find_target_positions(batch, node_name)
            divergence = compute_logit_loss(outputs["logits"], target["logits"], keep=keep)
            losses[f"logits.{node_name}"] = weights["logits"] * divergence
    for join in pipeline.joins:
        divergence = compute_affinity_loss(join.select_pair(student), join.select_pair(teacher))
        losses[f"affinity.{join.name}"] = weights["affinity"] * divergence
    for name, loss in pipeline.compute_losses(student, batch).items():
        loss_name, _, _ = name.partition(".")
        losses[name] = weights[loss_name] * loss
    return losses
