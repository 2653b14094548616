"""Exports models from torch to ONNX, one graph at a time.

It uses torch's tracing exporter, which takes a tenth of the time of the newer one (`dynamo=True`).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from mmcompress.export.best_tokens import add_best_tokens_
from mmcompress.export.fold_constants import fold_constants_
from mmcompress.export.opset import OPSET
from mmcompress.export.static_shapes import fix_static_shapes_
from mmcompress.models.base import ExportGraph, Model


def export_graph(graph: ExportGraph, path: Path) -> Path:
    """Write one ONNX graph, with known shapes and constants folded.

    Args:
        graph: What is traced, on its example of batch 2: an axis of size 1 may be taken for fixed.
        path: The file to write.

    Returns:
        The same path.
    """
    model = trace_graph(graph, path)
    fix_static_shapes_(model)
    fold_constants_(model)
    if graph.best_tokens:
        add_best_tokens_(model, graph.best_tokens)
    onnx.save(model, path)
    return path


def trace_graph(graph: ExportGraph, path: Path) -> onnx.ModelProto:
    """Write one ONNX graph as the tracer gives it, and return it.

    Args:
        graph: What is traced.
        path: The file to write. Weights in files of their own lie beside it; they are not read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The fast path of torch's attention is one operator, which the exporter doesn't know.
    fast_path_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer warns of every Python branch
            torch.onnx.export(
                graph.module.eval(),
                graph.example,
                str(path),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_axes=graph.dynamic_axes,
                opset_version=OPSET,
                dynamo=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path_enabled)
    return onnx.load(path, load_external_data=False)


def export_node(model: Model, folder: Path) -> dict[str, Path]:
    """Write every graph of a node.

    Args:
        model: The model of the node.
        folder: Where the files go, `<graph>.onnx` each.

    Returns:
        The file of each graph, by name.
    """
    files: dict[str, Path] = {}
    for graph_name, graph in model.export_graphs().items():
        files[graph_name] = export_graph(graph, folder / f"{graph_name}.onnx")
    return files


def make_feed(
    graph: ExportGraph, inputs: Sequence[Tensor], *, input_names: Collection[str]
) -> dict[str, np.ndarray]:
    """Return the inputs of a session by name.

    Args:
        graph: The graph that the session runs.
        inputs: One tensor for each of `graph.inputs`, in the same order.
        input_names: The inputs of the written file: the exporter removes those that nothing reads.
    """
    feed: dict[str, np.ndarray] = {}
    for name, tensor in zip(graph.inputs, inputs, strict=True):
        if name in input_names:
            feed[name] = tensor.numpy()
    return feed
