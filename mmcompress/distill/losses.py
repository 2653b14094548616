"""Distillation losses, each by the name of its weight in the spec's `distill` section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.kinds.base import SIMILARITY_SCALE, Batch, Models, Outputs
from mmcompress.pipeline.forward import TorchPipeline


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of unit embeddings [b, d] (feature distillation, CLIP-KD, Yang et al. 2024)."""
    return (student - teacher).square().sum(-1).mean()


def token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of token states [b, n, w] relative to their variance over the batch."""
    return F.mse_loss(student, teacher) / teacher.var().clamp(min=1e-6)


def affinity_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """KL of the similarity rows and columns of two joined embeddings (TinyCLIP, Wu et al. 2023)."""
    s, t = (SIMILARITY_SCALE * q @ k.T for q, k in (student, teacher))
    rows = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="batchmean")
    columns = (
        F.kl_div(s.log_softmax(0), t.log_softmax(0), log_target=True, reduction="sum") / s.shape[1]
    )
    return (rows + columns) / 2


def logit_loss(student: Tensor, teacher: Tensor, *, keep: Tensor) -> Tensor:
    """KL of next-token distributions [b, t, v] at the positions `keep` [b, t] (Hinton et al. 2015)."""
    return F.kl_div(
        student[keep].log_softmax(-1),
        teacher[keep].log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


@contextmanager
def record_block_outputs(models: Models, blocks: Models) -> Iterator[dict[str, dict[str, Tensor]]]:
    """What the blocks of `blocks` add to their streams while `models` run: node -> block -> [b, t, w]."""
    found: dict[str, dict[str, Tensor]] = {n: {} for n in models}
    with ExitStack() as stack:
        for n, small in blocks.items():
            for b in small.weighted_blocks:

                def keep(
                    m: object, args: tuple, out: Tensor, n: str = n, name: str = b.name
                ) -> None:
                    found[n][name] = out.float()

                handle = models[n].get_submodule(b.reader).register_forward_hook(keep)
                stack.callback(handle.remove)
        yield found


def block_output_losses(
    student: Models,
    added: Mapping[str, Mapping[str, Tensor]],
    *,
    teacher: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """`hidden.node` and `cross.node`: mean over blocks of the squared error relative to the teacher's variance."""
    parts: dict[str, list[Tensor]] = {}
    for n, m in student.items():
        at = m.token_selector
        for b in m.weighted_blocks:
            have, want = added[n].get(b.name), teacher[n].get(b.name)
            if have is None or want is None:
                continue
            if (
                at is not None
                and have.ndim == 3
                and have.shape != want.shape
                and want.shape[1] >= at.count
            ):
                want = at.select_positions(want, at.index)
            if have.shape == want.shape:
                kind = "cross" if b.kind == "cross_attention" else "hidden"
                parts.setdefault(f"{kind}.{n}", []).append(token_loss(have, want))
    return {name: torch.stack(values).mean() for name, values in parts.items()}


def drop_cut_positions(teacher: Outputs, student: Models) -> Outputs:
    """The teacher's outputs without the positions the student has left out."""
    found = {n: dict(o) for n, o in teacher.items()}
    for node, model in student.items():
        at = model.token_selector
        if (
            at is not None
            and at.kept_count < at.count
            and found[node]["tokens"].shape[1] >= at.count
        ):
            found[node]["tokens"] = at.select_positions(found[node]["tokens"], at.index)
    return found


def weighted_losses(
    pipeline: TorchPipeline,
    student: Outputs,
    *,
    teacher: Outputs,
    batch: Batch,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """Every weighted part of the distillation loss of one batch, over all models of the pipeline."""
    parts: dict[str, Tensor] = {}
    for node, out in student.items():
        for name in out.keys() & {"embedding", "keys"}:
            parts[f"{name}.{node}"] = weights["embedding"] * embedding_loss(
                out[name], teacher[node][name]
            )
        if "tokens" in out:
            parts[f"tokens.{node}"] = weights["tokens"] * token_loss(
                out["tokens"], teacher[node]["tokens"]
            )
        if "logits" in out:
            parts[f"logits.{node}"] = weights["logits"] * logit_loss(
                out["logits"], teacher[node]["logits"], keep=pipeline.target_positions(batch, node)
            )
    for join in pipeline.joins:
        parts[f"affinity.{join.name}"] = weights["affinity"] * affinity_loss(
            join.pair(student), join.pair(teacher)
        )
    for name, loss in pipeline.losses(student, batch).items():
        parts[name] = weights["contrast" if name.startswith("contrast") else "caption"] * loss
    return parts
