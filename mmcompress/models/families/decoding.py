"""Parts that both kinds of text decoders share: the cache, examples and prompts.

Shapes: B batch, H heads, T positions, D width of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmcompress.graph.blocks import Block
from mmcompress.models.families.generation_settings import (
    GenerationSettings,
    load_plain_tokenizer,
)
from mmcompress.runtime.beam_search import read_generation
from mmcompress.runtime.token_scores import ALL_SCORES

EXAMPLE_TOKEN = 3
"""A token id for examples: the first one that is no special token in the usual vocabularies."""


def get_layer_index(block: Block) -> int:
    """Return the number of the layer that a block named like `3.attention` belongs to."""
    return int(block.name.partition(".")[0])


def count_layers(blocks: Sequence[Block]) -> int:
    """Count the layers of a decoder: one more than the highest layer that its blocks name."""
    return 1 + max(get_layer_index(block) for block in blocks)


def get_key_head_width(block: Block) -> int:
    """Return the width of one head of keys.

    Args:
        block: an attention. Its second writer makes the keys; a single writer makes everything.
    """
    if len(block.writers) == 1:
        # A fused projection: query, key and value heads are equally wide.
        return block.writers[0].width
    return block.writers[1].width


def list_cache_shapes(blocks: Sequence[Block]) -> list[list[int]]:
    """List [heads, head width] of the cached keys and values: two entries for every attention."""
    shapes: list[list[int]] = []
    for block in blocks:
        shape = [block.units, get_key_head_width(block)]
        shapes += [shape, shape]
    return shapes


def name_cache_tensors(prefix: str, blocks: Sequence[Block]) -> tuple[str, ...]:
    """Name the cached keys and values of every attention: `past.0.k`, `past.0.v`, `past.1.k`..."""
    names: list[str] = []
    for block in blocks:
        names.append(f"{prefix}.{get_layer_index(block)}.k")
        names.append(f"{prefix}.{get_layer_index(block)}.v")
    return tuple(names)


def make_zero_cache(blocks: Sequence[Block], *, batch: int, length: int) -> tuple[Tensor, ...]:
    """Make zeros [B, H, T, D] in the place of the cached keys and values of every attention.

    Args:
        blocks: The blocks of the decoder; attentions among them have a cache.
        batch: Sequences B.
        length: Cached tokens T.
    """
    shapes = list_cache_shapes(blocks)
    return tuple(torch.zeros(batch, heads, length, width) for heads, width in shapes)


STEP_AXES = {
    "ids": {0: "batch", 1: "step"},
    "position": {0: "step"},
    "mask": {2: "step", 3: "total"},
    ALL_SCORES: {0: "batch"},
}
"""Names of the dynamic axes of a decode step, by tensor; cached tensors come on top."""


LayerCache = list[tuple[Tensor, Tensor] | None]
"""Keys and values [B, H, T, D] of every layer; None for a layer whose attention is gone."""


def arrange_cache_by_layer(
    layer_count: int, layers: Sequence[int], *, tensors: Sequence[Tensor]
) -> LayerCache:
    """Sort flat keys and values into their layers.

    Args:
        layer_count: number of layers of the decoder.
        layers: the layers that `tensors` belong to, in the same order.
        tensors: keys and values in turn, [B, H, T, D] each.
    """
    cache: LayerCache = [None] * layer_count
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    for layer, pair in zip(layers, pairs, strict=True):
        cache[layer] = pair
    return cache


def build_cache(layers: LayerCache) -> DynamicCache:
    """Build a cache of transformers that holds exactly these keys and values."""
    cache = DynamicCache()
    for pair in layers:
        layer = DynamicLayer()
        if pair is not None:
            keys_BHTD, values_BHTD = pair
            # Otherwise the first update would initialize the layer and lose both tensors.
            layer.lazy_initialization(keys_BHTD, values_BHTD)
            layer.keys = keys_BHTD
            layer.values = values_BHTD
        cache.layers.append(layer)
    return cache


def list_cached_tensors(cache: DynamicCache, layers: Sequence[int]) -> list[Tensor]:
    """List keys and values in turn of the given layers of a cache, [B, H, T, D] each."""
    tensors: list[Tensor] = []
    for layer in layers:
        tensors.append(cache.layers[layer].keys)
        tensors.append(cache.layers[layer].values)
    return tensors


class AbsentEncoder(nn.Module):
    """Stand in for an encoder that is a node of its own; return a fixed output.

    transformers reads `main_input_name` of every encoder.
    """

    main_input_name = "input_ids"
    fixed_output: Tensor | None = None
    """[B, T, W], returned whatever the input is; None while nobody reads it."""

    def forward(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.fixed_output)


def tokenize_prompt(tokenizer_json: str, prompt: str) -> list[int]:
    """Turn a prompt into token ids, without special tokens; none for an empty prompt."""
    if not prompt:
        return []
    tokenizer = load_plain_tokenizer(tokenizer_json)
    return list(tokenizer.encode(prompt, add_special_tokens=False).ids)


def find_lead(tokenizer_json: str, prompt: str) -> str:
    """Find what stands between a prompt and the text behind it: a space, or nothing.

    Some tokenizers write the space into the next word. Then a text behind a prompt starts with one.
    """
    if not prompt or prompt[-1].isspace():
        return ""
    tokenizer = load_plain_tokenizer(tokenizer_json)
    joined_ids = tokenizer.encode("a b", add_special_tokens=False).ids
    for lead in ("", " "):
        second = tokenizer.encode(lead + "b", add_special_tokens=False).ids
        if joined_ids[-len(second) :] == second:
            return lead
    return ""


def count_best_tokens(settings: GenerationSettings) -> int:
    """Count the best tokens that a step graph lists; 0 where the rules ask for all scores."""
    generation = read_generation(settings)
    return 0 if generation.needs_all_scores else generation.count_best_tokens()


def compute_scores(logits_BV: Tensor, settings: GenerationSettings) -> Tensor:
    """Compute what a step graph puts out [B, V]: log-probabilities, or logits as they are."""
    if settings["raw_scores"]:
        return logits_BV.float()
    return torch.log_softmax(logits_BV.float(), -1)
