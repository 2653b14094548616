"""The version of ONNX operators that exports and microbenchmarks are written in. No torch."""

from __future__ import annotations

OPSET = 17
"""Version of the ONNX operators that are written: the first one with LayerNormalization."""
