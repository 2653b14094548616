"""What both lines of decoders share: cached keys and values, settings of a generation, prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block


def library_options(g: dict[str, Any]) -> dict[str, Any]:
    """The settings of a generation as the library's `generate` takes them, but for the length."""
    options: dict[str, Any] = {
        "num_beams": g["beams"],
        "num_return_sequences": g["beams"],
        "do_sample": False,
    }
    options |= {"eos_token_id": g["eos"], "pad_token_id": g["pad"], "use_cache": False}
    options |= {
        "suppress_tokens": g["suppress"] or None,
        "begin_suppress_tokens": g["begin_suppress"] or None,
    }
    beams = {
        "early_stopping": g["early_stopping"],
        "length_penalty": 1.0,
    }  # greedy search warns of them
    return options | beams if g["beams"] > 1 else options


def head_width(block: Block) -> int:
    """Width of one head of keys."""
    return block.writers[min(1, len(block.writers) - 1)].width


STEP_AXES = {
    "ids": {0: "batch", 1: "step"},
    "position": {0: "step"},
    "mask": {2: "step", 3: "total"},
    "scores": {0: "batch"},
}
"""Dynamic axes of a decode step."""


LayerCache = list[tuple[Tensor, Tensor] | None]


def arrange_by_layer(count: int, here: list[int], *, tensors: tuple[Tensor, ...]) -> LayerCache:
    """K and V by layer: those given for the layers `here`, none elsewhere."""
    pairs = dict(zip(here, zip(tensors[::2], tensors[1::2], strict=True), strict=True))
    return [pairs.get(i) for i in range(count)]


def build_cache(layers: LayerCache) -> Any:
    """A library cache that holds exactly these tensors."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for pair in layers:
        layer = DynamicLayer()
        if pair is not None:
            layer.lazy_initialization(*pair)
            layer.keys, layer.values = pair
        cache.layers.append(layer)
    return cache


class AbsentEncoder(nn.Module):
    """In place of an encoder that is a node of its own; says what it was given to say."""

    main_input_name = "input_ids"
    given_output: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.given_output)


def tokenize_prompt(tokenizer_json: str, prompt: str, *, most: int) -> list[int]:
    """Token ids of a prompt, fewer than `most`. Raises `ModelError`."""
    from tokenizers import Tokenizer

    found = (
        list(Tokenizer.from_str(tokenizer_json).encode(prompt, add_special_tokens=False).ids)
        if prompt
        else []
    )
    if len(found) + 1 >= most:
        raise ModelError(f"prompt: {len(found)} tokens leave nothing of max_tokens {most} to write")
    return found


def read_generation(whole: Any, lm: Any, *, candidates: int, max_tokens: int) -> dict[str, Any]:
    """Special ids and limits for the decode loop, from the library's own configuration."""
    sources = [
        x
        for m in (whole, lm)
        for x in (getattr(m, "generation_config", None), m.config)
        if x is not None
    ]
    text = getattr(whole.config, "text_config", None)
    sources += [text] if text is not None else []
    first = lambda *keys: next(
        (v for k in keys for s in sources if (v := getattr(s, k, None)) is not None), None
    )
    eos = first("sep_token_id") if whole.config.model_type == "blip" else first("eos_token_id")
    bos, pad = first("decoder_start_token_id", "bos_token_id"), first("pad_token_id")
    if isinstance(eos, list):
        eos = eos[0]
    if bos is None or eos is None:
        raise ModelError(
            "its configuration names no start and end token (bos_token_id, eos_token_id)"
        )
    own = getattr(whole, "generation_config", None)
    silent = getattr(own, "no_timestamps_token_id", None)  # Whisper: words only, no times
    return {
        "bos": int(bos),
        "eos": int(eos),
        "pad": int(eos if pad is None else pad),
        "beams": candidates,
        "max_tokens": max_tokens,
        "prompt": [] if silent is None else [int(bos), int(silent)],
        "early_stopping": False,
        "guard": silent is not None,
        "suppress": [int(t) for t in getattr(own, "suppress_tokens", None) or ()],
        "begin_suppress": [int(t) for t in getattr(own, "begin_suppress_tokens", None) or ()],
    }
