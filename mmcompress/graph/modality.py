"""Which layers are cross-modal, and why: modality tags passed along the graph and through each model's blocks.

A layer is cross-modal when values of two modalities meet in it (cross-attention), or when it carries one modality
into a space that is compared with another (the projection behind an embedding that a `nearest` node joins).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmcompress.graph.blocks import Block
from mmcompress.graph.ports import NODE_KINDS
from mmcompress.graph.references import split_reference, topological_order
from mmcompress.spec.schema import Spec


@dataclass(frozen=True, kw_only=True)
class LayerModality:
    """One layer of one node: the modalities that meet in it, whether that makes it cross-modal, and the reason."""

    node: str
    name: str
    modalities: tuple[str, ...]
    cross_modal: bool
    reason: str


def propagate_modalities(spec: Spec) -> dict[str, frozenset[str]]:
    """The modality tags of every node's outputs (one set a node) and of the pipeline inputs."""
    tags: dict[str, frozenset[str]] = {name: frozenset({str(m)}) for name, m in spec.inputs.items()}
    for name in topological_order(spec):
        node = spec.nodes[name]
        own = frozenset({NODE_KINDS[node.kind].modality} - {""})
        tags[name] = own.union(*(tags[split_reference(r)[0]] for r in node.inputs.values()))
    return tags


def classify_layers(spec: Spec, blocks: Mapping[str, Sequence[Block]]) -> tuple[LayerModality, ...]:
    """Every prunable block and every joined projection of the pipeline, in order, with the verdict on each."""
    tags, found = propagate_modalities(spec), []
    for name in topological_order(spec):
        node, kind = spec.nodes[name], NODE_KINDS[spec.nodes[name].kind]
        if not kind.model:
            continue
        # A text tower reads text whatever wrote it; a generator's own stream starts from the words it writes.
        stream = frozenset({kind.stream or kind.modality})
        for block in blocks.get(name, ()):
            ports = {
                r: tags[split_reference(node.inputs[r])[0]] for r in block.reads if r != "stream"
            }
            reads = {"stream": stream, **ports} if "stream" in block.reads else ports
            met = frozenset().union(*reads.values())
            meets = len(reads) > 1 and len(met) > 1
            if "stream" not in block.reads and not met <= stream:
                meets, reason = (
                    True,
                    f"carries {'+'.join(sorted(met))} into the {'+'.join(sorted(stream))} stream",
                )
            elif meets:
                what = " and ".join(f"{'+'.join(sorted(t))} from '{r}'" for r, t in reads.items())
                reason = f"values meet: {what}"
            else:
                reason = f"only the {'+'.join(sorted(met))} stream passes through it"
            found.append(
                LayerModality(
                    node=name,
                    name=block.name,
                    modalities=tuple(sorted(met)),
                    cross_modal=meets,
                    reason=reason,
                )
            )
            stream = stream | met
        for join, spec_join in spec.nodes.items():
            here = [
                p for p, r in spec_join.inputs.items() if split_reference(r) == (name, "embedding")
            ]
            if spec_join.kind != "nearest" or not here:
                continue
            mine = frozenset({kind.stream})
            others = {
                split_reference(r)[0]
                for p, r in spec_join.inputs.items()
                if r.endswith(".embedding") and p not in here
            }
            against = frozenset(NODE_KINDS[spec.nodes[o].kind].stream for o in others)
            cross = bool(against - mine)
            reason = f"carries {'+'.join(mine)} into the space where '{join}' compares it with {'+'.join(against)}"
            found.append(
                LayerModality(
                    node=name,
                    name="projection",
                    modalities=tuple(sorted(mine | against)),
                    cross_modal=cross,
                    reason=reason,
                )
            )
    return tuple(found)


def find_cross_modal_blocks(
    spec: Spec, blocks: Mapping[str, Sequence[Block]]
) -> dict[str, dict[str, str]]:
    """node -> block name -> reason, for the cross-modal blocks only."""
    found: dict[str, dict[str, str]] = {n: {} for n in blocks}
    for layer in classify_layers(spec, blocks):
        if layer.cross_modal:
            found[layer.node][layer.name] = layer.reason
    return found
