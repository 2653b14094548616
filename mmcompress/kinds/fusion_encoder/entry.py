"""A text, and the tokens of a picture that it attends to, to one vector and a score."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind
from mmcompress.kinds.shared_options import MAX_TOKENS

ENTRY = NodeKind(
    deployed="mmcompress.kinds.fusion_encoder.deployed:FusionEncoder",
    trainable="mmcompress.kinds.fusion_encoder.trainable:TrainableFusionEncoder",
    file_keys=("tokenizer",),
    fidelity="mmcompress.export.matcher_fidelity:compare_matcher",
    inputs={
        "text": InputPort(types=("text", "texts")),
        "context": InputPort(types=("tokens",)),
    },
    outputs={"embedding": "embedding", "tokens": "tokens", "scores": "scores"},
    stream_modality="text",
    fuses=True,
    losses={"match": 1.0},
    options={"max_tokens": MAX_TOKENS},
)
