"""Adds the best tokens of each row to the outputs of a decode step, beside all scores."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmcompress.runtime.token_scores import ALL_SCORES, BEST_SCORES, BEST_TOKENS

COUNT_NAME = "best_count"
"""Name of the constant that says how many tokens are listed."""


def add_best_tokens_(model: onnx.ModelProto, best_tokens: int) -> None:
    """Put out the best scores [B, K] of a step graph and their token ids, behind all scores [B, V].

    Args:
        model: The graph, which is changed.
        best_tokens: Tokens K that are listed of each row; of a smaller vocabulary all.
    """
    outputs = {output.name: output for output in model.graph.output}
    batch, vocabulary = outputs[ALL_SCORES].type.tensor_type.shape.dim
    count = min(best_tokens, vocabulary.dim_value or best_tokens)
    model.graph.initializer.append(numpy_helper.from_array(np.array([count], np.int64), COUNT_NAME))
    model.graph.node.append(
        helper.make_node(
            "TopK",
            [ALL_SCORES, COUNT_NAME],
            [BEST_SCORES, BEST_TOKENS],
            name="best_tokens",
            axis=-1,
        )
    )
    shape = [batch.dim_param, count]
    new_outputs = [
        helper.make_tensor_value_info(BEST_SCORES, TensorProto.FLOAT, shape),
        helper.make_tensor_value_info(BEST_TOKENS, TensorProto.INT64, shape),
    ]
    for place, output in enumerate(new_outputs, start=1):
        model.graph.output.insert(place, output)
