"""Load a text decoder of transformers: one that cross-attends, or one that reads a prefix."""

from __future__ import annotations

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext, Model
from mmcompress.models.families.cross_attention_decoder import (
    DECODER_FAMILIES,
    DecoderFamily,
    assemble_decoder,
)
from mmcompress.models.families.prefix_decoder import (
    PREFIX_FAMILIES,
    PrefixFamily,
    load_prefix_decoder,
)
from mmcompress.models.hub import (
    POOLER,
    describe_source,
    find_family,
    load_config,
    load_library_model,
)
from mmcompress.models.tokenizer_files import load_tokenizer_json

CAUSAL_CLASS = "AutoModelForCausalLM"
"""Class of transformers for decoders that stand alone."""


def load_text_decoder(context: LoadContext) -> Model:
    """Load the decoder of a transformers folder or hub id.

    Raises:
        ModelError: if the model can't be loaded or its family is not supported.
    """
    config = load_config(context)
    if config.model_type in PREFIX_FAMILIES:
        return load_prefix_decoder(context, config)
    family = find_family(config.model_type, table=_list_known_families(), context=context)
    if family.class_name == CAUSAL_CLASS and getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{describe_source(context)}: an encoder and a decoder of texts"
            f" (is_encoder_decoder). A {config.model_type} is read as a decoder alone, as"
            f" {CAUSAL_CLASS}.save_pretrained writes it, and within a vision-encoder-decoder"
        )
    library_model = load_library_model(context, family.class_name, config=config, unread=POOLER)
    return assemble_decoder(
        library_model,
        config.model_type,
        tokenizer_json=load_tokenizer_json(context),
        candidates=context.candidates,
        max_tokens=context.max_tokens,
        prompt=context.prompt,
        language=context.language,
        task=context.task,
    )


def _list_known_families() -> dict[str, DecoderFamily | PrefixFamily]:
    """List the rows that transformers loads, by model type."""
    families: dict[str, DecoderFamily | PrefixFamily] = {}
    for model_type, family in DECODER_FAMILIES.items():
        if family.class_name:
            families[model_type] = family
    families.update(PREFIX_FAMILIES)
    return families
