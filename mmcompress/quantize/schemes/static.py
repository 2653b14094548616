"""int8_static: weights in 8 bits, activations in 8 bits over ranges of calibration inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import ModelProto

from mmcompress.quantize.base import (
    PRODUCT_OPERATORS,
    REDUCED_LEVELS,
    Feeds,
    Precision,
    list_excluded_nodes,
    load_model,
)

INT8_STATIC = Precision(
    writer="mmcompress.quantize.schemes.static:write_static",
    simulation="mmcompress.quantize.simulation:SIGNED_CHANNELS",
    needs_calibration=True,
    levels=REDUCED_LEVELS,
)
"""int8_static: weights of 7 bits, and activations over ranges of calibration inputs."""


class FeedReader:
    """Calibration inputs one by one, as ONNX Runtime asks for them."""

    def __init__(self, feeds: Feeds):
        self.feeds = iter(feeds)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        """Return the inputs of the next call, None at the end."""
        return next(self.feeds, None)


def write_static(
    model: Path | ModelProto,
    target: Path,
    *,
    precision: Precision,
    fp32_products: Sequence[str],
    feeds: Feeds,
) -> None:
    """Write a model whose activations have fixed ranges."""
    # The import sets up logging, which `quantize_model` prevents only while it runs.
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    CalibrationDataReader.register(FeedReader)
    extra_options = {
        # A product of two activations (attention) stays in fp32, as in the dynamic form.
        "MatMulConstBOnly": True,
        "WeightSymmetric": True,
        "ActivationSymmetric": False,
        # Sums of products are floats already.
        "OpTypesToExcludeOutputQuantization": list(PRODUCT_OPERATORS),
    }
    # Calibration adds outputs to a model that is handed in, so it gets a copy.
    source = model if isinstance(model, Path) else load_model(model)
    quantize_static(
        source,
        target,
        FeedReader(feeds),
        op_types_to_quantize=list(PRODUCT_OPERATORS),
        per_channel=True,
        reduce_range=precision.levels == REDUCED_LEVELS,
        weight_type=QuantType.QInt8 if precision.levels else QuantType.QUInt8,
        activation_type=QuantType.QUInt8,
        quant_format=QuantFormat.QDQ,
        nodes_to_exclude=list_excluded_nodes(fp32_products),
        extra_options=extra_options,
    )
