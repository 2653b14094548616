"""int8, int8_full, uint8: weights in 8 bits, activations in 8 bits over the range of each call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto

from mmcompress.quantize.base import (
    PRODUCT_OPERATORS,
    REDUCED_LEVELS,
    Feeds,
    Precision,
    list_excluded_nodes,
)
from mmcompress.runtime.machine import INT8_CPU_FLAGS

INT8 = Precision(
    writer="mmcompress.quantize.schemes.dynamic:write_dynamic",
    simulation="mmcompress.quantize.simulation:SIGNED_CHANNELS",
    levels=REDUCED_LEVELS,
)
"""int8: weights of 7 bits for each output channel, right on any CPU."""

INT8_FULL = Precision(
    writer="mmcompress.quantize.schemes.dynamic:write_dynamic",
    simulation="mmcompress.quantize.simulation:SIGNED_CHANNELS",
    levels=127,
    # All 8 bits are right only where pairs of products are added in 32 bits.
    cpu_flags=INT8_CPU_FLAGS,
)
"""int8_full: weights of 8 bits for each output channel, on CPUs that add products in 32 bits."""

UINT8 = Precision(
    writer="mmcompress.quantize.schemes.dynamic:write_dynamic",
    simulation="mmcompress.quantize.simulation:UNSIGNED_CHANNELS",
)
"""uint8: asymmetric weights of 8 bits, with a zero point for each output channel."""


def write_dynamic(
    model: Path | ModelProto,
    target: Path,
    *,
    precision: Precision,
    fp32_products: Sequence[str],
    feeds: Feeds,
) -> None:
    """Write a model whose activations get their range at run time."""
    # The import sets up logging, which `quantize_model` prevents only while it runs.
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        model,
        target,
        op_types_to_quantize=list(PRODUCT_OPERATORS),
        per_channel=True,
        reduce_range=precision.levels == REDUCED_LEVELS,
        weight_type=QuantType.QInt8 if precision.levels else QuantType.QUInt8,
        nodes_to_exclude=list_excluded_nodes(fp32_products),
    )
