"""The one place where models run: sessions of ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mmcompress.errors import BundleError
from mmcompress.runtime.providers import CPU_PROVIDER, add_provider

ERRORS_ONLY = 3
"""Severity of messages that ONNX Runtime writes: errors. Its warnings tell of choices that nobody
can change."""


def open_session(
    model: str | Path | bytes,
    threads: int,
    *,
    optimize: bool = True,
    provider: str = CPU_PROVIDER,
) -> onnxruntime.InferenceSession:
    """Open an inference session.

    Threads don't spin. Otherwise several sessions of one pipeline would fight for the cores, and
    the dense baseline would look slower than it is.

    Args:
        model: A file, or its bytes.
        threads: Threads of a call; 0: one for each core.
        optimize: Whether ONNX Runtime may fuse operators.
        provider: What runs it, by the name that a spec uses.

    Returns:
        The session.

    Raises:
        BundleError: ONNX Runtime can't load the model.
        MissingProvider: The provider is not installed, or finds no device here.
    """
    options = onnxruntime.SessionOptions()
    providers = add_provider(options, provider, threads=threads)
    # Operators that another provider leaves to the processor run on as many.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = ERRORS_ONLY
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    is_file = not isinstance(model, bytes)
    try:
        return onnxruntime.InferenceSession(
            str(model) if is_file else model, options, providers=providers
        )
    except Exception as error:  # onnxruntime raises types that it does not export
        name = str(model) if is_file else "the model"
        raise BundleError(f"{name}: onnxruntime can't load it: {error}") from error


class TimedSession:
    """A session that counts its calls and the time spent inside them.

    Args:
        model: A file, or its bytes.
        threads: Threads of a call; 0: one for each core.
        provider: What runs it, by the name that a spec uses.
    """

    def __init__(self, model: str | Path | bytes, threads: int, *, provider: str = CPU_PROVIDER):
        self.inner = open_session(model, threads, provider=provider)
        self.output_shapes = {output.name: output.shape for output in self.inner.get_outputs()}
        """Sizes of the axes by name of the output; an axis of any size has a name or None."""
        self.outputs = list(self.output_shapes)
        """Names of the outputs, in the order of the graph."""
        self.inputs = [graph_input.name for graph_input in self.inner.get_inputs()]
        """Names of the inputs, in the order of the graph."""
        self.seconds = 0.0
        """Seconds inside all calls so far."""
        self.calls = 0
        """Calls so far."""
        self.feeds: list[dict[str, np.ndarray]] | None = None
        """A list that the inputs of every call are added to; None: they are not kept."""

    def __call__(
        self, feed: dict[str, np.ndarray], fetched: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Run the model.

        Args:
            feed: Arrays by the name of the input.
            fetched: Names of the outputs that are wanted; None: all of them.

        Returns:
            Arrays in the order of `fetched`.
        """
        if self.feeds is not None:
            self.feeds.append(feed)
        start = time.perf_counter()
        results: list[np.ndarray] = self.inner.run(fetched or self.outputs, feed)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return results


def split_rows(
    names: Sequence[str], arrays: Sequence[np.ndarray], *, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Give every request its rows of what a model said to all of them.

    Args:
        names: Names of the arrays.
        arrays: Outputs of the model [r, ...], one row after the other.
        counts: How many rows each request has.

    Returns:
        The arrays of every request, by name.
    """
    answers: list[dict[str, Any]] = []
    start = 0
    for count in counts:
        end = start + count
        answers.append({name: array[start:end] for name, array in zip(names, arrays, strict=True)})
        start = end
    return answers
