"""What a kind of node says of itself: its ports, their value types, and what it is able to do.

This is plain data without torch. Each kind has a folder in `mmcompress/kinds/`, whose `entry.py`
holds one `NodeKind`; the registry names it. The other rooms ask for abilities (`writes_text`,
`perceives`), never for a kind by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmcompress.registry import NODE_KINDS
from mmcompress.spec.node_options import NodeOption

INNER_TYPES = {
    "texts": "several texts, the best first",
    "scores": "a number for each of several texts",
    "number": "one number",
    "tokens": "the vectors of a sequence [b, n, w]",
    "embedding": "one vector of length 1 [b, d]",
    "regions": "boxes in a picture [b, n, 4]",
}
"""Types of value that only nodes give, with what each is. Those that a pipeline may be given, too,
stand in the registry `INPUT_TYPES`."""


@dataclass(frozen=True, kw_only=True)
class InputPort:
    """An input of a node."""

    types: tuple[str, ...]
    """The types of value that the port accepts: names in `INPUT_TYPES` and `INNER_TYPES`."""
    optional: bool = False
    """Whether the port may stay unconnected."""


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """A kind of node: an image encoder, a text decoder, a lookup."""

    inputs: Mapping[str, InputPort]
    """Input ports by name."""
    outputs: Mapping[str, str]
    """Value type of every output port, by name."""
    deployed: str
    """`module:Class` of the node on ONNX Runtime; it needs no torch."""
    trainable: str
    """`module:Class` of the node in torch: how it is trained, and which losses it brings."""
    is_model: bool = True
    """Whether it has weights. A node without weights joins the outputs of models."""
    stream_modality: str = ""
    """Modality that its layers carry from the first one on: image, audio or text."""
    written_modality: str = ""
    """Modality of what it generates itself, beside what it reads."""
    fuses: bool = False
    """Whether its stream holds several modalities from its first cross-attention on."""
    perceives: bool = False
    """Whether it reads what the pipeline is given: a picture or a sound."""
    loop_graph: str = ""
    """Name of the graph that runs once for each token that it writes; empty when it writes no
    text."""
    compared_ports: tuple[str, ...] = ()
    """Two input ports whose embeddings it compares; empty when it compares none."""
    answer_port: str = ""
    """Output port of the text that metrics judge; empty when it answers no text."""
    ending_output: str = ""
    """What the deployed node gives beside its ports: how each text that it wrote ended."""
    file_keys: tuple[str, ...] = ()
    """Keys of its deployed configuration whose values name files of the bundle."""
    fidelity: str = ""
    """`module:function` that compares its answers to raw inputs with those of its library: a
    `NodeComparison` of `mmcompress.export.fidelity`. A model without one is told as not
    compared."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Losses that it brings to training by name, with the weight of each that a spec does not
    name. Kinds that share a loss give it the same weight."""
    options: Mapping[str, NodeOption] = field(default_factory=dict)
    """Keys of a node in the spec that this kind has, beside those that every node has."""
    count_option: str = ""
    """The option that says how many texts it writes for an input; empty: it gives one value."""
    list_option: str = ""
    """The option that names a file of texts. It compares its query to these, and the node behind
    the query embeds them. Without a file, they are all reference texts of the data. Empty: it
    searches no list."""

    @property
    def embeds_list(self) -> bool:
        """Whether it compares its query to a list of texts."""
        return bool(self.list_option)

    @property
    def writes_text(self) -> bool:
        """Whether it writes text token by token."""
        return bool(self.loop_graph)

    @property
    def token_ports(self) -> tuple[str, ...]:
        """The input ports that read the tokens of another model."""
        return tuple(name for name, port in self.inputs.items() if "tokens" in port.types)

    @property
    def text_ports(self) -> tuple[str, ...]:
        """The input ports that read a text, or several."""
        return tuple(name for name, port in self.inputs.items() if "text" in port.types)

    @property
    def embedding_ports(self) -> tuple[str, ...]:
        """The input ports that read the embedding of a model."""
        return tuple(name for name, port in self.inputs.items() if "embedding" in port.types)

    @property
    def embedding_output(self) -> str:
        """The output port that gives its embedding; empty when none does."""
        return self._find_output("embedding")

    def _find_output(self, value_type: str) -> str:
        """Return the first output port of a type, or an empty name."""
        ports = [port for port, given in self.outputs.items() if given == value_type]
        return ports[0] if ports else ""

    @property
    def joins(self) -> bool:
        """Whether it compares embeddings of models."""
        return bool(self.compared_ports) or self.embeds_list


def get_kind(name: str) -> NodeKind:
    """Return the kind of node that a spec calls `name`.

    Raises:
        KeyError: No kind has that name; the message tells the nearest one.
    """
    kind: NodeKind = NODE_KINDS.get(name)
    return kind
