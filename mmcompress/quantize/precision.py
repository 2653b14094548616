"""Precisions a node may be deployed in: what is written, by ONNX Runtime's own quantizers. No torch."""

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


@dataclass(frozen=True)
class Precision:
    """How the weights of matrix products are stored, and what they are multiplied with.

    `levels`: largest magnitude of a symmetric weight, 0 for an asymmetric byte; one scale for each output channel, or
    for every `group` inputs of one. `activations`: rounded to 8 bits over the range they have at run time ("dynamic"),
    over the range seen on calibration data ("static"), or left as they are. Of 16 `bits` is everything: weights,
    activations and products. `flags`: CPU instructions one of which it needs to be right.
    """

    levels: int
    activations: Literal["dynamic", "static", "none"]
    group: int = 0
    bits: int = 8
    flags: tuple[str, ...] = ()


# Weights of 7 bits: without VNNI the 8-bit products of AVX2 saturate in 16 bits and results are silently wrong.
INT8 = Precision(64, "dynamic")
INT8_FULL = Precision(127, "dynamic", flags=("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"))
UINT8 = Precision(0, "dynamic")
INT8_STATIC = Precision(64, "static")
W8 = Precision(127, "none", group=32)
W4 = Precision(7, "none", group=32, bits=4)
FP16 = Precision(0, "none", bits=16)


class _Reader:
    """Calibration data, as ONNX Runtime asks for it."""

    def __init__(self, feeds: Feeds):
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)


def quantize(
    precision: str, model: Any, target: Path, feeds: Feeds = (), spared: Sequence[np.ndarray] = ()
) -> tuple[Path, int]:
    """Write an ONNX model (a path or a `ModelProto`) in a precision other than fp32; (the file, products spared).

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
    logging.getLogger().setLevel(logging.ERROR)  # it asks for pre-processing that changes nothing here
    given = str(model) if isinstance(model, Path) else model
    left = _products_of(given, spared) if spared else []
    if p.bits == 16:
        return _half(given, target, left), len(left)
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
        quantize_static(given, str(target), _Reader(feeds), **common, **types, extra_options=extra)  # type: ignore[arg-type]
    else:
        _weights_only(given, target, p, left)
    return target, len(left)


def _products_of(model: Any, weights: Sequence[np.ndarray]) -> list[str]:
    """Names of the matrix products with one of the given weights, known by its very numbers."""
    import onnx
    from onnx import numpy_helper

    loaded = onnx.load(model) if isinstance(model, str) else model
    wanted = {(w.shape, w.tobytes()) for w in weights} | {(w.T.shape, w.T.tobytes()) for w in weights}
    same = {t.name for t in loaded.graph.initializer if ((a := numpy_helper.to_array(t)).shape, a.tobytes()) in wanted}
    return [n.name for n in loaded.graph.node if n.op_type in ("MatMul", "Gemm") and same & set(n.input)]


def _excluded(names: Sequence[str]) -> list[str]:
    """Those, and as the dynamic quantizer calls a Gemm once it has become a MatMul."""
    return [*names, *(f"{name}_MatMul" for name in names)]


def _half(model: Any, target: Path, left: Sequence[str]) -> Path:
    """Everything in 16 bits but inputs and outputs; a CPU without such kernels converts back and forth."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    loaded = onnx.load(model) if isinstance(model, str) else model
    onnx.save(convert_float_to_float16(loaded, keep_io_types=True, node_block_list=list(left)), str(target))
    return target


def _weights_only(model: Any, target: Path, p: Precision, left: Sequence[str]) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    loaded = onnx.load(model) if isinstance(model, str) else model
    quantizer = MatMulNBitsQuantizer(
        loaded, bits=p.bits, block_size=p.group, is_symmetric=True, accuracy_level=4, nodes_to_exclude=list(left)
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)
