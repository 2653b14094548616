"""The text of a list whose embedding is nearest to a query."""

from __future__ import annotations

from mmcompress.graph.ports import InputPort, NodeKind
from mmcompress.spec.node_options import NodeOption

ENTRY = NodeKind(
    deployed="mmcompress.kinds.lookup.deployed:Lookup",
    trainable="mmcompress.kinds.lookup.trainable:TrainableLookup",
    inputs={"query": InputPort(types=("embedding",))},
    outputs={"best": "text", "score": "number", "place": "number"},
    is_model=False,
    answer_port="best",
    losses={"contrast": 0.2},
    file_keys=("texts", "bank"),
    list_option="texts",
    options={
        "texts": NodeOption(
            about=(
                "File of a `lookup` with one text a line. Without it, the list holds all reference"
                " texts of the data."
            ),
            default="",
            is_file=True,
        )
    },
)
