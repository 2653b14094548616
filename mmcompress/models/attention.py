"""TODO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, *, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for [b, h, t, d], spelled out so that its ONNX graph stays small."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def split_heads(x: Tensor, count: int) -> Tensor:
    """[b, t, h * d] -> [b, h, t, d]."""
    return x.view(x.shape[0], -1, count, x.shape[-1] // count).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[b, h, t, d] -> [b, t, h * d]."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * x.shape[3])


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused q, k, v projection; any number of heads of a fixed head width.

    Takes the place of `nn.MultiheadAttention`, whose packed projection can't lose heads, and is called like it.
    """

    def __init__(self, qkv: nn.Linear, out_proj: nn.Linear, *, num_heads: int):
        super().__init__()
        self.qkv, self.out_proj, self.num_heads = qkv, out_proj, num_heads
        self.batch_first = True

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention) -> SelfAttention:
        if (
            attention.in_proj_weight is None
            or attention.bias_k is not None
            or not attention.batch_first
        ):
            raise ValueError(
                "an nn.MultiheadAttention with keys of another width, bias_k or batch_first=False can't be taken apart"
            )
        rows, width = attention.in_proj_weight.shape
        has = attention.in_proj_bias is not None
        qkv = nn.Linear(width, rows, bias=has)
        with torch.no_grad():
            qkv.weight.copy_(attention.in_proj_weight)
            if has:
                qkv.bias.copy_(attention.in_proj_bias)
        inner = attention.out_proj
        out = nn.Linear(inner.in_features, inner.out_features, bias=inner.bias is not None)
        out.load_state_dict(inner.state_dict())
        return cls(qkv, out, num_heads=attention.num_heads)

    def forward(
        self,
        x: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *_: Any,
        attn_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        **__: Any,
    ) -> tuple[Tensor, None]:
        x = hidden_states if x is None else x
        assert x is not None
        other = [y for y in (key, value) if isinstance(y, Tensor) and y.ndim == 3 and y is not x]
        if other or key_padding_mask is not None or (is_causal and attn_mask is None):
            raise ValueError(
                "an nn.MultiheadAttention that is not plain self-attention (another key or value, a padding mask, "
                "is_causal without a mask) can't be taken apart: write it with q_proj, k_proj, v_proj and out_proj"
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(
                attn_mask, float("-inf")
            )
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        return self.out_proj(merge_heads(attend(q, k, v=v, mask=attn_mask))), None
