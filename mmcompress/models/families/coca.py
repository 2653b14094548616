"""CoCa's caption decoder (open_clip) as a language model of transformers.

As such it has a cache and runs with any `generate`.

The library's own forward has no cache and takes the image. Here the same layers read the tokens of
another node. CoCa: Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models".

Shapes: B batch, T text tokens, V vocabulary, N image tokens, W width, H heads, D width of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutput

from mmcompress.models.attention import SelfAttention, attend, merge_heads, split_heads
from mmcompress.models.layouts import normalize_

HIDDEN_SCORE = -1e9
"""Added to the score of a hidden token; far below every score, yet finite in float32."""

LONGEST_CAPTION = 30
"""Tokens of the longest caption, its start included: the default of open_clip's `generate`."""

SHORTEST_CAPTION = 5
"""Tokens before a caption may end, its start included: the default of open_clip's `generate`."""


class CrossAttention(nn.Module):
    """Attend from text to image tokens; the caller makes keys and values.

    The library normalizes image tokens before the keys and values of each layer: W (n * g + b),
    with n the tokens without scale and shift. The scale g and shift b of that norm become part of
    the weights here: (W g) n + (W b). So all layers share one n.

    Args:
        attention: the library's attention with packed projections.
        norm: the library's norm of the image tokens in this layer.
    """

    def __init__(self, attention: nn.MultiheadAttention, norm: nn.LayerNorm):
        super().__init__()
        width = attention.embed_dim
        self.num_heads = attention.num_heads
        self.head_dim = width // self.num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = attention.out_proj
        q_weight, k_weight, v_weight = attention.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = attention.in_proj_bias.chunk(3)
        with torch.no_grad():
            self.q_proj.weight.copy_(q_weight)
            self.q_proj.bias.copy_(q_bias)
            self.k_proj.weight.copy_(k_weight * norm.weight)
            self.k_proj.bias.copy_(k_bias + k_weight @ norm.bias)
            self.v_proj.weight.copy_(v_weight * norm.weight)
            self.v_proj.bias.copy_(v_bias + v_weight @ norm.bias)

    def forward(self, x_BTW: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> tuple[Tensor, None]:
        q_BHTD = split_heads(self.q_proj(x_BTW), self.num_heads)
        return self.out_proj(merge_heads(attend(q_BHTD, k_BHND, v=v_BHND))), None


class CaptionDecoder(PreTrainedModel, GenerationMixin):
    """Decode captions from ids [B, T] and image tokens [B, N, W] to logits [B, T, V].

    The image tokens are normalized, without scale and shift.

    Args:
        coca: open_clip's CoCa; its text layers are changed in place.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_cache_class = True

    def __init__(self, coca: nn.Module):
        text = coca.text
        decoder = coca.text_decoder
        super().__init__(_make_config(coca))
        # The class declares few of the settings that it takes.
        generation_config: Any = self.generation_config
        generation_config.max_length = LONGEST_CAPTION
        generation_config.min_length = SHORTEST_CAPTION
        self.token_embedding = text.token_embedding
        self.positions = text.positional_embedding
        layers = [nn.ModuleDict({"block": block}) for block in text.transformer.resblocks]
        for block, cross_block in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            cross_block.attn = CrossAttention(cross_block.attn, cross_block.ln_1_kv)
            # Its scale and shift are part of the projections now.
            del cross_block.ln_1_kv
            layers.append(nn.ModuleDict({"block": block}))
            layers.append(nn.ModuleDict({"cross_attn": cross_block}))
        self.layers = nn.ModuleList(layers)
        self.ln_final = decoder.ln_final
        self.head = decoder.text_projection
        # The library packs q, k and v into one weight that can't lose heads.
        normalize_(self.layers)

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool = False,
        **_: object,
    ) -> CausalLMOutput:
        """Compute logits [B, T, V].

        Args:
            input_ids: [B, T].
            encoder_hidden_states: image tokens [B, N, W]; a cache takes their place.
            attention_mask: added to scores, [1, 1, T, total]; read with a cache only. Without a
                cache, a token sees itself and those before it.
            position_ids: [B, T], the same in every row; by default 0 to T - 1.
            past_key_values: keys and values of past text tokens and of the image.
            use_cache: whether to use `past_key_values`.
        """
        length = input_ids.shape[1]
        order_T = torch.arange(length, device=input_ids.device)
        positions_T = order_T if position_ids is None else position_ids[0]
        x_BTW = self.token_embedding(input_ids) + self.positions[positions_T]
        cache = past_key_values if use_cache else None
        if cache is None:
            is_hidden_TT = order_T[None] > order_T[:, None]
            attention_mask = is_hidden_TT[None, None] * HIDDEN_SCORE
        for i, layer in enumerate(self.layers):
            part = layer["block"] if "block" in layer else layer["cross_attn"]
            h_BTW = part.ln_1(x_BTW)
            if isinstance(part.attn, SelfAttention):
                text_cache = None if cache is None else cache.self_attention_cache
                attended_BTW = _attend_to_text(
                    part.attn, h_BTW, mask=attention_mask, cache=text_cache, layer=i
                )
            elif isinstance(part.attn, CrossAttention):
                image_cache = None if cache is None else cache.cross_attention_cache.layers[i]
                attended_BTW = _attend_to_image(
                    part.attn, h_BTW, image_BNW=encoder_hidden_states, cache=image_cache
                )
            else:
                # Pruning put a constant in the place of the attention.
                attended_BTW = part.attn(h_BTW)[0]
            x_BTW = x_BTW + part.ls_1(attended_BTW)
            x_BTW = x_BTW + part.ls_2(part.mlp(part.ln_2(x_BTW)))
        return CausalLMOutput(logits=self.ln_final(x_BTW) @ self.head)


def _make_config(coca: nn.Module) -> PretrainedConfig:
    """Describe CoCa's caption decoder as transformers' `generate` wants to know it."""
    text = coca.text
    vocabulary = int(text.token_embedding.num_embeddings)
    # open_clip's tokenizer puts the start and the end of a text at the end of its vocabulary.
    # The class declares few of the parameters that it takes.
    options: dict[str, object] = {
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": int(coca.pad_id),
        "vocab_size": vocabulary,
        "hidden_size": int(text.token_embedding.embedding_dim),
        "max_position_embeddings": min(
            int(text.context_length), int(coca.text_decoder.context_length)
        ),
        "is_decoder": True,
        "num_hidden_layers": len(text.transformer.resblocks),
    }
    return PretrainedConfig(**options)


def _attend_to_text(
    attention: SelfAttention,
    x_BTW: Tensor,
    *,
    mask: Tensor | None,
    cache: DynamicCache | None,
    layer: int,
) -> Tensor:
    """Attend to the text so far [B, T, W]; with a cache, add the new keys and values to it."""
    # The module's own forward has no cache.
    q_BTW, k_BTW, v_BTW = attention.qkv(x_BTW).chunk(3, -1)
    q_BHTD = split_heads(q_BTW, attention.num_heads)
    k_BHTD = split_heads(k_BTW, attention.num_heads)
    v_BHTD = split_heads(v_BTW, attention.num_heads)
    if cache is not None:
        k_BHTD, v_BHTD = cache.update(k_BHTD, v_BHTD, layer)
    attended_BHTD = attend(q_BHTD, k_BHTD, v=v_BHTD, mask=mask)
    return attention.out_proj(merge_heads(attended_BHTD))


def _attend_to_image(
    attention: CrossAttention,
    x_BTW: Tensor,
    *,
    image_BNW: Tensor,
    cache: DynamicLayer | None,
) -> Tensor:
    """Attend to the image [B, T, W]; a cache holds its keys and values already."""
    if cache is not None:
        return attention(x_BTW, cache.keys, cache.values)[0]
    k_BHND = split_heads(attention.k_proj(image_BNW), attention.num_heads)
    v_BHND = split_heads(attention.v_proj(image_BNW), attention.num_heads)
    return attention(x_BTW, k_BHND, v_BHND)[0]
