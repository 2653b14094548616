"""Replaces computations of sizes in a traced graph by constants, where the sizes are known.

The tracer records Python's arithmetic with sizes node by node, and each node costs ONNX Runtime a
microsecond or two. That is nothing to a large model, and a fifth of the time of a small, pruned
one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.shape_inference import infer_shapes
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

MAX_SHAPE_TENSOR_BYTES = 1024
"""Bytes of the largest tensor that may be part of a shape. A shape is a few numbers; weights must
not be copied into the shape inference."""

KEEP_SIZE = 0
"""In the target of a Reshape: the axis keeps the size that it has in the input."""

INFER_SIZE = -1
"""In the target of a Reshape: the size follows from those of the other axes. One axis may have it.
"""

Shape = list[int | str]
"""The size of each axis. A text names a size that is not fixed; the empty text is an unknown one.
"""

UNKNOWN_SHAPE: Shape = ["", ""]
"""What stands for a shape that was not inferred: two unknown axes, so that no Reshape can use it.
"""


def fix_static_shapes_(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write known shapes into a graph as constants, in place.

    - A Reshape gets a constant target when at most one axis of its result is unknown. An axis is
      known if it is a number, or has the size of the axis at the same place of the input.
    - A Shape node, or a Gather of sizes from one, becomes a constant when those sizes are numbers.
    - Nodes that nothing reads any more are removed: ONNX Runtime would run them.

    Args:
        model: The model; its graph is changed.

    Returns:
        The same model.
    """
    graph = model.graph
    shapes = _infer_shapes(model)
    known_tensors = _collect_small_tensors(graph)
    measured_shapes: dict[str, Shape] = {}
    for node in graph.node:
        if node.op_type == "Shape" and _has_default_attributes(node):
            measured_shapes[node.output[0]] = shapes.get(node.input[0], [""])
    remaining_nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        _fix_reshape_(node, graph, shapes=shapes, known_tensors=known_tensors)
        sizes = _read_sizes(node, measured_shapes, known_tensors=known_tensors)
        if sizes is None:
            remaining_nodes.append(node)
        else:
            graph.initializer.append(_make_shape_tensor(node.output[0], sizes))
    needed_nodes = _select_needed_nodes(remaining_nodes, graph)
    del graph.node[:]
    graph.node.extend(needed_nodes)
    return model


