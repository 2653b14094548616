"""Precisions a node may be deployed in: what is written, by ONNX Runtime's own quantizers. No
torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmcompress.registry import PRECISIONS

Feeds = Sequence[Mapping[str, np.ndarray]]
"""Inputs of one graph, as they come in deployment."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the weights of matrix products are stored, and what they are multiplied with.

    `levels`: largest magnitude of a symmetric weight, 0 for an asymmetric byte; one scale for each
    output channel, or for every `group` inputs of one. `activations`: rounded to 8 bits over the
    range they have at run time ("dynamic"), over that seen on calibration data ("static"), within a
    product every `group` over its own ("grouped"), or left as they are. `exponent`: bits of it in a
    float of 16 `bits`; with 5 everything is such a float (weights, activations, products), with 8
    the weights are, all else being float. `flags`: CPU instructions one of which it needs to be
    right.
    """

    levels: int
    activations: Literal["dynamic", "static", "grouped", "none"]
    group: int = 0
    bits: int = 8
    exponent: int = 0
    flags: tuple[str, ...] = ()


# Weights of 7 bits: without VNNI the 8-bit products of AVX2 saturate in 16 bits and results are
# silently wrong.
INT8 = Precision(levels=64, activations="dynamic")


INT8_FULL = Precision(
    levels=127,
    activations="dynamic",
    flags=("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"),
)


UINT8 = Precision(levels=0, activations="dynamic")


INT8_STATIC = Precision(levels=64, activations="static")


W8 = Precision(levels=127, activations="grouped", group=32)


W4 = Precision(levels=7, activations="grouped", group=32, bits=4)


FP16 = Precision(levels=0, activations="none", bits=16, exponent=5)


BF16 = Precision(levels=0, activations="none", bits=16, exponent=8)


class _Reader:
    """Calibration data, as ONNX Runtime asks for it."""

    def __init__(self, feeds: Feeds):
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)


def quantize_model(
    precision: str,
    model: Any,
    *,
    target: Path,
    feeds: Feeds = (),
    spared: Sequence[np.ndarray] = (),
) -> tuple[Path, int]:
    """Write an ONNX model (a path or a `ModelProto`) in a precision other than fp32; (the file,
    products spared).

    `feeds`: for a static one; `spared`: weights [o, i] whose products stay in fp32.

    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    p: Precision = PRECISIONS.get(precision)
    logging.getLogger().setLevel(
        logging.ERROR
    )  # it asks for pre-processing that changes nothing here
    given = str(model) if isinstance(model, Path) else model
    left = _products_of(given, spared) if spared else []
    if p.bits == 16:
        return (_half if p.exponent == 5 else _brain)(given, target, left), len(left)
    common: dict[str, Any] = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    common |= {
        "nodes_to_exclude": _excluded(left),
        "reduce_range": p.levels == 64,
        "weight_type": QuantType.QInt8 if p.levels else QuantType.QUInt8,
    }
    if p.activations == "dynamic":
        quantize_dynamic(given, str(target), **common)
    elif p.activations == "static":
        CalibrationDataReader.register(_Reader)
        types = {"activation_type": QuantType.QUInt8, "quant_format": QuantFormat.QDQ}
        # a product of two activations (attention) stays in fp32, as in the dynamic form
        extra = {"MatMulConstBOnly": True, "WeightSymmetric": True, "ActivationSymmetric": False}
        extra["OpTypesToExcludeOutputQuantization"] = common[
            "op_types_to_quantize"
        ]  # sums are float already
        quantize_static(given, str(target), _Reader(feeds), **common, **types, extra_options=extra)
    else:
        _weights_only(given, target, p=p, left=left)
    return target, len(left)


def _products_of(model: Any, weights: Sequence[np.ndarray]) -> list[str]:
    """Names of the matrix products with one of the given weights, known by its very numbers."""
    import onnx
    from onnx import numpy_helper

    loaded = onnx.load(model) if isinstance(model, str) else model
    wanted = {(w.shape, w.tobytes()) for w in weights} | {
        (w.T.shape, w.T.tobytes()) for w in weights
    }
    same = {
        t.name
        for t in loaded.graph.initializer
        if ((a := numpy_helper.to_array(t)).shape, a.tobytes()) in wanted
    }
    return [
        n.name for n in loaded.graph.node if n.op_type in ("MatMul", "Gemm") and same & set(n.input)
    ]


def _excluded(names: Sequence[str]) -> list[str]:
    """Those, and as the dynamic quantizer calls a Gemm once it has become a MatMul."""
    return [*names, *(f"{name}_MatMul" for name in names)]


def _half(model: Any, target: Path, left: Sequence[str]) -> Path:
    """Everything in 16 bits but inputs and outputs; a CPU without such kernels converts back and
    forth."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    loaded = onnx.load(model) if isinstance(model, str) else model
    onnx.save(
        convert_float_to_float16(loaded, keep_io_types=True, node_block_list=list(left)),
        str(target),
    )
    return target


def _brain(model: Any, target: Path, left: Sequence[str]) -> Path:
    """Matrices as bfloat16, cast to float where they are read, once at load: ONNX Runtime has no
    bfloat16 products on a CPU (microsoft/onnxruntime#28768)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    loaded = onnx.load(model) if isinstance(model, str) else model
    graph, casts = loaded.graph, []
    spared = {i for n in graph.node if n.name in left for i in n.input}
    for t in list(graph.initializer):
        if t.data_type != TensorProto.FLOAT or len(t.dims) < 2 or t.name in spared:
            continue
        bits = numpy_helper.to_array(t).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even, as torch rounds
        name = f"{t.name}_bf16"
        stored = helper.make_tensor(
            name, TensorProto.BFLOAT16, t.dims, nearest.astype(np.uint16).tobytes(), raw=True
        )
        casts.append(
            helper.make_node("Cast", [name], [t.name], f"{name}_cast", to=TensorProto.FLOAT)
        )
        graph.initializer.remove(t)
        graph.initializer.append(stored)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *rest])
    onnx.save(loaded, str(target))
    return target


def _weights_only(model: Any, target: Path, *, p: Precision, left: Sequence[str]) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    loaded = onnx.load(model) if isinstance(model, str) else model
    quantizer = MatMulNBitsQuantizer(
        loaded,
        bits=p.bits,
        block_size=p.group,
        is_symmetric=True,
        accuracy_level=4,
        nodes_to_exclude=list(left),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


FP32 = None
"""fp32: nothing is rounded."""
