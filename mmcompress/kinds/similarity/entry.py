"""How alike two embeddings are: a picture and a text that the pipeline is given, for a search."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind

ENTRY = NodeKind(
    deployed="mmcompress.kinds.similarity.deployed:Similarity",
    trainable="mmcompress.kinds.nearest.trainable:TrainableNearest",
    inputs={
        "query": InputPort(types=("embedding",)),
        "keys": InputPort(types=("embedding",)),
    },
    outputs={"score": "number"},
    is_model=False,
    compared_ports=("query", "keys"),
    losses={"contrast": 0.2},
)
