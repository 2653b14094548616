"""fp16, bf16: floats of 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from mmcompress.quantize.base import Feeds, Precision, load_model

FP16 = Precision(
    writer="mmcompress.quantize.schemes.sixteen_bit:write_float16",
    simulation="mmcompress.quantize.simulation:FLOAT16",
    bits=16,
)
"""fp16: weights and activations as floats of half precision."""

BF16 = Precision(
    writer="mmcompress.quantize.schemes.sixteen_bit:write_bfloat16",
    simulation="mmcompress.quantize.simulation:BFLOAT16",
    bits=16,
)
"""bf16: weights alone in 16 bits, with the exponent of fp32."""


def write_float16(
    model: Path | ModelProto,
    target: Path,
    *,
    precision: Precision,
    fp32_products: Sequence[str],
    feeds: Feeds,
) -> None:
    """Write a model with everything in float16 but its inputs and outputs.

    A CPU without such kernels converts back and forth.
    """
    # The import sets up logging, which `quantize_model` prevents only while it runs.
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted_model = convert_float_to_float16(
        load_model(model), keep_io_types=True, node_block_list=list(fp32_products)
    )
    onnx.save(converted_model, str(target))


def write_bfloat16(
    model: Path | ModelProto,
    target: Path,
    *,
    precision: Precision,
    fp32_products: Sequence[str],
    feeds: Feeds,
) -> None:
    """Write a model with its matrices in bfloat16, cast to float32 once, when it is loaded.

    ONNX Runtime has no bfloat16 products on a CPU (microsoft/onnxruntime#28768).
    """
    rounded_values = load_model(model)
    graph = rounded_values.graph
    fp32_inputs = _list_inputs(graph, fp32_products)
    casts = []
    for tensor in list(graph.initializer):
        is_matrix = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) >= 2
        if not is_matrix or tensor.name in fp32_inputs:
            continue
        stored = _round_to_bfloat16(tensor)
        cast = helper.make_node(
            "Cast",
            inputs=[stored.name],
            outputs=[tensor.name],
            name=f"{stored.name}_cast",
            to=TensorProto.FLOAT,
        )
        casts.append(cast)
        graph.initializer.remove(tensor)
        graph.initializer.append(stored)
    # Nodes must stand behind those that they read from.
    other_nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *other_nodes])
    onnx.save(rounded_values, str(target))


def _list_inputs(graph: GraphProto, node_names: Sequence[str]) -> set[str]:
    """Return the names of everything that some nodes read."""
    inputs: set[str] = set()
    for node in graph.node:
        if node.name in node_names:
            inputs.update(node.input)
    return inputs


def _round_to_bfloat16(tensor: TensorProto) -> TensorProto:
    """Return a float32 tensor in bfloat16, under a name of its own."""
    bits = numpy_helper.to_array(tensor).view(np.uint32)
    # bfloat16 is the upper half of a float32. Adding just under one half, and one more where the
    # upper half is odd, rounds ties to even, as torch does.
    is_odd = (bits >> 16) & 1
    upper_half = (bits + 0x7FFF + is_odd) >> 16
    return helper.make_tensor(
        f"{tensor.name}_bf16",
        data_type=TensorProto.BFLOAT16,
        dims=tensor.dims,
        vals=upper_half.astype(np.uint16).tobytes(),
        raw=True,
    )
