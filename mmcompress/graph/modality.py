"""Which layers are cross-modal, and why: modality tags pass along the graph and through the blocks
of each model.

A layer is cross-modal when values of two modalities meet in it (cross-attention, fusion). A layer
that carries one modality into a space that is compared with another is cross-modal too. Such a
layer is the projection behind an embedding that a join compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmcompress.graph.blocks import Block
from mmcompress.graph.ports import NodeKind, get_kind
from mmcompress.graph.references import parse_reference, sort_nodes
from mmcompress.spec.schema import Spec

Tags = frozenset[str]
"""The modalities that a value holds: image, audio, text."""


@dataclass(frozen=True, kw_only=True)
class LayerModality:
    """One layer of one node, with the verdict on it."""

    node: str
    """Name of the node."""
    name: str
    """Name of the block, or `projection` for what is behind an embedding."""
    modalities: tuple[str, ...]
    """The modalities that meet in it, sorted."""
    cross_modal: bool
    """Whether the layer is cross-modal."""
    reason: str
    """Why it is, or why not, as a sentence without its subject."""


def propagate_modalities(spec: Spec) -> dict[str, Tags]:
    """Return the modalities in the outputs of every node, and those of the pipeline inputs."""
    tags: dict[str, Tags] = {name: frozenset({kind}) for name, kind in spec.inputs.items()}
    for name in sort_nodes(spec):
        node = spec.nodes[name]
        modalities = set(_find_written_modality(get_kind(node.kind)))
        for reference in node.inputs.values():
            modalities |= tags[parse_reference(reference).node]
        tags[name] = frozenset(modalities)
    return tags


def _find_written_modality(kind: NodeKind) -> Tags:
    """Return the modality of what a kind of node generates itself."""
    return frozenset({kind.written_modality} - {""})


def classify_layers(spec: Spec, blocks: Mapping[str, Sequence[Block]]) -> tuple[LayerModality, ...]:
    """Return every prunable block and every joined projection of the pipeline, in order, with the
    verdict on each."""
    tags = propagate_modalities(spec)
    layers: list[LayerModality] = []
    for name in sort_nodes(spec):
        if not get_kind(spec.nodes[name].kind).is_model:
            continue
        layers += _classify_blocks(spec, name, blocks=blocks.get(name, ()), tags=tags)
        layers += _classify_projections(spec, name)
    return tuple(layers)


def _classify_blocks(
    spec: Spec, name: str, *, blocks: Sequence[Block], tags: Mapping[str, Tags]
) -> list[LayerModality]:
    """Follow the stream through the blocks of one model."""
    node = spec.nodes[name]
    kind = get_kind(node.kind)
    # A text encoder reads text whatever wrote it; a generator's stream starts from the words that
    # it writes.
    stream: Tags = frozenset({kind.stream_modality or kind.written_modality})
    fused_in = ""
    layers: list[LayerModality] = []
    for block in blocks:
        tags_by_port: dict[str, Tags] = {}
        if "stream" in block.reads:
            tags_by_port["stream"] = stream
        for port in block.reads:
            if port != "stream":
                tags_by_port[port] = tags[parse_reference(node.inputs[port]).node]
        read_modalities: Tags = frozenset().union(*tags_by_port.values())
        is_cross_modal = len(tags_by_port) > 1 and len(read_modalities) > 1
        if "stream" not in block.reads and not read_modalities <= stream:
            is_cross_modal = True
            reason = f"carries {_join(read_modalities)} into the {_join(stream)} stream"
        elif is_cross_modal:
            values = [
                f"{_join(modalities)} from '{port}'" for port, modalities in tags_by_port.items()
            ]
            reason = f"values meet: {' and '.join(values)}"
        elif kind.fuses and len(read_modalities) > 1:
            is_cross_modal = True
            reason = f"the stream holds {_join(read_modalities)} since they met in '{fused_in}'"
        else:
            reason = f"only the {_join(read_modalities)} stream passes through it"
        layers.append(
            LayerModality(
                node=name,
                name=block.name,
                modalities=tuple(sorted(read_modalities)),
                cross_modal=is_cross_modal,
                reason=reason,
            )
        )
        if len(stream) == 1 and len(stream | read_modalities) > 1:
            fused_in = block.name
        stream = stream | read_modalities
    return layers


def _classify_projections(spec: Spec, name: str) -> list[LayerModality]:
    """Look at every join that compares the embedding of a model with another's."""
    own_modality = get_kind(spec.nodes[name].kind).stream_modality
    layers: list[LayerModality] = []
    for join_name, join in spec.nodes.items():
        compared_references = {
            port: join.inputs[port] for port in get_kind(join.kind).compared_ports
        }
        if f"{name}.embedding" not in compared_references.values():
            continue
        other_nodes: set[str] = set()
        for reference in compared_references.values():
            if reference != f"{name}.embedding":
                other_nodes.add(parse_reference(reference).node)
        other_modalities = frozenset(
            get_kind(spec.nodes[node].kind).stream_modality for node in other_nodes
        )
        own_modalities = frozenset({own_modality})
        layers.append(
            LayerModality(
                node=name,
                name="projection",
                modalities=tuple(sorted(own_modalities | other_modalities)),
                cross_modal=bool(other_modalities - own_modalities),
                reason=(
                    f"carries {own_modality} into the space where '{join_name}' compares it with "
                    f"{'+'.join(other_modalities)}"
                ),
            )
        )
    return layers


def _join(tags: Tags) -> str:
    """Return modalities as text: `image+text`."""
    return "+".join(sorted(tags))


def find_cross_modal_blocks(
    spec: Spec, blocks: Mapping[str, Sequence[Block]]
) -> dict[str, dict[str, str]]:
    """Return the reason of every cross-modal block, by node and block name."""
    reasons: dict[str, dict[str, str]] = {name: {} for name in blocks}
    for layer in classify_layers(spec, blocks):
        if layer.cross_modal:
            reasons[layer.node][layer.name] = layer.reason
    return reasons
