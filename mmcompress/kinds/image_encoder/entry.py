"""A picture to an embedding and the vectors of its patches."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind

ENTRY = NodeKind(
    deployed="mmcompress.kinds.image_encoder.deployed:ImageEncoder",
    trainable="mmcompress.kinds.image_encoder.trainable:TrainableImageEncoder",
    fidelity="mmcompress.export.encoder_fidelity:compare_encoder",
    inputs={"image": InputPort(types=("image",))},
    outputs={"embedding": "embedding", "tokens": "tokens"},
    stream_modality="image",
    perceives=True,
)