def has_subgraphs(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Return whether one of the nodes holds a graph of its own, such as a branch or a loop."""
    for node in nodes:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return True
    return False


def _collect_small_tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Return the values of all constants that are small enough to be part of a shape, by name."""
    tensors: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        if not _is_large(tensor):
            tensors[tensor.name] = numpy_helper.to_array(tensor)
    for node in graph.node:
        if node.op_type != "Constant":
            continue
        attribute = node.attribute[0]
        if attribute.name == "value" and not _is_large(attribute.t):
            tensors[node.output[0]] = numpy_helper.to_array(attribute.t)
    return tensors


def _fix_reshape_(
    node: onnx.NodeProto,
    graph: onnx.GraphProto,
    *,
    shapes: Mapping[str, Shape],
    known_tensors: Collection[str],
) -> None:
    """Give a Reshape a constant target, in place, if enough of its shape is known."""
    if node.op_type != "Reshape" or not _has_default_attributes(node):
        return
    input_name, target_name = node.input
    output_name = node.output[0]
    if target_name in known_tensors:
        return
    input_shape = shapes.get(input_name, [])
    output_shape = shapes.get(output_name, UNKNOWN_SHAPE)
    target = _choose_reshape_target(input_shape, output_shape)
    if target.count(INFER_SIZE) <= 1:
        # A name of its own: others may read the target that is computed.
        new_target_name = f"{output_name}_shape"
        node.input[1] = new_target_name
        graph.initializer.append(_make_shape_tensor(new_target_name, target))


def _choose_reshape_target(input_shape: Shape, output_shape: Shape) -> list[int]:
    """Return the target of a Reshape: a number, `KEEP_SIZE` or `INFER_SIZE` for each axis."""
    target: list[int] = []
    for i, size in enumerate(output_shape):
        stays_in_place = i < len(input_shape) and size == input_shape[i]
        if isinstance(size, int) and size:
            target.append(size)
        elif size and stays_in_place:
            target.append(KEEP_SIZE)
        else:
            target.append(INFER_SIZE)
    return target


def _read_sizes(
    node: onnx.NodeProto,
    measured_shapes: Mapping[str, Shape],
    *,
    known_tensors: Mapping[str, np.ndarray],
) -> np.ndarray | None:
    """Return the sizes that a node reads from a shape, None if it does not or they aren't fixed."""
    if node.output[0] in measured_shapes:
        shape = measured_shapes[node.output[0]]
        return _select_sizes(shape, np.arange(len(shape)))
    if node.op_type != "Gather":
        return None
    shape_name, axes_name = node.input
    if shape_name not in measured_shapes or axes_name not in known_tensors:
        return None
    return _select_sizes(measured_shapes[shape_name], known_tensors[axes_name])


def _select_sizes(shape: Shape, axes: np.ndarray) -> np.ndarray | None:
    """Return the sizes of some axes of a shape, None if one of them is not fixed."""
    sizes: list[int] = []
    for axis in axes.flat:
        # A shape that was not inferred has fewer axes than the graph reads.
        exists = -len(shape) <= axis < len(shape)
        size = shape[axis] if exists else ""
        if not isinstance(size, int):
            return None
        sizes.append(size)
    return np.array(sizes, np.int64).reshape(axes.shape)


def _select_needed_nodes(
    nodes: list[onnx.NodeProto], graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """Return the nodes that lead to an output of the graph.

    Where nodes hold graphs of their own, these are all nodes: those graphs may read any value.
    """
    if has_subgraphs(nodes):
        return nodes
    needed_values = {output.name for output in graph.output}
    needed_nodes: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if not needed_values.isdisjoint(node.output):
            needed_values.update(node.input)
            needed_nodes.append(node)
    needed_nodes.reverse()
    return needed_nodes


def _infer_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the inferred shape of every value, by name.

    ONNX Runtime's inference follows sizes through arithmetic, but fails on some graphs. ONNX's own
    works for every graph, but loses sizes in arithmetic. Weights become inputs of the graph that is
    analyzed: an inference would copy them.
    """
    graph = model.graph
    small_tensors: list[onnx.TensorProto] = []
    inputs = list(graph.input)
    for tensor in graph.initializer:
        if _is_large(tensor):
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            inputs.append(info)
        else:
            small_tensors.append(tensor)
    light_graph = helper.make_graph(
        graph.node,
        graph.name,
        inputs=inputs,
        outputs=graph.output,
        initializer=small_tensors,
    )
    light_model = helper.make_model(light_graph, opset_imports=model.opset_import)
    inferred = _infer_symbolic_shapes(light_model)
    if inferred is None:
        inferred = infer_shapes(light_model, data_prop=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    shapes: dict[str, Shape] = {}
    for value in values:
        if value.type.tensor_type.HasField("shape"):
            dimensions = value.type.tensor_type.shape.dim
            shapes[value.name] = [_read_size(dimension) for dimension in dimensions]
    return shapes


def _infer_symbolic_shapes(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return a model with the shapes that ONNX Runtime infers, None if it fails.

    This repeats `SymbolicShapeInference.infer_shapes`, which leaves a file in the working directory
    when it fails. `auto_merge` takes two named sizes for one where an operator needs them equal:
    the tracer names the same size more than once.
    """
    inference = SymbolicShapeInference(
        int_max=2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0
    )
    is_complete = False
    try:
        inference._preprocess(model)
        while inference.run_:
            is_complete = inference._infer_impl()
        inference._update_output_from_vi()
    except Exception:  # its checks raise exceptions of many types, most of them assertions
        return None
    return inference.out_mp_ if is_complete else None


def _read_size(dimension: onnx.TensorShapeProto.Dimension) -> int | str:
    """Return the size of an axis: a number, or the name of a size that is not fixed."""
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value)
    return str(dimension.dim_param)


def _is_large(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor is too large to be part of a shape."""
    if tensor.data_location == tensor.EXTERNAL:
        return True
    return int(np.prod(tensor.dims)) * 8 > MAX_SHAPE_TENSOR_BYTES


def _has_default_attributes(node: onnx.NodeProto) -> bool:
    """Return whether every attribute is 0, as it is when left out."""
    return not any(attribute.i for attribute in node.attribute)


def _make_shape_tensor(name: str, sizes: np.ndarray | list[int]) -> onnx.TensorProto:
    """Return sizes as a constant of a graph."""
    return numpy_helper.from_array(np.asarray(sizes, np.int64), name)
