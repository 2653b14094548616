"""Build the small ONNX graphs behind the device table: stacks of equal blocks at one shape.

The table times these graphs in place of whole models. No torch here.

Axes: B batch, T positions, S key positions, W width of the residual stream, U units (heads), H
features of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmcompress.export.opset import OPSET
from mmcompress.graph.blocks import ConvGeometry

IR_VERSION = 9
"""Version of the ONNX file format. Every ONNX Runtime that this project accepts reads it."""

WEIGHT_SEED = 0
"""Weights need not mean anything: latency does not depend on their values."""

FEED_SEED = 1
"""Inputs need not mean anything either. Another seed than that of the weights keeps them apart."""

BTUH_TO_BUTH = (0, 2, 1, 3)
"""Axes: heads move before positions."""

BTUH_TO_BUHT = (0, 2, 3, 1)
"""Axes: heads move before positions, and every head is transposed."""

BUTH_TO_BUHT = (0, 1, 3, 2)
"""Axes: every head is transposed."""


@dataclass(frozen=True, kw_only=True, order=True)
class TableKey:
    """What the latency of a block depends on, besides its units and its precision.

    Keys have an order, so that a table is measured and listed in the same order every time.
    """

    kind: str
    """Name in `BLOCK_BUILDERS`."""
    width: int
    """Features of the residual stream; of a convolution, channels that go in."""
    head: int
    """Features of one unit; of a convolution, channels that come out."""
    positions: int
    """Positions that a call computes; of a convolution, places of the square that goes in."""
    keys: int
    """Positions that attention reads, those of a cache included; 1 for a convolution."""
    batch: int
    """Sequences of a call."""
    conv: ConvGeometry | None = None
    """Kernels and stride of a block of convolutions; None for every other block."""


@dataclass(frozen=True, kw_only=True)
class SizedBlock:
    """A block of the device table at one size."""

    key: TableKey
    """Kind and sizes of the block around its units."""
    units: int
    """Heads of an attention, channels of a feed-forward block or a convolution."""

    @property
    def inner_width(self) -> int:
        """Features of all units together."""
        return self.units * self.key.head


class _GraphBuilder:
    """Collects nodes, weights, inputs and outputs of one ONNX graph. Values are known by their
    names."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(WEIGHT_SEED)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.name_count = 0

    def add_op(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output, and return the name of that."""
        self.name_count += 1
        output = f"v{self.name_count}_0"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def add_split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Split a value along its last axis, and return the names of the parts."""
        sizes_name = self.add_constant(np.array(sizes, np.int64))
        self.name_count += 1
        outputs = [f"v{self.name_count}_{i}" for i in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [value, sizes_name], outputs, axis=-1))
        return outputs

    def add_constant(self, array: np.ndarray) -> str:
        """Add a weight, and return its name."""
        self.name_count += 1
        name = f"c{self.name_count}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add_random_weight(self, shape: tuple[int, ...], *, fan_in: float) -> str:
        """Add a weight whose products keep the scale of what they read, so that no value
        overflows."""
        values = self.random.standard_normal(shape) * fan_in**-0.5
        return self.add_constant(values.astype(np.float32))

    def add_linear(self, value: str, *, rows: int, columns: int) -> str:
        """Add a linear layer with `rows` features in and `columns` out."""
        weight = self.add_random_weight((rows, columns), fan_in=rows)
        product = self.add_op("MatMul", [value, weight])
        bias = self.add_constant(np.zeros(columns, np.float32))
        return self.add_op("Add", [bias, product])

    def add_norm(self, value: str, width: int) -> str:
        """Add a layer norm over the last axis."""
        scale = self.add_constant(np.ones(width, np.float32))
        bias = self.add_constant(np.zeros(width, np.float32))
        return self.add_op("LayerNormalization", [value, scale, bias], axis=-1, epsilon=1e-5)

    def add_input(self, name: str, shape: tuple[int, ...]) -> str:
        """Declare a float input of the graph, and return its name."""
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def add_output(self, name: str, *, rank: int) -> None:
        """Declare a value of so many axes as an output of the graph."""
        shape = [f"{name}_{i}" for i in range(rank)]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def add_head_split(self, value: str, block: SizedBlock, *, axes: tuple[int, ...]) -> str:
        """Cut the features of a value [B, T, U * H] into heads, and order the axes B, T, U, H by
        `axes`."""
        shape = self.add_constant(
            np.array([block.key.batch, -1, block.units, block.key.head], np.int64)
        )
        heads = self.add_op("Reshape", [value, shape])
        return self.add_op("Transpose", [heads], perm=axes)

    def add_attention_product(
        self, queries_BUTH: str, keys_BUHS: str, *, values_BUSH: str, block: SizedBlock
    ) -> str:
        """Add softmax(Q K^T / sqrt(H)) V and the output projection (Vaswani et al. 2017)."""
        scale = self.add_constant(np.array(block.key.head**-0.5, np.float32))
        scaled_values = self.add_op("Mul", [queries_BUTH, scale])
        scores = self.add_op("MatMul", [scaled_values, keys_BUHS])
        shares = self.add_op("Softmax", [scores], axis=-1)
        mixed_values = self.add_op("MatMul", [shares, values_BUSH])
        by_position = self.add_op("Transpose", [mixed_values], perm=BTUH_TO_BUTH)
        shape = self.add_constant(np.array([block.key.batch, -1, block.inner_width], np.int64))
        flat_values = self.add_op("Reshape", [by_position, shape])
        return self.add_linear(flat_values, rows=block.inner_width, columns=block.key.width)


