"""Finds generators that read another encoder than the one that they were trained with."""

from __future__ import annotations

from collections.abc import Mapping

from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import parse_reference
from mmcompress.models.base import Model
from mmcompress.models.sources import locate_source
from mmcompress.spec.schema import Spec


def describe_foreign_encoders(spec: Spec, models: Mapping[str, Model]) -> list[str]:
    """Describe every node that reads the tokens of another checkpoint than its own.

    Widths may fit by chance. Then everything runs, and the texts mean nothing.

    Args:
        spec: The pipeline.
        models: Its models by node.

    Returns:
        A sentence for each such node whose own checkpoint holds an encoder as well.
    """
    sentences: list[str] = []
    for node_name, node in spec.list_model_nodes().items():
        if not models[node_name].has_own_encoder:
            continue
        for port in get_kind(node.kind).token_ports:
            encoder_name = parse_reference(node.inputs[port]).node
            encoder_source = spec.nodes[encoder_name].source
            if locate_source(encoder_source) == locate_source(node.source):
                continue
            sentences.append(
                f"{node_name} reads the tokens of {encoder_name}, which is of another checkpoint: "
                f"{node.source} was trained with an encoder of its own. Unless {encoder_source} "
                f"was trained with it, what {node_name} gives means nothing: give both the same "
                "source"
            )
    return sentences
