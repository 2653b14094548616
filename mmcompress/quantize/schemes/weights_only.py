"""w8, w4: weights in groups of 32 with a scale each; activations are floats between products."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto

from mmcompress.quantize.base import Feeds, Precision, load_model

ACCURACY_LEVEL = 4
"""MatMulNBits computes a product in int8: its inputs are rounded within each group of weights."""

W8 = Precision(
    writer="mmcompress.quantize.schemes.weights_only:write_weight_groups",
    simulation="mmcompress.quantize.simulation:GROUPS",
    levels=127,
    group_size=32,
)
"""w8: weights of 8 bits in groups of 32, activations in fp32 between products."""

W4 = Precision(
    writer="mmcompress.quantize.schemes.weights_only:write_weight_groups",
    simulation="mmcompress.quantize.simulation:GROUPS",
    bits=4,
    levels=7,
    group_size=32,
)
"""w4: weights of 4 bits in groups of 32, activations in fp32 between products."""


def write_weight_groups(
    model: Path | ModelProto,
    target: Path,
    *,
    precision: Precision,
    fp32_products: Sequence[str],
    feeds: Feeds,
) -> None:
    """Write a model whose products are MatMulNBits nodes."""
    # The import sets up logging, which `quantize_model` prevents only while it runs.
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        load_model(model),
        bits=precision.bits,
        block_size=precision.group_size,
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL,
        nodes_to_exclude=list(fp32_products),
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)
