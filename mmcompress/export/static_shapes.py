"""Takes out of a traced graph what it computes of shapes that are known.

Python's arithmetic with sizes is traced node by node, and each node costs ONNX Runtime a microsecond or two. That is
nothing to a large model, and a fifth of the time of a small, pruned one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.shape_inference import infer_shapes
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

MAX_FOLDED_BYTES = 1024
"""Bytes of a tensor at most that may be part of a shape."""


Shape = list[int | str]
"""Sizes, and the names of those that are not fixed."""


def fix_static_shapes_(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write down what is known of shapes, in place.

    A reshape whose result is known but for one axis gets a constant shape: an axis is known when it is a number, or the
    one at the same place of what is reshaped. A shape, or sizes read from one, that are numbers become constants. Nodes
    that nobody reads from any more are taken out: ONNX Runtime would run them.
    """
    graph, shapes = model.graph, _shapes(model)
    numbers = {t.name: numpy_helper.to_array(t) for t in graph.initializer if not _heavy(t)}
    numbers |= {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if _is_number(n)
    }
    measured = {
        n.output[0]: shapes.get(n.input[0], [""])
        for n in graph.node
        if n.op_type == "Shape" and _plain(n)
    }
    left: list[onnx.NodeProto] = []
    for n in graph.node:
        out, found = n.output[0], None
        if n.op_type == "Reshape" and n.input[1] not in numbers and _plain(n):
            shape = _target(shapes.get(n.input[0], []), shapes.get(out, ["", ""]))
            if shape.count(-1) <= 1:
                n.input[1] = f"{out}_shape"
                graph.initializer.append(_constant(n.input[1], shape))
        elif out in measured:
            found = _numbers(measured[out], np.arange(len(measured[out])))
        elif n.op_type == "Gather" and n.input[0] in measured and n.input[1] in numbers:
            found = _numbers(measured[n.input[0]], numbers[n.input[1]])
        if found is None:
            left.append(n)
        else:
            graph.initializer.append(_constant(out, found))
    kept = _read(left, graph)
    del graph.node[:]
    graph.node.extend(kept)
    return model


def _target(given: Shape, wanted: Shape) -> list[int]:
    """What to reshape to: numbers, 0 for an axis that stays where it is, -1 for one that isn't known."""
    stays = lambda i, d: bool(d) and i < len(given) and d == given[i]
    return [
        d if isinstance(d, int) and d else 0 if stays(i, d) else -1 for i, d in enumerate(wanted)
    ]


def _numbers(shape: Shape, places: np.ndarray) -> np.ndarray | None:
    """The sizes at some places of a shape, if all of them are fixed."""
    sizes = [shape[i] if -len(shape) <= i < len(shape) else "" for i in places.flat]
    return (
        np.array(sizes, np.int64).reshape(places.shape)
        if all(isinstance(s, int) for s in sizes)
        else None
    )


def has_subgraphs(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether a node holds a graph of its own."""
    return any(a.HasField("g") or a.graphs for n in nodes for a in n.attribute)


def _read(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that lead to an output. Where nodes hold graphs of their own, which may read any value: all."""
    if has_subgraphs(nodes):
        return nodes
    read, kept = {o.name for o in graph.output}, []
    for n in reversed(nodes):
        if not read.isdisjoint(n.output):
            read.update(n.input)
            kept.append(n)
    return kept[::-1]


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """The inferred shape of every value; weights stay out of the inference, which would copy them.

    ONNX Runtime's follows sizes through arithmetic, but not every graph; with ONNX's own it is the other way round.
    """
    graph = model.graph
    values = [
        helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in graph.initializer
        if _heavy(t)
    ]
    rest = [t for t in graph.initializer if not _heavy(t)]
    light = helper.make_graph(graph.node, graph.name, [*graph.input, *values], graph.output, rest)
    plain = helper.make_model(light, opset_imports=model.opset_import)
    found = (_symbolic(plain) or infer_shapes(plain, data_prop=True)).graph
    size = lambda d: int(d.dim_value) if d.HasField("dim_value") else str(d.dim_param)
    known = [
        v
        for v in (*found.value_info, *found.input, *found.output)
        if v.type.tensor_type.HasField("shape")
    ]
    return {v.name: [size(d) for d in v.type.tensor_type.shape.dim] for v in known}


def _symbolic(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """`SymbolicShapeInference.infer_shapes`, which leaves a file in the working directory where it fails."""
    inference, whole = SymbolicShapeInference(2**31 - 1, True, False, 0), False
    try:
        inference._preprocess(model)
        while inference.run_:
            whole = inference._infer_impl()
        inference._update_output_from_vi()
    except Exception:  # its checks are assertions of every kind
        return None
    return inference.out_mp_ if whole else None


def _heavy(tensor: onnx.TensorProto) -> bool:
    return (
        tensor.data_location == tensor.EXTERNAL or int(np.prod(tensor.dims)) * 8 > MAX_FOLDED_BYTES
    )


def _is_number(node: onnx.NodeProto) -> bool:
    return (
        node.op_type == "Constant"
        and node.attribute[0].name == "value"
        and not _heavy(node.attribute[0].t)
    )


def _plain(node: onnx.NodeProto) -> bool:
    """Whether every attribute is nought, as it is when left out."""
    return not any(a.i for a in node.attribute)


def _constant(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.int64), name)
