"""CoCa's caption decoder (open_clip) as a language model of transformers' form: its own cache, any `generate`.

The library's forward has no cache and takes the image; here the same layers read another node's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mmcompress.models.attention import SelfAttention, attend, merge_heads, split_heads
from mmcompress.models.layouts import normalize_


class CrossAttention(nn.Module):
    """Multi-head attention from text to image tokens; keys and values come from outside or are projected here."""

    def __init__(self, attention: nn.MultiheadAttention, norm: nn.LayerNorm):
        super().__init__()
        width, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim = width // self.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = attention.out_proj
        parts = zip(
            (self.q_proj, self.k_proj, self.v_proj), attention.in_proj_weight.chunk(3), strict=True
        )
        with torch.no_grad():
            for i, (linear, weight) in enumerate(parts):
                bias = attention.in_proj_bias.chunk(3)[i]
                # the norm before k and v: its scale and shift become theirs, so that all layers share the rest of it
                linear.weight.copy_(weight * norm.weight if i else weight)
                linear.bias.copy_(bias + weight @ norm.bias if i else bias)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        q = split_heads(self.q_proj(x), self.num_heads)
        return self.out_proj(merge_heads(attend(q, k, v=v))), None


class CaptionDecoder(PreTrainedModel, GenerationMixin):
    """ids [b, t], image tokens [b, n, w] (normalized, without scale and shift) -> logits [b, t, v]."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, coca: Any):
        text, decoder = coca.text, coca.text_decoder
        width, vocabulary = (
            int(text.token_embedding.embedding_dim),
            int(text.token_embedding.num_embeddings),
        )
        limit = min(int(text.context_length), int(decoder.context_length))
        ids = {
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": int(coca.pad_id),
        }
        sizes = {"vocab_size": vocabulary, "hidden_size": width, "max_position_embeddings": limit}
        options: dict[str, Any] = {
            **ids,
            **sizes,
            "is_decoder": True,
            "num_hidden_layers": len(text.transformer.resblocks),
        }
        super().__init__(PretrainedConfig(**options))
        self.token_embedding, self.positions = text.token_embedding, text.positional_embedding
        rows = [nn.ModuleDict({"block": b}) for b in text.transformer.resblocks]
        for own, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            cross.attn = CrossAttention(cross.attn, cross.ln_1_kv)
            del cross.ln_1_kv
            rows += [nn.ModuleDict({"block": own}), nn.ModuleDict({"cross_attn": cross})]
        self.layers = nn.ModuleList(rows)
        self.ln_final, self.head = decoder.ln_final, decoder.text_projection
        normalize_(self.layers)

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **_: Any,
    ) -> CausalLMOutput:
        """`attention_mask`: additive [1, 1, t, total], for a cached call; without one the text sees what is before."""
        t = input_ids.shape[1]
        at = torch.arange(t) if position_ids is None else position_ids[0]
        x = self.token_embedding(input_ids) + self.positions[at]
        cached = past_key_values is not None and use_cache
        if not cached:
            attention_mask = (torch.arange(t)[None] > torch.arange(t)[:, None])[None, None] * -1e9
        for i, layer in enumerate(self.layers):
            part = layer["block"] if "block" in layer else layer["cross_attn"]
            h = part.ln_1(x)
            if isinstance(part.attn, SelfAttention):
                past = past_key_values.self_attention_cache if cached else None
                h = self._self(part.attn, h, mask=attention_mask, past=past, layer=i)
            elif isinstance(part.attn, CrossAttention):
                memory = past_key_values.cross_attention_cache.layers[i] if cached else None
                h = self._cross(part.attn, h, context=encoder_hidden_states, memory=memory)
            else:
                h = part.attn(h)[0]
            x = x + part.ls_1(h)
            x = x + part.ls_2(part.mlp(part.ln_2(x)))
        return CausalLMOutput(logits=self.ln_final(x) @ self.head)

    @staticmethod
    def _self(
        attention: SelfAttention, x: Tensor, *, mask: Tensor | None, past: Any, layer: int
    ) -> Tensor:
        q, k, v = (split_heads(part, attention.num_heads) for part in attention.qkv(x).chunk(3, -1))
        if past is not None:
            k, v = past.update(k, v, layer)
        return attention.out_proj(merge_heads(attend(q, k, v=v, mask=mask)))

    @staticmethod
    def _cross(attention: CrossAttention, x: Tensor, *, context: Tensor, memory: Any) -> Tensor:
        if memory is not None:
            return attention(x, memory.keys, memory.values)[0]
        k, v = (
            split_heads(f(context), attention.num_heads)
            for f in (attention.k_proj, attention.v_proj)
        )
        return attention(x, k, v)[0]
