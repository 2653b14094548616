"""torch -> ONNX, one graph at a time, by the tracing exporter (a tenth of the time of the dynamo one)."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch

from mmcompress.export.fold_constants import fold_constants_
from mmcompress.export.static_shapes import fix_static_shapes_
from mmcompress.models.base import ExportGraph, Model

OPSET = 17


def export_graph(graph: ExportGraph, path: Path) -> Path:
    """Write one ONNX graph. Traced at batch 2, so that no axis of size one is fixed by accident."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fast = torch.backends.mha.get_fastpath_enabled()
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
        torch.backends.mha.set_fastpath_enabled(fast)
    model = onnx.load(path, load_external_data=False)
    fold_constants_(fix_static_shapes_(model))
    onnx.save(model, path)
    return path


def export_node(model: Model, folder: Path) -> dict[str, Path]:
    """Write every graph of a node: name -> file."""
    return {
        name: export_graph(graph, folder / f"{name}.onnx")
        for name, graph in model.export_graphs().items()
    }
