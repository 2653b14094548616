"""A sound to an embedding and the vectors of its frames."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind

ENTRY = NodeKind(
    deployed="mmcompress.kinds.audio_encoder.deployed:AudioEncoder",
    trainable="mmcompress.kinds.audio_encoder.trainable:TrainableAudioEncoder",
    fidelity="mmcompress.export.encoder_fidelity:compare_encoder",
    inputs={"audio": InputPort(types=("audio",))},
    outputs={"embedding": "embedding", "tokens": "tokens"},
    stream_modality="audio",
    perceives=True,
)
