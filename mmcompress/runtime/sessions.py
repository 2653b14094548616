"""The one door to onnxruntime for running models."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from mmcompress.errors import BundleError


def open_session(
    model: str | Path | bytes, threads: int, *, optimize: bool = True
) -> ort.InferenceSession:
    """An inference session on the CPU; `threads` 0: one for each core.

    Threads don't spin: several sessions of one pipeline would otherwise fight for the cores and the dense baseline
    would look slower than it is.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=["CPUExecutionProvider"],
        )
    except Exception as e:  # onnxruntime raises its own unexported types
        name = "the model" if isinstance(model, bytes) else str(model)
        raise BundleError(f"{name}: onnxruntime can't load it: {e}") from e


class TimedSession:
    """A session that adds up the time spent inside it."""

    def __init__(self, model: str | Path | bytes, threads: int):
        self.inner = open_session(model, threads)
        self.outputs = [o.name for o in self.inner.get_outputs()]
        self.inputs = [i.name for i in self.inner.get_inputs()]
        self.seconds, self.calls = 0.0, 0
        self.feeds: list[dict[str, np.ndarray]] | None = None
        """Inputs of every call, where somebody asks for them."""

    def __call__(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        if self.feeds is not None:
            self.feeds.append(feed)
        start = time.perf_counter()
        out = self.inner.run(self.outputs, feed)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return out
