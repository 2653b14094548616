"""Parts that both kinds of text decoders share: the cache, generation settings and prompts.

Shapes: B batch, H heads, T positions, D width of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TypedDict

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block

DEFAULT_MAX_TOKENS = 20
"""Tokens of the longest text if the node has no `max_tokens`: transformers' own default."""


EXAMPLE_TOKEN = 3
"""A token id for examples: the first one that is no special token in the usual vocabularies."""


class GenerationSettings(TypedDict):
    """Hold what the decode loop needs; the manifest of a bundle stores it under `generation`.

    The keys are those of `mmcompress.runtime.beam_search.Generation`.
    """

    bos: int
    """Token id that starts a text."""
    eos: int
    """Token id that ends a text."""
    pad: int
    """Token id that fills up a shorter text."""
    beams: int
    """Number of beams; the decoder returns all of them."""
    max_tokens: int
    """Tokens of the longest text, the prompt included."""
    prompt: list[int]
    """Token ids that every text starts with; if empty, a text starts with `bos`."""
    early_stopping: bool
    """Whether beam search ends as soon as it has enough finished texts."""
    guard: bool
    """Whether a text that only repeats itself ends at once."""
    suppress: list[int]
    """Token ids that are never written."""
    begin_suppress: list[int]
    """Token ids that are never written directly after the prompt."""


def make_generate_options(settings: GenerationSettings) -> dict[str, object]:
    """Translate generation settings into arguments of the library's `generate`.

    The limit of the length is missing: its argument differs between families.

    Args:
        settings: settings of the decode loop.

    Returns:
        Keyword arguments of `transformers.GenerationMixin.generate`.
    """
    options: dict[str, object] = {
        "num_beams": settings["beams"],
        "num_return_sequences": settings["beams"],
        "do_sample": False,
        "eos_token_id": settings["eos"],
        "pad_token_id": settings["pad"],
        "use_cache": False,
        "suppress_tokens": settings["suppress"] or None,
        "begin_suppress_tokens": settings["begin_suppress"] or None,
    }
    # Greedy search warns about options that only beam search reads.
    if settings["beams"] > 1:
        options["early_stopping"] = settings["early_stopping"]
        options["length_penalty"] = 1.0
    return options


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
    """Make zeros [B, H, T, D] in the place of the cached keys and values of every attention."""
    shapes = list_cache_shapes(blocks)
    return tuple(torch.zeros(batch, heads, length, width) for heads, width in shapes)


STEP_AXES = {
    "ids": {0: "batch", 1: "step"},
    "position": {0: "step"},
    "mask": {2: "step", 3: "total"},
    "scores": {0: "batch"},
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


def tokenize_prompt(tokenizer_json: str, prompt: str, *, max_tokens: int) -> list[int]:
    """Turn a prompt into token ids, without special tokens.

    Args:
        tokenizer_json: a fast tokenizer as JSON.
        prompt: the text; may be empty.
        max_tokens: tokens of the longest text, the start token and the prompt included.

    Raises:
        ModelError: if the prompt leaves no token to write.
    """
    if not prompt:
        ids: list[int] = []
    else:
        tokenizer = Tokenizer.from_str(tokenizer_json)
        ids = list(tokenizer.encode(prompt, add_special_tokens=False).ids)
    if len(ids) + 1 >= max_tokens:
        raise ModelError(
            f"prompt: {len(ids)} tokens leave nothing of max_tokens {max_tokens} to write"
        )
    return ids


def _find_setting(sources: Sequence[object], keys: Sequence[str]) -> int | list[int] | None:
    """Find the value of the first key that any configuration sets, the first one that does."""
    for key in keys:
        for source in sources:
            value = getattr(source, key, None)
            if value is not None:
                return value
    return None


def _list_configurations(library_model: nn.Module, decoder: nn.Module) -> list[object]:
    """List the configurations that may name special tokens, the most specific first."""
    sources: list[object] = []
    for module in (library_model, decoder):
        for configuration in (getattr(module, "generation_config", None), module.config):
            if configuration is not None:
                sources.append(configuration)
    text_config = getattr(library_model.config, "text_config", None)
    if text_config is not None:
        sources.append(text_config)
    return sources


def read_generation_settings(
    library_model: nn.Module, decoder: nn.Module, *, candidates: int, max_tokens: int
) -> GenerationSettings:
    """Read special tokens and limits of the decode loop from the library's own configuration.

    Args:
        library_model: the library's model as it was loaded.
        decoder: its decoder; may be the same module.
        candidates: number of texts for each input, which is the number of beams.
        max_tokens: tokens of the longest text.

    Raises:
        ModelError: if the configuration names no start token or no end token.
    """
    sources = _list_configurations(library_model, decoder)
    # BLIP ends its captions with the separator; its `eos_token_id` is another token.
    end_key = "sep_token_id" if library_model.config.model_type == "blip" else "eos_token_id"
    eos = _find_setting(sources, (end_key,))
    bos = _find_setting(sources, ("decoder_start_token_id", "bos_token_id"))
    pad = _find_setting(sources, ("pad_token_id",))
    # Some configurations name several end tokens; the decode loop knows one.
    if isinstance(eos, list):
        eos = eos[0]
    if bos is None or eos is None:
        raise ModelError(
            "its configuration names no start and end token (bos_token_id, eos_token_id)"
        )
    generation_config = getattr(library_model, "generation_config", None)
    # Only Whisper has this token: it asks for words without their times.
    no_times = getattr(generation_config, "no_timestamps_token_id", None)
    suppress = getattr(generation_config, "suppress_tokens", None) or ()
    begin_suppress = getattr(generation_config, "begin_suppress_tokens", None) or ()
    return GenerationSettings(
        bos=int(bos),
        eos=int(eos),
        pad=int(eos if pad is None else pad),
        beams=candidates,
        max_tokens=max_tokens,
        prompt=[] if no_times is None else [int(bos), int(no_times)],
        # transformers' default: end only when no running text can still win.
        early_stopping=False,
        # Whisper may repeat itself until the longest text is full.
        guard=no_times is not None,
        suppress=[int(token) for token in suppress],
        begin_suppress=[int(token) for token in begin_suppress],
    )
