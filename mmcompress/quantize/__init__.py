"""Quantization: precisions as deployed and as simulated."""

FP32 = None
"""fp32: nothing is rounded."""
