"""Self-attention that can lose heads, in place of the packed attention of other libraries.

Shapes in this file:
    B  batch, T  positions of queries, S  positions of keys, H  heads, D  width of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, *, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q kᵀ / sqrt(D) + mask) v (Vaswani et al., https://arxiv.org/abs/1706.03762).

    It is written out, since its ONNX graph is smaller than that of torch's fused function.

    Args:
        q: Queries [B, H, T, D].
        k: Keys [B, H, S, D].
        v: Values [B, H, S, D].
        mask: Added to the scores [B, H, T, S]; -inf hides a position.

    Returns:
        [B, H, T, D].
    """
    scores_BHTS = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores_BHTS = scores_BHTS + mask
    return torch.softmax(scores_BHTS, -1) @ v


def split_heads(x: Tensor, count: int) -> Tensor:
    """Turn [B, T, H * D] into [B, H, T, D], given the heads H."""
    return x.view(x.shape[0], -1, count, x.shape[-1] // count).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Turn [B, H, T, D] into [B, T, H * D]."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * x.shape[3])


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection, for any number of heads that are left.

    It replaces `nn.MultiheadAttention`, whose packed projection can't lose heads, and is called
    like it.

    Args:
        qkv: Projection to queries, keys and values, [3 * H * D] features.
        out_proj: Output projection, from [H * D] features.
        num_heads: Heads H.
    """

    def __init__(self, qkv: nn.Linear, out_proj: nn.Linear, *, num_heads: int):
        super().__init__()
        self.qkv = qkv
        self.out_proj = out_proj
        self.num_heads = num_heads
        # torch's encoder layers ask their attention for it
        self.batch_first = True

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention) -> SelfAttention:
        """Copy the weights of torch's packed attention.

        Raises:
            ValueError: Its keys have a width or bias of their own, or the batch is not its first
                axis.
        """
        packed_weight = attention.in_proj_weight
        has_extra_key = attention.bias_k is not None
        if packed_weight is None or has_extra_key or not attention.batch_first:
            raise ValueError(
                "an nn.MultiheadAttention with keys of another width, bias_k or batch_first=False"
                " can't be taken apart"
            )
        packed_bias = attention.in_proj_bias
        out_features, in_features = packed_weight.shape
        qkv = nn.Linear(in_features, out_features, bias=packed_bias is not None)
        with torch.no_grad():
            qkv.weight.copy_(packed_weight)
            if packed_bias is not None:
                qkv.bias.copy_(packed_bias)
        packed_out = attention.out_proj
        has_out_bias = packed_out.bias is not None
        out_proj = nn.Linear(packed_out.in_features, packed_out.out_features, bias=has_out_bias)
        out_proj.load_state_dict(packed_out.state_dict())
        return cls(qkv, out_proj, num_heads=attention.num_heads)

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
        """Attend from a sequence to itself, called as torch or transformers call their own.

        Args:
            x: [B, T, w] the sequence; transformers passes it as `hidden_states`.
            key: The same tensor as `x`, or nothing.
            value: The same tensor as `x`, or nothing.
            attn_mask: [T, T], added to the scores; if it is boolean, True hides a position.

        Returns:
            ([B, T, w], None): no attention weights.

        Raises:
            ValueError: The call is not plain self-attention.
        """
        x = hidden_states if x is None else x
        assert x is not None
        if self._reads_another_sequence(x, (key, value)) or key_padding_mask is not None:
            raise ValueError(NOT_SELF_ATTENTION)
        if is_causal and attn_mask is None:
            raise ValueError(NOT_SELF_ATTENTION)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zeros = torch.zeros_like(attn_mask, dtype=x.dtype)
            attn_mask = zeros.masked_fill(attn_mask, float("-inf"))
        q_BHTD, k_BHTD, v_BHTD = (
            split_heads(projected_rows, self.num_heads)
            for projected_rows in self.qkv(x).chunk(3, -1)
        )
        attended_BHTD = attend(q_BHTD, k_BHTD, v=v_BHTD, mask=attn_mask)
        return self.out_proj(merge_heads(attended_BHTD)), None

    @staticmethod
    def _reads_another_sequence(x: Tensor, arguments: tuple[object, object]) -> bool:
        """Tell whether a key or value is a sequence of its own; transformers passes flags there."""
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.ndim == 3 and argument is not x:
                return True
        return False


NOT_SELF_ATTENTION = (
    "an nn.MultiheadAttention that is not plain self-attention can't be taken apart (another key or"
    " value, a padding mask, is_causal without a mask). Write it with q_proj, k_proj, v_proj and"
    " out_proj"
)
"""The message for a call that the fused projection can't serve."""
