"""The text of a list whose embedding is nearest to a query."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind

ENTRY = NodeKind(
    deployed="mmcompress.kinds.lookup.deployed:Lookup",
    trainable="mmcompress.kinds.lookup.trainable:TrainableLookup",
    inputs={"query": InputPort(types=("embedding",))},
    outputs={"best": "text", "score": "number", "place": "number"},
    is_model=False,
    answer_port="best",
    embeds_list=True,
    losses={"contrast": 0.2},
    options=("texts",),
)