class BlockBuilder(Protocol):
    """Adds one block to a graph.

    Returns:
        The name of what is added to the residual stream; None where the block adds nothing to it.
    """

    def __call__(
        self, builder: _GraphBuilder, stream: str, *, block: SizedBlock, index: int
    ) -> str | None: ...


def _add_self_attention(
    builder: _GraphBuilder, stream: str, *, block: SizedBlock, index: int
) -> str:
    """Add self-attention; with a cache where fewer positions are computed than are read."""
    key = block.key
    normed = builder.add_norm(stream, key.width)
    if key.positions < key.keys:
        return _add_cached_attention(builder, normed, block=block, index=index)
    # exports without a cache have one fused projection
    fused_qkv = builder.add_linear(normed, rows=key.width, columns=3 * block.inner_width)
    queries, keys, values = builder.add_split(fused_qkv, [block.inner_width] * 3)
    queries = builder.add_head_split(queries, block, axes=BTUH_TO_BUTH)
    values = builder.add_head_split(values, block, axes=BTUH_TO_BUTH)
    keys = builder.add_head_split(keys, block, axes=BTUH_TO_BUHT)
    return builder.add_attention_product(queries, keys, values_BUSH=values, block=block)


def _add_cached_attention(
    builder: _GraphBuilder, normed: str, *, block: SizedBlock, index: int
) -> str:
    """Add the self-attention of one decode step: it appends to the keys and values of the steps
    before."""
    key = block.key
    queries = builder.add_linear(normed, rows=key.width, columns=block.inner_width)
    keys = builder.add_linear(normed, rows=key.width, columns=block.inner_width)
    values = builder.add_linear(normed, rows=key.width, columns=block.inner_width)
    queries = builder.add_head_split(queries, block, axes=BTUH_TO_BUTH)
    values = builder.add_head_split(values, block, axes=BTUH_TO_BUTH)
    keys = builder.add_head_split(keys, block, axes=BTUH_TO_BUTH)
    past_shape = (key.batch, block.units, key.keys - key.positions, key.head)
    past_keys = builder.add_input(f"past_k{index}", past_shape)
    keys = builder.add_op("Concat", [past_keys, keys], axis=2)
    past_values = builder.add_input(f"past_v{index}", past_shape)
    values = builder.add_op("Concat", [past_values, values], axis=2)
    builder.add_output(keys, rank=4)
    builder.add_output(values, rank=4)
    keys = builder.add_op("Transpose", [keys], perm=BUTH_TO_BUHT)
    return builder.add_attention_product(queries, keys, values_BUSH=values, block=block)


def _add_cross_attention(
    builder: _GraphBuilder, stream: str, *, block: SizedBlock, index: int
) -> str:
    """Add cross-attention; its keys and values are inputs, since a request computes them once."""
    key = block.key
    normed = builder.add_norm(stream, key.width)
    queries = builder.add_linear(normed, rows=key.width, columns=block.inner_width)
    queries = builder.add_head_split(queries, block, axes=BTUH_TO_BUTH)
    # all beams read one context
    context_shape = (1, block.units, key.keys, key.head)
    keys = builder.add_input(f"cross_k{index}", context_shape)
    keys = builder.add_op("Transpose", [keys], perm=BUTH_TO_BUHT)
    values = builder.add_input(f"cross_v{index}", context_shape)
    return builder.add_attention_product(queries, keys, values_BUSH=values, block=block)


def _add_ffn(builder: _GraphBuilder, stream: str, *, block: SizedBlock, index: int) -> str:
    """Add a feed-forward block with GELU(x) = x (1 + erf(x / sqrt(2))) / 2 (Hendrycks and Gimpel
    2016)."""
    width = block.key.width
    normed = builder.add_norm(stream, width)
    hidden = builder.add_linear(normed, rows=width, columns=block.units)
    root = builder.add_constant(np.array(2**0.5, np.float32))
    scaled_values = builder.add_op("Div", [hidden, root])
    error = builder.add_op("Erf", [scaled_values])
    one_constant = builder.add_constant(np.array(1, np.float32))
    gate = builder.add_op("Add", [error, one_constant])
    gated_values = builder.add_op("Mul", [hidden, gate])
    half_constant = builder.add_constant(np.array(0.5, np.float32))
    activated = builder.add_op("Mul", [gated_values, half_constant])
    return builder.add_linear(activated, rows=block.units, columns=width)


