"""Compares our passes over traced graphs with those of onnxslim: nodes left, and time of a call.

    pip install onnxslim
    python benchmarks/graph_passes.py pipelines/clip_captioner.yaml

Every graph of the dense pipeline is written three times: as traced, with our passes
(`export/static_shapes.py`, `export/fold_constants.py`), and slimmed. Calls alternate, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxslim
import torch

from mmcompress.export.fold_constants import fold_constants_
from mmcompress.export.onnx import make_feed, trace_graph
from mmcompress.export.static_shapes import fix_static_shapes_
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.base import ExampleRequest, ExportGraph
from mmcompress.models.sources import load_models

CALLS = 120
"""Calls of each graph; the first of them warm it up."""

WARM_UP_CALLS = 20
"""Calls that do not count."""

DECODE_STEPS = 12.0
"""Steps of the request that inputs have the sizes of."""

BEAMS = 5
"""Texts that this request holds at once."""

MAX_DIFFERENCE = 1e-3
"""Largest absolute difference between outputs of the three graphs."""


def open_on_one_thread(file: Path) -> onnxruntime.InferenceSession:
    """Open a session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options)


def write_variants(graph: ExportGraph, folder: Path) -> dict[str, Path]:
    """Write a graph as traced, with our passes, and slimmed."""
    files = {name: folder / f"{name}.onnx" for name in ("traced", "ours", "onnxslim")}
    model = trace_graph(graph, files["traced"])
    fix_static_shapes_(model)
    fold_constants_(model)
    onnx.save(model, files["ours"])
    onnx.save(onnxslim.slim(str(files["traced"])), files["onnxslim"])
    return files


def time_variants(
    files: dict[str, Path], graph: ExportGraph, *, request: ExampleRequest
) -> dict[str, float]:
    """Return the median milliseconds of a call, by variant."""
    sessions = {name: open_on_one_thread(file) for name, file in files.items()}
    milliseconds: dict[str, list[float]] = {name: [] for name in files}
    expected: list[np.ndarray] = []
    for _ in range(CALLS):
        for name, session in sessions.items():
            input_names = {port.name for port in session.get_inputs()}
            feed = make_feed(graph, request.inputs, input_names=input_names)
            start = time.perf_counter()
            outputs = session.run(None, feed)
            milliseconds[name].append(1000 * (time.perf_counter() - start))
            expected = expected or outputs
            for one, other in zip(expected, outputs, strict=True):
                assert np.abs(one - other).max() < MAX_DIFFERENCE, name
    return {name: statistics.median(row[WARM_UP_CALLS:]) for name, row in milliseconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", help="a pipeline")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = load_models(load_spec(options.spec))
    print("| graph | nodes: traced | ours | onnxslim | ours / traced | onnxslim / ours |")
    print("|---|---:|---:|---:|---:|---:|")
    for node_name, model in models.items():
        requests = model.make_example_requests(DECODE_STEPS, BEAMS)
        for graph_name, graph in model.export_graphs().items():
            with tempfile.TemporaryDirectory() as folder:
                files = write_variants(graph, Path(folder))
                counts = [len(onnx.load(file).graph.node) for file in files.values()]
                ms = time_variants(files, graph, request=requests[graph_name])
            columns = [f"{node_name}/{graph_name}", *map(str, counts)]
            columns.append(f"{ms['ours'] / ms['traced']:.3f}")
            columns.append(f"{ms['onnxslim'] / ms['ours']:.3f}")
            print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
