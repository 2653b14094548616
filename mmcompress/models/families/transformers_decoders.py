"""Loads a text decoder of transformers: one that cross-attends, or one that reads a prefix."""

from __future__ import annotations

from mmcompress.models.base import LoadContext, Model
from mmcompress.models.families.cross_attention_decoder import DECODER_FAMILIES, assemble_decoder
from mmcompress.models.families.decoding import (
    tokenize_prompt,
)
from mmcompress.models.families.prefix_decoder import PREFIX_FAMILIES, load_prefix_decoder
from mmcompress.models.hub import (
    POOLER,
    find_family,
    load_config,
    load_library_model,
    load_tokenizer_json,
)


def load_text_decoder(context: LoadContext) -> Model:
    """The decoder of a transformers folder or hub id. Raises `ModelError`."""

    config = load_config(context)
    if config.model_type in PREFIX_FAMILIES:
        return load_prefix_decoder(context, config)
    line = find_family(
        "text_decoder",
        config.model_type,
        table={k: v for k, v in DECODER_FAMILIES.items() if v.class_name} | PREFIX_FAMILIES,
        context=context,
    )
    whole = load_library_model(context, line.class_name, config=config, unread=POOLER)
    words = load_tokenizer_json(context)
    model = assemble_decoder(
        whole,
        config.model_type,
        tokenizer_json=words,
        candidates=context.candidates,
        max_tokens=context.max_tokens or 20,
    )
    if context.prompt:
        g = model.generation
        g["prompt"] = [
            *(g["prompt"] or [g["bos"]]),
            *tokenize_prompt(words, context.prompt, most=g["max_tokens"]),
        ]
    return model
