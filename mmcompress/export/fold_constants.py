"""Folds constants that are added to a residual stream into the bias of the layer before.

A removed sub-layer leaves a constant vector behind. Once folded, it costs nothing at run time:
x + f(x) + c, with a constant c, is x + (f(x) + c). The last bias of f takes c in, exactly but for
rounding.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx
from onnx import numpy_helper

from mmcompress.export.static_shapes import has_subgraphs


@dataclass(frozen=True, kw_only=True)
class _SumParts:
    """The two inputs of an Add node."""

    stream: str
    """Name of the value that is computed at run time."""
    vector: str
    """Name of the constant vector that is added to it."""


class _ConstantFolder:
    """Finds and folds constant vectors in one graph."""

    def __init__(self, graph: onnx.GraphProto):
        self.vectors: dict[str, onnx.TensorProto] = {}
        """Constant vectors of the graph: biases, and what is left of removed sub-layers."""
        for tensor in graph.initializer:
            if len(tensor.dims) == 1 and tensor.data_location != tensor.EXTERNAL:
                self.vectors[tensor.name] = tensor
        self.graph_outputs = {output.name for output in graph.output}
        self.reader_counts: Counter[str] = Counter()
        """How many inputs of nodes read each value."""
        self.nodes_by_output: dict[str, onnx.NodeProto] = {}
        """The node that computes each value."""
        for node in graph.node:
            self.reader_counts.update(node.input)
            for output_name in node.output:
                self.nodes_by_output[output_name] = node

    def split_sum(self, node: onnx.NodeProto) -> _SumParts | None:
        """Return the parts of a sum of a stream and a constant vector, None for any other node."""
        if node.op_type != "Add":
            return None
        first, second = node.input
        first_is_vector = first in self.vectors
        second_is_vector = second in self.vectors
        if first_is_vector == second_is_vector:
            return None
        if first_is_vector:
            return _SumParts(stream=second, vector=first)
        return _SumParts(stream=first, vector=second)

    def find_bias(self, value: str, reference: onnx.TensorProto) -> str | None:
        """Find a bias that is added to a value, directly or to one of the terms of its sum.

        Args:
            value: Name of the value. Only one node may read it: a folded constant changes it.
            reference: The constant to be folded; the bias must have its size and type.

        Returns:
            Name of the bias, None when there is no such bias.
        """
        node = self.nodes_by_output.get(value)
        is_read_elsewhere = self.reader_counts[value] != 1 or value in self.graph_outputs
        if node is None or is_read_elsewhere:
            return None
        parts = self.split_sum(node)
        if node.op_type == "LayerNormalization" and len(node.input) == 3:
            return self._accept_bias(node.input[2], reference)
        if parts is not None:
            return self._accept_bias(parts.vector, reference)
        if node.op_type != "Add":
            return None
        # A sum of two streams: the constant may join the bias of either.
        for term in node.input:
            bias = self.find_bias(term, reference)
            if bias is not None:
                return bias
        return None

    def _accept_bias(self, name: str, reference: onnx.TensorProto) -> str | None:
        """Return a bias if one node alone reads it and it has the size and type of `like`."""
        bias = self.vectors.get(name)
        # A vector that others read as well (a tied bias, say) must not change.
        if bias is None or self.reader_counts[name] != 1:
            return None
        if bias.dims != reference.dims or bias.data_type != reference.data_type:
            return None
        return name

    def fold_sum_(self, node: onnx.NodeProto) -> str | None:
        """Add the constant of a sum to a bias before it, in place.

        Returns:
            Name of the stream that takes the place of the sum, None when nothing was folded.
        """
        parts = self.split_sum(node)
        if parts is None or node.output[0] in self.graph_outputs:
            return None
        bias = self.find_bias(parts.stream, self.vectors[parts.vector])
        if bias is None:
            return None
        bias_values = numpy_helper.to_array(self.vectors[bias])
        constant_values = numpy_helper.to_array(self.vectors[parts.vector])
        new_bias = numpy_helper.from_array(bias_values + constant_values, bias)
        self.vectors[bias].CopyFrom(new_bias)
        # Whoever read the sum reads the stream now, and the sum itself no longer does.
        self.reader_counts[parts.stream] = self.reader_counts[node.output[0]]
        self.reader_counts[parts.vector] -= 1
        return parts.stream


def fold_constants_(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold every constant vector that is added behind a bias into that bias, in place.

    The bias is one of a sum, a normalization or a linear layer whose value nothing else reads. A
    model whose nodes hold graphs of their own stays as it is: those graphs may read any value.

    Args:
        model: The model; its graph is changed.

    Returns:
        The same model.
    """
    graph = model.graph
    if has_subgraphs(graph.node):
        return model
    folder = _ConstantFolder(graph)
    new_names: dict[str, str] = {}
    remaining_nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for i, input_name in enumerate(node.input):
            node.input[i] = new_names.get(input_name, input_name)
        stream = folder.fold_sum_(node)
        if stream is None:
            remaining_nodes.append(node)
        else:
            new_names[node.output[0]] = stream
    for tensor in list(graph.initializer):
        if tensor.name in folder.vectors and not folder.reader_counts[tensor.name]:
            graph.initializer.remove(tensor)
    del graph.node[:]
    graph.node.extend(remaining_nodes)
    return model
