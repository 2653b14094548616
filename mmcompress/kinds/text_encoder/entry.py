"""Texts to embeddings."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind

ENTRY = NodeKind(
    deployed="mmcompress.kinds.text_encoder.deployed:TextEncoder",
    trainable="mmcompress.kinds.text_encoder.trainable:TrainableTextEncoder",
    fidelity="mmcompress.export.encoder_fidelity:compare_encoder",
    inputs={"text": InputPort(types=("text", "texts"))},
    outputs={"embedding": "embedding"},
    stream_modality="text",
    options=("source", "rewind", "max_tokens"),
)
