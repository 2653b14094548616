"""Takes constants on a residual stream into the layer before: what stands for a removed sub-layer then costs nothing.

x + f(x) + c, with c constant, is x + (f(x) + c): the last bias of f takes c in, exactly but for rounding.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import numpy_helper

from mmcompress.export.static_shapes import has_subgraphs


class _ConstantFolder:
    def __init__(self, graph: onnx.GraphProto):
        self.vectors = {
            t.name: t
            for t in graph.initializer
            if len(t.dims) == 1 and t.data_location != t.EXTERNAL
        }
        self.outputs = {o.name for o in graph.output}
        self.readers = Counter(i for n in graph.node for i in n.input)
        self.made = {o: n for n in graph.node for o in n.output}

    def parts(self, node: onnx.NodeProto) -> tuple[str, str] | None:
        """(stream, vector) of the sum of a stream and a constant vector."""
        if node.op_type != "Add":
            return None
        (a, b), v = node.input, self.vectors
        return (b, a) if a in v and b not in v else (a, b) if b in v and a not in v else None

    def bias(self, value: str, like: onnx.TensorProto) -> str | None:
        """A vector that is added to a value which one node alone reads, directly or to a term of it."""
        node = self.made.get(value)
        if node is None or self.readers[value] != 1 or value in self.outputs:
            return None
        found = None
        if node.op_type == "LayerNormalization" and len(node.input) == 3:
            found = node.input[2]
        elif parts := self.parts(node):
            found = parts[1]
        elif node.op_type == "Add":
            return next((b for term in node.input if (b := self.bias(term, like))), None)
        alone = found is not None and found in self.vectors and self.readers[found] == 1
        same = alone and (self.vectors[found].dims, self.vectors[found].data_type) == (
            like.dims,
            like.data_type,
        )
        return found if same else None

    def fold_(self, node: onnx.NodeProto) -> str | None:
        """Add the constant of a sum to a bias before; returns the stream that takes the place of the sum."""
        parts = self.parts(node)
        if parts is None or node.output[0] in self.outputs:
            return None
        stream, vector = parts
        bias = self.bias(stream, self.vectors[vector])
        if bias is None:
            return None
        a, b = (numpy_helper.to_array(self.vectors[v]) for v in (bias, vector))
        self.vectors[bias].CopyFrom(numpy_helper.from_array(a + b, bias))
        self.readers[stream] = self.readers[node.output[0]]
        self.readers[vector] -= 1
        return stream


def fold_constants_(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold, in place, every vector added to a sum, a norm or a linear layer that nobody else reads into its bias.

    A model whose nodes hold graphs of their own, which may read any value, stays as it is.
    """
    if has_subgraphs(model.graph.node):
        return model
    graph, folding = model.graph, _ConstantFolder(model.graph)
    renamed: dict[str, str] = {}
    left: list[onnx.NodeProto] = []
    for n in graph.node:
        for i, name in enumerate(n.input):
            n.input[i] = renamed.get(name, name)
        stream = folding.fold_(n)
        if stream is None:
            left.append(n)
        else:
            renamed[n.output[0]] = stream
    unread = [
        t for t in graph.initializer if t.name in folding.vectors and not folding.readers[t.name]
    ]
    for t in unread:
        graph.initializer.remove(t)
    del graph.node[:]
    graph.node.extend(left)
    return model
