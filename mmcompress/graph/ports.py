"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field

JOIN_KINDS = ("nearest", "lookup")
"""Kinds of node that are no models."""


@dataclass(frozen=True, kw_only=True)
class NodeKind:
    """Ports of a kind of node and their value types. `stream` is the port (or modality) its own layers carry."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    stream: str = ""
    modality: str = ""
    """Of what the node generates itself, beside what it reads."""
    model: bool = True
    optional: dict[str, str] = field(default_factory=dict)
    """Further input ports that may stay open."""


NODE_KINDS = {
    "image_encoder": NodeKind(
        inputs={"image": "image"},
        outputs={"embedding": "vector", "tokens": "sequence"},
        stream="image",
    ),
    "audio_encoder": NodeKind(
        inputs={"audio": "audio"},
        outputs={"embedding": "vector", "tokens": "sequence"},
        stream="audio",
    ),
    "text_encoder": NodeKind(
        inputs={"text": "text"}, outputs={"embedding": "vector"}, stream="text"
    ),
    "text_decoder": NodeKind(
        inputs={"context": "sequence"},
        outputs={"text": "text", "texts": "text", "scores": "scores"},
        modality="text",
    ),
    "nearest": NodeKind(
        inputs={"query": "vector", "keys": "vector", "values": "text"},
        outputs={"best": "text"},
        model=False,
        optional={"scores": "scores"},
    ),
    "lookup": NodeKind(
        inputs={"query": "vector"},
        outputs={"best": "text", "score": "number", "place": "number"},
        model=False,
    ),
}


METRIC_NEEDS = {
    "retrieval": ("nearest",),
    "caption": ("nearest", "text_decoder"),
    "wer": ("text_decoder",),
    "endings": ("text_decoder",),
    "agreement": ("nearest", "lookup", "text_decoder"),
}
"""A metric -> kinds of node of which it needs one."""


GRADIENT_CRITERIA = ("fisher", "taylor", "movement")
"""Criteria that follow the gradient of the pipeline's own loss."""


NODE_OPTIONS = {
    "source": ("image_encoder", "audio_encoder", "text_encoder", "text_decoder"),
    "candidates": ("text_decoder",),
    "max_tokens": ("text_decoder", "text_encoder"),
    "prompt": ("text_decoder",),
    "prior": ("nearest",),
    "texts": ("lookup",),
}
"""An option of a node -> the kinds that have it."""