def _add_gated_ffn(builder: _GraphBuilder, stream: str, *, block: SizedBlock, index: int) -> str:
    """Add a feed-forward block with a SiLU gate (SwiGLU, Shazeer 2020)."""
    width = block.key.width
    normed = builder.add_norm(stream, width)
    gate = builder.add_linear(normed, rows=width, columns=block.units)
    raised_values = builder.add_linear(normed, rows=width, columns=block.units)
    sigmoid = builder.add_op("Sigmoid", [gate])
    activated = builder.add_op("Mul", [gate, sigmoid])
    product = builder.add_op("Mul", [activated, raised_values])
    return builder.add_linear(product, rows=block.units, columns=width)


def _add_convolutions(
    builder: _GraphBuilder, stream: str, *, block: SizedBlock, index: int
) -> None:
    """Add convolutions of width -> units -> head channels over a square of places.

    Nothing is added to the stream: what comes out has another shape.
    """
    key = block.key
    geometry = key.conv
    if geometry is None:
        raise ValueError(f"{key}: a block of convolutions needs the field 'conv'")
    side = round(key.positions**0.5)
    image_shape = builder.add_constant(np.array([key.batch, key.width, side, side], np.int64))
    image = builder.add_op("Reshape", [stream, image_shape])
    features = _add_convolution(
        builder,
        image,
        channels=(key.width, block.units),
        kernel=geometry.first_kernel,
        stride=1 if geometry.depthwise_kernel else geometry.stride,
    )
    features = builder.add_op("Relu", [features])
    if geometry.depthwise_kernel:
        features = _add_convolution(
            builder,
            features,
            channels=(block.units, block.units),
            kernel=geometry.depthwise_kernel,
            stride=geometry.stride,
            groups=block.units,
        )
        features = builder.add_op("Relu", [features])
    features = _add_convolution(
        builder, features, channels=(block.units, key.head), kernel=geometry.last_kernel, stride=1
    )
    builder.add_output(features, rank=4)


def _add_convolution(
    builder: _GraphBuilder,
    features: str,
    *,
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    groups: int = 1,
) -> str:
    """Add a convolution from `channels[0]` to `channels[1]` channels, padded by half its kernel."""
    channels_in, channels_out = channels
    shape = (channels_out, channels_in // groups, kernel, kernel)
    weight = builder.add_random_weight(shape, fan_in=channels_in / groups * kernel**2)
    bias = builder.add_constant(np.zeros(channels_out, np.float32))
    return builder.add_op(
        "Conv",
        [features, weight, bias],
        group=groups,
        strides=[stride] * 2,
        pads=[kernel // 2] * 4,
    )


def _add_context(builder: _GraphBuilder, stream: str, *, block: SizedBlock, index: int) -> None:
    """Add the keys and values of one cross-attention, which a request computes once.

    Nothing is added to the stream: the encoder that computed it has ended.
    """
    for _ in ("keys", "values"):
        features = builder.add_linear(stream, rows=block.key.width, columns=block.inner_width)
        builder.add_output(builder.add_head_split(features, block, axes=BTUH_TO_BUTH), rank=4)


BLOCK_BUILDERS: dict[str, BlockBuilder] = {
    "attention": _add_self_attention,
    "cross_attention": _add_cross_attention,
    "ffn": _add_ffn,
    "gated_ffn": _add_gated_ffn,
    "conv": _add_convolutions,
    "context": _add_context,
}
"""Every kind of block that the device table knows."""


def build_stack(block: SizedBlock, copies: int) -> onnx.ModelProto:
    """Build a graph of equal blocks in a row.

    Args:
        block: The block.
        copies: Blocks in the stack. With 0, a run of the graph costs just what any call does.

    Returns:
        A model that reads `x` float32 [batch, positions, width], and the caches of its blocks.
    """
    key = block.key
    builder = _GraphBuilder()
    stream = builder.add_input("x", (key.batch, key.positions, key.width))
    is_untouched = True
    for i in range(copies):
        update = BLOCK_BUILDERS[key.kind](builder, stream, block=block, index=i)
        if update is not None:
            stream = builder.add_op("Add", [stream, update])
            is_untouched = False
    if is_untouched:
        # a graph may not give back its input itself
        stream = builder.add_op("Identity", [stream])
    builder.add_output(stream, rank=3)
    graph = helper.make_graph(
        builder.nodes,
        "stack",
        inputs=builder.inputs,
        outputs=builder.outputs,
        initializer=builder.weights,
    )
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)


def make_random_feed(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Make random float32 inputs for a stack.

    Args:
        model: A graph of `build_stack`.

    Returns:
        Arrays by the name of the input.
    """
    random = np.random.default_rng(FEED_SEED)
    feed: dict[str, np.ndarray] = {}
    for graph_input in model.graph.input:
        shape = [axis.dim_value for axis in graph_input.type.tensor_type.shape.dim]
        feed[graph_input.name] = random.standard_normal(shape).astype(np.float32)
    return feed
