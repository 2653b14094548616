"""The type of products while training: weights and losses are in float32 whatever it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch
from torch import nn

from mmcompress.models.device import CPU
from mmcompress.runtime.timing import find_lowest_median

BF16_MAX_TIME_SHARE = 0.8
"""Time of a product in bfloat16 / time in fp32, up to which a processor uses bfloat16."""


def choose_product_type(precision: str, device: torch.device) -> torch.dtype:
    """Return the type of the products of a training behind `compute.precision`.

    `auto` takes bfloat16 where the device has it and is quicker with it. It never takes float16,
    whose small range can cost quality.
    """
    if precision == "bf16":
        return torch.bfloat16
    if precision == "fp16":
        return torch.float16
    if precision == "fp32" or device.type == "mps":
        return torch.float32
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if is_bf16_faster() else torch.float32


@cache
def is_bf16_faster() -> bool:
    """Return whether this processor multiplies in bfloat16 in clearly less time than in fp32.

    Flags do not say: of two processors with avx512_bf16, one was twice as fast with it and the
    other half as fast. So it is measured, once per process.
    """
    fp32_ms = _time_product(torch.float32)
    bf16_ms = _time_product(torch.bfloat16)
    return bf16_ms < BF16_MAX_TIME_SHARE * fp32_ms


def _time_product(dtype: torch.dtype) -> float:
    """Return the milliseconds of a product about as large as those of a small transformer."""
    x = torch.zeros(512, 384, dtype=dtype, device=CPU)
    weight = torch.zeros(1536, 384, dtype=dtype, device=CPU)
    multiply = partial(nn.functional.linear, x, weight)
    return find_lowest_median(multiply, 3, rounds=20, limit=0.3)


def multiply_in(product_type: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Let models multiply in a type inside the context."""
    if product_type == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=product_type)
