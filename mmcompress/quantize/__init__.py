"""Quantization: precisions as deployed and as simulated."""

NONE = None
"""fp32: nothing is rounded."""
