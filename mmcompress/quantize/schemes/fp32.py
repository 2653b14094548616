"""fp32: nothing is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import ModelProto

from mmcompress.quantize.base import Feeds, Precision, load_model

FP32 = Precision(
    writer="mmcompress.quantize.schemes.fp32:write_unchanged",
    simulation=None,
    bits=32,
)
"""fp32: weights as they were trained."""


def write_unchanged(
    model: Path | ModelProto,
    target: Path,
    *,
    precision: Precision,
    fp32_products: Sequence[str],
    feeds: Feeds,
) -> None:
    """Write a model as it is."""
    onnx.save(load_model(model), str(target))
