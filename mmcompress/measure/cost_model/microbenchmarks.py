"""The little ONNX graphs behind the device table: a stack of equal blocks at one shape, built directly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17


@dataclass(frozen=True)
class BlockShape:
    """One shape of one block kind: `units` heads of `head` features or FFN channels, at a residual width."""

    kind: str
    width: int
    units: int
    head: int
    positions: int
    keys: int
    batch: int


class _Builder:
    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.count = 0

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        self.count += 1
        names = [f"v{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def const(self, array: np.ndarray) -> str:
        self.count += 1
        self.weights.append(numpy_helper.from_array(array, f"c{self.count}"))
        return self.weights[-1].name

    def linear(self, x: str, rows: int, columns: int) -> str:
        w = self.const((self.rng.standard_normal((rows, columns)) * rows**-0.5).astype(np.float32))
        [y] = self.op("MatMul", x, w)
        return self.op("Add", self.const(np.zeros(columns, np.float32)), y)[0]

    def norm(self, x: str, width: int) -> str:
        ones, zeros = (
            self.const(np.ones(width, np.float32)),
            self.const(np.zeros(width, np.float32)),
        )
        return self.op("LayerNormalization", x, ones, zeros, axis=-1, epsilon=1e-5)[0]

    def input(self, name: str, shape: tuple[int, ...]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, name: str, rank: int) -> None:
        shape = [f"{name}_{i}" for i in range(rank)]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def split_heads(self, x: str, cell: BlockShape, perm: tuple[int, ...]) -> str:
        shape = self.const(np.array([cell.batch, -1, cell.units, cell.head], np.int64))
        [r] = self.op("Reshape", x, shape)
        return self.op("Transpose", r, perm=perm)[0]

    def attention(self, q: str, k_transposed: str, v: str, cell: BlockShape) -> str:
        [q] = self.op("Mul", q, self.const(np.array(cell.head**-0.5, np.float32)))
        [s] = self.op("MatMul", q, k_transposed)
        [p] = self.op("Softmax", s, axis=-1)
        [o] = self.op("MatMul", p, v)
        [t] = self.op("Transpose", o, perm=(0, 2, 1, 3))
        inner = cell.units * cell.head
        [flat] = self.op("Reshape", t, self.const(np.array([cell.batch, -1, inner], np.int64)))
        return self.linear(flat, inner, cell.width)


def _attention(b: _Builder, x: str, cell: BlockShape, i: int) -> str:
    inner, h = cell.units * cell.head, b.norm(x, cell.width)
    cached = cell.positions < cell.keys
    if cached:
        q, k, v = (b.linear(h, cell.width, inner) for _ in range(3))
    else:
        fused = b.linear(h, cell.width, 3 * inner)
        sizes = b.const(np.array([inner] * 3, np.int64))
        q, k, v = b.op("Split", fused, sizes, outputs=3, axis=-1)
    q = b.split_heads(q, cell, (0, 2, 1, 3))
    v = b.split_heads(v, cell, (0, 2, 1, 3))
    if not cached:
        return b.attention(q, b.split_heads(k, cell, (0, 2, 3, 1)), v, cell)
    k = b.split_heads(k, cell, (0, 2, 1, 3))
    past = (cell.batch, cell.units, cell.keys - cell.positions, cell.head)
    [k] = b.op("Concat", b.input(f"past_k{i}", past), k, axis=2)
    [v] = b.op("Concat", b.input(f"past_v{i}", past), v, axis=2)
    b.output(k, 4)
    b.output(v, 4)
    [kt] = b.op("Transpose", k, perm=(0, 1, 3, 2))
    return b.attention(q, kt, v, cell)


def _cross_attention(b: _Builder, x: str, cell: BlockShape, i: int) -> str:
    q = b.split_heads(
        b.linear(b.norm(x, cell.width), cell.width, cell.units * cell.head), cell, (0, 2, 1, 3)
    )
    shape = (1, cell.units, cell.keys, cell.head)
    [kt] = b.op("Transpose", b.input(f"cross_k{i}", shape), perm=(0, 1, 3, 2))
    return b.attention(q, kt, b.input(f"cross_v{i}", shape), cell)


def _ffn(b: _Builder, x: str, cell: BlockShape, i: int) -> str:
    h = b.linear(b.norm(x, cell.width), cell.width, cell.units)
    [e] = b.op("Erf", b.op("Div", h, b.const(np.array(2**0.5, np.float32)))[0])
    [g] = b.op("Mul", h, b.op("Add", e, b.const(np.array(1, np.float32)))[0])
    [g] = b.op("Mul", g, b.const(np.array(0.5, np.float32)))
    return b.linear(g, cell.units, cell.width)


def _gated_ffn(b: _Builder, x: str, cell: BlockShape, i: int) -> str:
    h = b.norm(x, cell.width)
    gate, up = b.linear(h, cell.width, cell.units), b.linear(h, cell.width, cell.units)
    [g] = b.op("Mul", gate, b.op("Sigmoid", gate)[0])
    return b.linear(b.op("Mul", g, up)[0], cell.units, cell.width)


def _conv(b: _Builder, x: str, cell: BlockShape, i: int) -> str:
    """width -> units -> head channels over a square of `positions` places; nothing is added up, as shapes differ.

    `keys` holds, as four digits, the kernel of each, the stride and the kernel of a depthwise one between them (or 0).
    """
    first, second, stride, depthwise = (cell.keys // 10**k % 10 for k in (3, 2, 1, 0))
    side = round(cell.positions**0.5)
    [y] = b.op("Reshape", x, b.const(np.array([cell.batch, cell.width, side, side], np.int64)))

    def conv(y: str, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> str:
        shape = (outputs, inputs // groups, kernel, kernel)
        w = b.const(
            (b.rng.standard_normal(shape) * (inputs / groups * kernel**2) ** -0.5).astype(
                np.float32
            )
        )
        bias, pad = b.const(np.zeros(outputs, np.float32)), kernel // 2
        return b.op("Conv", y, w, bias, group=groups, strides=[stride] * 2, pads=[pad] * 4)[0]

    [y] = b.op("Relu", conv(y, cell.width, cell.units, first, 1 if depthwise else stride))
    if depthwise:
        [y] = b.op("Relu", conv(y, cell.units, cell.units, depthwise, stride, cell.units))
    b.output(conv(y, cell.units, cell.head, second, 1), 4)
    return ""


def _context(b: _Builder, x: str, cell: BlockShape, i: int) -> str:
    """K and V of one cross-attention, computed once a request; the residual stream passes unchanged."""
    for _ in "kv":
        y = b.split_heads(b.linear(x, cell.width, cell.units * cell.head), cell, (0, 2, 1, 3))
        b.output(y, 4)
    return ""


KINDS = {
    "attention": _attention,
    "cross_attention": _cross_attention,
    "ffn": _ffn,
    "gated_ffn": _gated_ffn,
    "conv": _conv,
    "context": _context,
}


def build_stack(cell: BlockShape, copies: int) -> onnx.ModelProto:
    """`copies` blocks of one shape in a row; none of them: the bare cost of a call."""
    b = _Builder()
    x = b.input("x", (cell.batch, cell.positions, cell.width))
    start = x
    for i in range(copies):
        y = KINDS[cell.kind](b, x, cell, i)
        if y:
            [x] = b.op("Add", x, y)
    if x == start:
        [x] = b.op("Identity", x)
    b.output(x, 3)
    graph = helper.make_graph(b.nodes, "stack", b.inputs, b.outputs, b.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def make_random_feed(cell: BlockShape, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Random inputs of a stack."""
    rng = np.random.default_rng(1)
    return {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for i in model.graph.input
    }
