"""The losses that a pipeline learns by: their names, and how much each counts.

Some compare the outputs of the pruned pipeline with those of the dense one, whatever kind of node
gives them. The others are brought by the kinds of node: see `NodeKind.losses`.
"""

from __future__ import annotations

from mmcompress.graph.ports import get_kind
from mmcompress.registry import NODE_KINDS
from mmcompress.spec.schema import Distill, Spec

TEACHER_LOSSES = {
    "embedding": 1.0,
    "tokens": 1.0,
    "scores": 1.0,
    "affinity": 1.0,
    "logits": 4.0,
    "hidden": 0.0,
    "cross": 0.0,
}
"""Losses that compare with the dense pipeline, with the weight of each that a spec does not name.
`mmcompress/distill/losses.py` says what they are."""


def list_task_losses(spec: Spec) -> dict[str, float]:
    """Return the losses that the kinds of node in a pipeline bring, with their default weights."""
    weights: dict[str, float] = {}
    for node in spec.nodes.values():
        weights |= get_kind(node.kind).losses
    return weights


def list_known_losses() -> dict[str, float]:
    """Return every loss that a spec may name, with its default weight."""
    weights = dict(TEACHER_LOSSES)
    for name in NODE_KINDS.list_names():
        weights |= get_kind(name).losses
    return weights


def resolve_loss_weights(distill: Distill) -> dict[str, float]:
    """Return the weight of every known loss: what a spec says, or the default."""
    return {**list_known_losses(), **distill.losses}
