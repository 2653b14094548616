"""Texts to embeddings."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind
from mmcompress.kinds.shared_options import MAX_TOKENS

ENTRY = NodeKind(
    deployed="mmcompress.kinds.text_encoder.deployed:TextEncoder",
    trainable="mmcompress.kinds.text_encoder.trainable:TrainableTextEncoder",
    file_keys=("tokenizer",),
    fidelity="mmcompress.export.encoder_fidelity:compare_encoder",
    inputs={"text": InputPort(types=("text", "texts"))},
    outputs={"embedding": "embedding"},
    stream_modality="text",
    options={"max_tokens": MAX_TOKENS},
)
