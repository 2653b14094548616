"""Precisions that a node may be deployed in, and how an ONNX model is written in one. No torch.

A precision is one `Precision` record. It names two pieces of code: a writer of ONNX models, in
`schemes/`, and a simulation in torch, in `simulation.py`. A precision of your own is a small file
with such a record, and a row: `PRECISIONS.add("mine", "my_module:MINE", "one line for people")`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from mmcompress.quantize.quiet_logging import quiet_quantizers
from mmcompress.registry import PRECISIONS, resolve_entry

Feeds = Sequence[Mapping[str, np.ndarray]]
"""Inputs of one graph as they come in deployment, call by call: arrays by name."""

PRODUCT_OPERATORS = ("MatMul", "Gemm")
"""The ONNX operators that are quantized: the matrix products of linear layers."""

REDUCED_LEVELS = 64
"""`Precision.levels` of weights in 7 bits. Without VNNI, products of two 8-bit numbers overflow the
16 bits that AVX2 adds pairs of them in: results are wrong, and nothing says so."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the weights of a node are stored, and what its matrix products are computed in."""

    writer: str
    """`module:function` of the `OnnxWriter` that writes a model in this precision."""
    simulation: str | None
    """`module:attribute` of a `mmcompress.quantize.simulation.Simulation`: the same rounding in
    torch, which trials are evaluated with. None: nothing is rounded."""
    needs_calibration: bool = False
    """Whether the writer takes ranges of activations from inputs of the model."""
    cpu_flags: tuple[str, ...] = ()
    """CPU instructions, one of which must be there for results to be right. Empty: any CPU does."""
    bits: int = 8
    """Bits of a stored weight."""
    levels: int = 0
    """Largest magnitude of a weight as a signed integer. 0: weights are asymmetric unsigned bytes,
    or floats of 16 or 32 bits."""
    group_size: int = 0
    """Inputs of a layer that share one scale. 0: each output channel has a scale."""


class OnnxWriter(Protocol):
    """The protocol of a scheme: a function that writes an ONNX model in a precision."""

    def __call__(
        self,
        model: Path | ModelProto,
        target: Path,
        *,
        precision: Precision,
        fp32_products: Sequence[str],
        feeds: Feeds,
    ) -> None:
        """Write a model.

        Args:
            model: An fp32 model: a file, or the model itself, which must not be changed.
            target: The file to write.
            precision: The precision that named this writer, for its parameters.
            fp32_products: Names of the matrix products that stay in fp32.
            feeds: Inputs of the model; empty unless the precision needs calibration.
        """


class QuantizedModel(NamedTuple):
    """What `quantize_model` wrote."""

    file: Path
    """The file."""
    fp32_count: int
    """Matrix products that stayed in fp32 because they were asked to."""


def quantize_model(
    precision: str,
    model: Path | ModelProto,
    *,
    target: Path,
    feeds: Feeds = (),
    fp32_weights: Sequence[np.ndarray] = (),
    max_products: int | None = None,
) -> QuantizedModel:
    """Write an ONNX model in a precision, with ONNX Runtime's quantizers.

    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

    Args:
        precision: The name of a precision.
        model: An fp32 model: a file, or the model itself, which is not changed.
        target: The file to write.
        feeds: Inputs of the model, for a precision that needs calibration.
        fp32_weights: Weights [o, i] of linear layers that stay in fp32.
        max_products: Only so many matrix products, the smallest, are rounded; None: all. A few are
            enough to see that a precision runs, in a fraction of the time.
    """
    scheme: Precision = PRECISIONS.get(precision)
    write: OnnxWriter = resolve_entry(scheme.writer)
    fp32_products = _find_products(model, fp32_weights) if fp32_weights else []
    if max_products is not None:
        fp32_products += list_large_products(model, kept=max_products)
    with quiet_quantizers():
        write(model, target, precision=scheme, fp32_products=fp32_products, feeds=feeds)
    return QuantizedModel(file=target, fp32_count=len(fp32_products))


def load_model(model: Path | ModelProto) -> ModelProto:
    """Return a model to work on: read from a file, or a copy."""
    if isinstance(model, Path):
        return onnx.load(str(model))
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def list_excluded_nodes(fp32_products: Sequence[str]) -> list[str]:
    """Return the names by which ONNX Runtime's quantizers of integers know some products.

    The dynamic quantizer renames a Gemm when it makes a MatMul of it.
    """
    renamed = [f"{name}_MatMul" for name in fp32_products]
    return [*fp32_products, *renamed]


def list_large_products(model: Path | ModelProto, *, kept: int) -> list[str]:
    """Return the names of all matrix products with weights but the smallest ones.

    Args:
        model: An fp32 model.
        kept: How many of the smallest ones are left out.
    """
    loaded_model = load_model(model)
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in loaded_model.graph.initializer}
    products: list[tuple[int, str]] = []
    for node in loaded_model.graph.node:
        weights = [sizes[name] for name in node.input if name in sizes]
        if node.op_type in PRODUCT_OPERATORS and weights:
            products.append((max(weights), node.name))
    return [name for _, name in sorted(products)[kept:]]


def _find_products(model: Path | ModelProto, weights: Sequence[np.ndarray]) -> list[str]:
    """Return the names of the matrix products with one of the given weights.

    A weight is known by its very numbers, as it is or transposed: names change on export.
    """
    loaded_model = load_model(model)
    wanted: set[tuple[tuple[int, ...], bytes]] = set()
    for weight in weights:
        wanted.add((weight.shape, weight.tobytes()))
        wanted.add((weight.T.shape, weight.T.tobytes()))
    initializer_names: set[str] = set()
    for tensor in loaded_model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if (array.shape, array.tobytes()) in wanted:
            initializer_names.add(tensor.name)
    product_names: list[str] = []
    for node in loaded_model.graph.node:
        if node.op_type in PRODUCT_OPERATORS and not initializer_names.isdisjoint(node.input):
            product_names.append(node.name)
    return product_names
