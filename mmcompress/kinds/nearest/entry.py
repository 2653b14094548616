"""The text whose embedding is nearest to a query, among a few given ones."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind
from mmcompress.spec.node_options import NodeOption

ENTRY = NodeKind(
    deployed="mmcompress.kinds.nearest.deployed:Nearest",
    trainable="mmcompress.kinds.nearest.trainable:TrainableNearest",
    inputs={
        "query": InputPort(types=("embedding",)),
        "keys": InputPort(types=("embedding",)),
        "values": InputPort(types=("text", "texts")),
        "scores": InputPort(types=("scores",), optional=True),
    },
    outputs={"best": "text"},
    is_model=False,
    answer_port="best",
    compared_ports=("query", "keys"),
    losses={"contrast": 0.2},
    options={
        "prior": NodeOption(
            about=(
                "Weight of the generator's own score beside the similarity, in a `nearest` node"
                " with `scores`."
            ),
            default=0.0,
            minimum=0,
            maximum=1000,
        )
    },
)
