"""The vectors of a sequence to texts, written token by token."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind

ENTRY = NodeKind(
    deployed="mmcompress.kinds.text_decoder.deployed:TextDecoder",
    trainable="mmcompress.kinds.text_decoder.trainable:TrainableTextDecoder",
    fidelity="mmcompress.export.writer_fidelity:compare_writer",
    inputs={"context": InputPort(types=("tokens",))},
    outputs={"text": "text", "texts": "texts", "scores": "scores"},
    written_modality="text",
    loop_graph="step",
    answer_port="text",
    ending_output="ended",
    losses={"caption": 1.0},
    options=("source", "rewind", "candidates", "max_tokens", "prompt", "language", "task"),
)
