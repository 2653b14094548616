"""Text decoders of transformers whose layers cross-attend to the output of another node.

Training and teacher forcing run the library's own forward. The deployed step runs it too, with
every cached tensor as an explicit input and output. A graph of its own computes cross-attention
keys and values once a request. A `DecoderFamily` says where a library keeps the parts; a new family
is a new row of `DECODER_FAMILIES`.

Shapes: B batch, T text positions, V vocabulary, N context tokens, W width, H heads, D width of one
    head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block
from mmcompress.models.attention import split_heads
from mmcompress.models.base import BlockShape, ExampleRequest, ExportGraph, Model
from mmcompress.models.families.decoding import (
    EXAMPLE_TOKEN,
    STEP_AXES,
    AbsentEncoder,
    arrange_cache_by_layer,
    build_cache,
    compute_scores,
    count_best_tokens,
    count_layers,
    find_lead,
    get_layer_index,
    list_cache_shapes,
    list_cached_tensors,
    make_zero_cache,
    name_cache_tensors,
    tokenize_prompt,
)
from mmcompress.models.families.generation_settings import (
    GenerationSettings,
    TextRequest,
    build_generation_settings,
    find_generation_config,
    make_generate_options,
    read_special_tokens,
    refuse_languages,
)
from mmcompress.models.families.whisper_start import list_whisper_start
from mmcompress.models.layouts import find_blocks, normalize_
from mmcompress.runtime.token_scores import ALL_SCORES


def keep_unchanged(lm: nn.Module) -> None:
    """Leave a library's model as it is."""


def run_causal_decoder(
    lm: nn.Module, ids_BT: Tensor, *, context_BNW: Tensor, **options: object
) -> Tensor:
    """Run a decoder that has a head of its own and takes the context as `encoder_hidden_states`.

    Returns:
        Logits [B, T, V].
    """
    return lm(input_ids=ids_BT, encoder_hidden_states=context_BNW, **options).logits


def run_whisper_decoder(
    lm: nn.Module, ids_BT: Tensor, *, context_BNW: Tensor, **options: object
) -> Tensor:
    """Run Whisper's decoder and its output projection; the whole model wants sound as its input.

    Returns:
        Logits [B, T, V].
    """
    outputs = lm.model.decoder(input_ids=ids_BT, encoder_hidden_states=context_BNW, **options)
    return lm.proj_out(outputs.last_hidden_state)


def run_t5_decoder(
    lm: nn.Module, ids_BT: Tensor, *, context_BNW: Tensor, **options: object
) -> Tensor:
    """Run T5's decoder and its head; some models scale the features between the two by W ** -0.5.

    Returns:
        Logits [B, T, V].
    """
    outputs = lm.decoder(input_ids=ids_BT, encoder_hidden_states=context_BNW, **options)
    x_BTW = outputs.last_hidden_state
    if lm.config.scale_decoder_outputs:
        x_BTW = x_BTW * lm.model_dim**-0.5
    return lm.lm_head(x_BTW)


class HeadBias(nn.Module):
    """Look up a bias for every head; the table has one row a head, so that a cut takes rows.

    Args:
        table: the library's embedding, [buckets, H].
    """

    def __init__(self, table: Tensor):
        super().__init__()
        # Rows are what a cut removes; the library's table has one column a head.
        self.weight = nn.Parameter(table.detach().T.clone())
        self.bias = None

    def forward(self, buckets: Tensor) -> Tensor:
        return torch.nn.functional.embedding(buckets, self.weight.T)


def _ignore_shared_bias(
    module: nn.Module, args: tuple[object, ...], options: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Take the bias of the layer before out of a call, so that a layer uses its own."""
    return args, {**options, "position_bias": None}


def separate_t5_biases(lm: nn.Module) -> None:
    """Give every layer of T5 a copy of the first layer's relative position bias.

    T5 computes the bias in the first layer and hands it on. With a copy, each layer can lose heads
    of its own.

    Args:
        lm: a T5 model of transformers; changed in place.
    """
    table = lm.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    for path, module in lm.decoder.named_modules():
        if path.endswith(("SelfAttention", "EncDecAttention")):
            module.register_forward_pre_hook(_ignore_shared_bias, with_kwargs=True)
        if path.endswith("SelfAttention"):
            module.has_relative_attention_bias = True
            module.relative_attention_bias = HeadBias(table)


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """Say where transformers keeps the parts of one family of decoders, and how to run it."""

    class_name: str
    """Class of transformers that loads the weights; empty for a family of another library."""
    stack: str
    """Path of the module that holds the layers; empty if the inner decoder's family says it."""
    run_decoder: Callable[..., Tensor]
    """Called with (lm, ids [B, T], context_BNW=, options of the library); returns [B, T, V]."""
    width: str = "hidden_size"
    """Name of the width of the layers in the library's configuration."""
    positions: bool = True
    """Whether the forward takes position ids; otherwise it counts the tokens of the cache."""
    text_start: str = ""
    """Put before every text that the decoder learns: Whisper's words start with a space."""
    decoder_attribute: str = ""
    """Name of the decoder in a composite model; empty if the model is the decoder."""
    has_encoder: bool = False
    """Whether its checkpoints also hold the encoder that the decoder was trained to read."""
    prepare_model: Callable[[nn.Module], None] = keep_unchanged
    """Changes the library's model before its blocks are found; most families need no change."""


DECODER_FAMILIES = {
    "mbart": DecoderFamily(
        class_name="AutoModelForCausalLM",
        stack="model.decoder",
        run_decoder=run_causal_decoder,
        width="d_model",
        positions=False,
    ),
    "gpt2": DecoderFamily(
        class_name="AutoModelForCausalLM",
        stack="transformer",
        run_decoder=run_causal_decoder,
    ),
    "bert": DecoderFamily(
        class_name="AutoModelForCausalLM",
        stack="bert",
        run_decoder=run_causal_decoder,
    ),
    "blip_text_model": DecoderFamily(
        class_name="BlipTextLMHeadModel",
        stack="bert",
        run_decoder=run_causal_decoder,
    ),
    "blip": DecoderFamily(
        class_name="BlipForConditionalGeneration",
        stack="bert",
        run_decoder=run_causal_decoder,
        decoder_attribute="text_decoder",
        has_encoder=True,
    ),
    "vision-encoder-decoder": DecoderFamily(
        class_name="VisionEncoderDecoderModel",
        stack="",
        run_decoder=run_causal_decoder,
        decoder_attribute="decoder",
        has_encoder=True,
    ),
    "whisper": DecoderFamily(
        class_name="WhisperForConditionalGeneration",
        stack="model.decoder",
        run_decoder=run_whisper_decoder,
        width="d_model",
        text_start=" ",
        has_encoder=True,
    ),
    "coca": DecoderFamily(
        class_name="",
        stack="layers",
        run_decoder=run_causal_decoder,
        has_encoder=True,
    ),
    "t5": DecoderFamily(
        class_name="T5ForConditionalGeneration",
        stack="decoder",
        run_decoder=run_t5_decoder,
        width="d_model",
        positions=False,
        prepare_model=separate_t5_biases,
    ),
}
"""Rows by `model_type` of the library's configuration; to add a family, copy a row."""


class TextDecoder(Model):
    """Decode text that cross-attends to the tokens of another node.

    `forward` takes ids [B, T] and context [B, N, W]. It returns logits [B, T, V], each from the
    tokens before it (teacher forcing).

    Args:
        lm: the library's decoder; normalized in place.
        family: where the library keeps its parts.
        tokenizer_json: a fast tokenizer as JSON.
        generation: settings of the decode loop.
        project: brings the context to the width that cross-attention reads.
        lead: stands between the start of a text and its first word.
    """

    kind = "text_decoder"
    context_tokens = 64
    """Length of the context in tokens; the pipeline that feeds this decoder sets it."""

    def __init__(
        self,
        lm: nn.Module,
        family: DecoderFamily,
        *,
        tokenizer_json: str,
        generation: GenerationSettings,
        project: nn.Module,
        lead: str = "",
    ):
        super().__init__()
        self.lead = lead
        family.prepare_model(lm)
        self.lm = normalize_(lm)
        self.family = family
        self.has_own_encoder = family.has_encoder
        self.project = project
        self.tokenizer_json = tokenizer_json
        self.generation = generation
        self.blocks = find_blocks(self, f"lm.{family.stack}")
        self.layer_count = count_layers(self.blocks)
        self.vocabulary = int(lm.config.vocab_size)
        self.width = int(getattr(lm.config, family.width))
        if isinstance(project, nn.Linear):
            self.context_width = project.in_features
        else:
            self.context_width = _find_context_width(self)
        self.dims = {"context": self.context_width}

    def list_attentions(self, kind: str) -> list[Block]:
        """List the attentions of one kind that are left; a unit of one is one head of keys."""
        return [block for block in self.blocks if block.kind == kind]

    @property
    def config(self) -> dict[str, object]:  # type: ignore[override]
        """Describe the decoder for the runtime node.

        `past` holds [heads, head width] of every cached key and value of self-attention.
        """
        return {
            "tokenizer": "tokenizer.json",
            "past": list_cache_shapes(self.list_attentions("attention")),
            "generation": self.generation,
            "lead": self.lead,
        }

    def forward(self, ids: Tensor, context: Tensor) -> Tensor:
        return self.family.run_decoder(
            self.lm, ids, context_BNW=self.project(context), use_cache=False
        )

    def export_graphs(self) -> dict[str, ExportGraph]:
        """Describe the two graphs.

        `context` computes cross-attention keys and values of all layers once a request. `step`
        reads new tokens and a cache. A decoder without cross-attention has no `context`.
        """
        graphs = {}
        if self.list_attentions("cross_attention"):
            graphs["context"] = self._describe_context_graph()
        graphs["step"] = self._describe_step_graph()
        return graphs

    def _describe_context_graph(self) -> ExportGraph:
        """Describe the graph that computes cross-attention keys and values."""
        names = name_cache_tensors("cross", self.list_attentions("cross_attention"))
        dynamic_axes = {"context": {0: "images", 1: "tokens"}}
        for name in names:
            dynamic_axes[name] = {0: "images", 2: "tokens"}
        return ExportGraph(
            module=CrossKeys(self),
            example=(torch.zeros(2, 5, self.context_width),),
            inputs=("context",),
            outputs=names,
            dynamic_axes=dynamic_axes,
        )

    def _describe_step_graph(self) -> ExportGraph:
        """Describe the graph of a decode step.

        The example: two beams, three past tokens, two new ones, five context tokens.
        """
        attentions = self.list_attentions("attention")
        cross_attentions = self.list_attentions("cross_attention")
        past_names = name_cache_tensors("past", attentions)
        new_names = name_cache_tensors("new", attentions)
        cross_names = name_cache_tensors("cross", cross_attentions)
        dynamic_axes = dict(STEP_AXES)
        for name in past_names:
            dynamic_axes[name] = {0: "batch", 2: "past"}
        for name in new_names:
            dynamic_axes[name] = {0: "batch", 2: "total"}
        for name in cross_names:
            dynamic_axes[name] = {0: "images", 2: "tokens"}
        # A size of 1 would become a constant of the traced graph.
        ids = torch.zeros(2, 2, dtype=torch.long)
        position = torch.arange(3, 5)
        mask = torch.zeros(1, 1, 2, 5)
        past = make_zero_cache(attentions, batch=2, length=3)
        cross = make_zero_cache(cross_attentions, batch=2, length=5)
        return ExportGraph(
            module=Step(self),
            example=(ids, position, mask, *past, *cross),
            inputs=("ids", "position", "mask", *past_names, *cross_names),
            outputs=(ALL_SCORES, *new_names),
            dynamic_axes=dynamic_axes,
            best_tokens=count_best_tokens(self.generation),
        )

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Describe the shape of every block in a decode step.

        On average, half of the text is in the cache.
        """
        keys_by_kind = {
            "attention": round((steps + 1) / 2),
            "cross_attention": self.context_tokens,
        }
        shapes = {}
        for block in self.blocks:
            shapes[block.name] = BlockShape(
                width=self.width,
                positions=1,
                keys=keys_by_kind.get(block.kind, 1),
                batch=beams,
                calls=steps,
            )
        return shapes

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        """Make inputs of each graph in the middle of a text, and count its calls in a request."""
        past_length = max(1, round((steps - 1) / 2))
        inputs = [
            torch.full((beams, 1), EXAMPLE_TOKEN),
            torch.tensor([past_length]),
            torch.zeros(1, 1, 1, past_length + 1),
        ]
        for heads, head_width in list_cache_shapes(self.list_attentions("attention")):
            inputs.append(torch.randn(beams, heads, past_length, head_width))
        cross_shapes = list_cache_shapes(self.list_attentions("cross_attention"))
        for heads, head_width in cross_shapes:
            inputs.append(torch.randn(1, heads, self.context_tokens, head_width))
        requests = {}
        if cross_shapes:
            context = torch.randn(1, self.context_tokens, self.context_width)
            requests["context"] = ExampleRequest((context,), 1.0)
        requests["step"] = ExampleRequest(tuple(inputs), steps)
        return requests

    @torch.inference_mode()
    def generate_with_library(self, context: Tensor) -> list[list[int]]:
        """Generate with the library's own `generate`.

        Args:
            context: one item, [1, N, W].

        Returns:
            Token ids of all beams, the best first.
        """
        settings = self.generation
        prompt = torch.tensor([settings["prompt"] or [settings["bos"]]])
        options = make_generate_options(settings)
        options["max_length"] = settings["max_tokens"]
        options["max_new_tokens"] = None
        if self.lm.config.is_encoder_decoder:
            options["encoder_outputs"] = BaseModelOutput(self.project(context))
            options["decoder_input_ids"] = prompt
        else:
            options["encoder_hidden_states"] = self.project(context)
            options["input_ids"] = prompt
        # Whisper and BLIP override `generate` with loops over windows of sound and over pixels.
        return GenerationMixin.generate(self.lm, **options).tolist()


def _find_context_width(model: TextDecoder) -> int:
    """Find the width that the keys of the first cross-attention read."""
    cross_attentions = model.list_attentions("cross_attention")
    if not cross_attentions:
        raise ModelError("this decoder has no cross-attention: it can't read another node's output")
    writers = cross_attentions[0].writers
    key_writer = writers[0] if len(writers) == 1 else writers[1]
    return model.get_linear(key_writer.path).in_features


class CrossKeys(nn.Module):
    """Compute keys and values [B, H, N, D] of every cross-attention from a context [B, N, W]."""

    def __init__(self, model: TextDecoder):
        super().__init__()
        self.project = model.project
        blocks = model.list_attentions("cross_attention")
        self.head_counts = [block.units for block in blocks]
        self.linears = nn.ModuleList()
        for block in blocks:
            # The first writer makes the queries.
            key_writers = [model.get_linear(writer.path) for writer in block.writers[1:]]
            self.linears.append(nn.ModuleList(key_writers))

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        x_BNW = self.project(context)
        outputs: list[Tensor] = []
        for head_count, linears in zip(self.head_counts, self.linears, strict=True):
            if len(linears) == 2:
                keys_BNW = linears[0](x_BNW)
                values_BNW = linears[1](x_BNW)
            else:
                # GPT-2 makes both with one layer.
                keys_BNW, values_BNW = linears[0](x_BNW).chunk(2, -1)
            outputs.append(split_heads(keys_BNW, head_count))
            outputs.append(split_heads(values_BNW, head_count))
        return tuple(outputs)


class Step(nn.Module):
    """Run one decode step of a `TextDecoder` with an explicit cache.

    Inputs: ids [B, T], position [T], mask [1, 1, T, total]. Then come keys and values of the past
    tokens and of the context, [B, H, T, D] each. The mask is added to the scores of self-attention.
    Keys and values of the context may have batch 1: then all beams of one input share them.

    Outputs: log-probabilities [B, V] after the last token (or logits, `compute_scores`), then the
    new keys and values.
    """

    def __init__(self, model: TextDecoder):
        super().__init__()
        self.model = model
        attentions = model.list_attentions("attention")
        cross_attentions = model.list_attentions("cross_attention")
        self.attention_layers = [get_layer_index(block) for block in attentions]
        self.cross_attention_layers = [get_layer_index(block) for block in cross_attentions]

    def forward(
        self, ids: Tensor, position: Tensor, mask: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        model = self.model
        past_count = 2 * len(self.attention_layers)
        past = arrange_cache_by_layer(
            model.layer_count, self.attention_layers, tensors=cache[:past_count]
        )
        cross = arrange_cache_by_layer(
            model.layer_count, self.cross_attention_layers, tensors=cache[past_count:]
        )
        library_cache = EncoderDecoderCache(build_cache(past), build_cache(cross))
        # Cross-attention then reads its cache and projects nothing.
        library_cache.is_updated = dict.fromkeys(range(model.layer_count), True)

        def count_past_tokens(*_: object) -> Tensor:
            return position[0]

        # Some libraries count past tokens on the first layer, whose attention may be gone.
        library_cache.get_seq_length = count_past_tokens  # type: ignore[method-assign, assignment]
        options: dict[str, object] = {
            "past_key_values": library_cache,
            "attention_mask": mask,
            "use_cache": True,
        }
        if model.family.positions:
            options["position_ids"] = position[None].expand(ids.shape[0], -1)
        # The cache holds what the layers would project; libraries only ask whether a context is
        # there.
        empty_context = torch.zeros(ids.shape[0], 1, model.width, device=ids.device)
        logits_BTV = model.family.run_decoder(model.lm, ids, context_BNW=empty_context, **options)
        scores_BV = compute_scores(logits_BTV[:, -1], model.generation)
        new_tensors = list_cached_tensors(library_cache.self_attention_cache, self.attention_layers)
        return (scores_BV, *new_tensors)


def _find_family(model_type: str) -> DecoderFamily:
    """Find the row of the decoder inside a composite model."""
    if model_type not in DECODER_FAMILIES:
        raise ModelError(
            f"a decoder of type '{model_type}' is not supported "
            f"(known: {', '.join(DECODER_FAMILIES)})"
        )
    return DECODER_FAMILIES[model_type]


def _remove_encoder(lm: nn.Module) -> None:
    """Put an `AbsentEncoder` in the place of the library's encoder, which frees its weights."""
    if hasattr(lm, "encoder"):
        lm.encoder = AbsentEncoder()
    elif hasattr(lm, "model") and hasattr(lm.model, "encoder"):
        lm.model.encoder = AbsentEncoder()


def _find_position_limit(lm: nn.Module) -> int | None:
    """Find the tokens that the decoder's table of positions holds; some have no table."""
    limit = getattr(lm.config, "max_position_embeddings", None)
    return limit or getattr(lm.config, "max_target_positions", None)


def read_settings(
    library_model: nn.Module,
    lm: nn.Module,
    *,
    tokenizer_json: str,
    request: TextRequest,
) -> GenerationSettings:
    """Read the settings of the decode loop from the library's own configuration.

    Args:
        library_model: the model as the library loads it.
        lm: its decoder; may be the same module.
        tokenizer_json: a fast tokenizer as JSON.
        request: what the node asks for.

    Raises:
        ModelError: The configuration or the node asks for what can't be followed.
    """
    generation_config = find_generation_config(library_model, lm)
    tokens = read_special_tokens(
        library_model,
        lm,
        tokenizer_json=tokenizer_json,
        is_encoder_decoder=bool(library_model.config.is_encoder_decoder),
    )
    model_type = library_model.config.model_type
    if model_type == "whisper":
        prompt = list_whisper_start(
            generation_config,
            library_model.config,
            tokenizer_json=tokenizer_json,
            request=request,
        )
    else:
        refuse_languages(request.language, request.task, model_type=model_type)
        prompt = []
        words = tokenize_prompt(tokenizer_json, request.prompt)
        if words:
            forced_first = getattr(generation_config, "forced_bos_token_id", None)
            forced_ids = [] if forced_first is None else [int(forced_first)]
            prompt = [tokens.bos, *forced_ids, *words]
    return build_generation_settings(
        generation_config,
        tokens,
        request=request,
        prompt=prompt,
        position_limit=_find_position_limit(lm),
    )


def assemble_decoder(
    library_model: nn.Module,
    model_type: str,
    *,
    tokenizer_json: str,
    candidates: int,
    max_tokens: int,
    prompt: str = "",
    language: str = "",
    task: str = "",
) -> TextDecoder:
    """Make the decoder node of a library's model; parts that only its encoder needs are dropped.

    Args:
        library_model: the model as the library loads it; changed in place.
        model_type: a row of `DECODER_FAMILIES`.
        tokenizer_json: a fast tokenizer as JSON.
        candidates: number of texts for each input, which is the number of beams.
        max_tokens: tokens of the longest text; 0 leaves it to the checkpoint.
        prompt: what is read before a text is written; may be empty.
        language: the language of the texts, for a model that knows several.
        task: what is done with speech, for a model that knows several tasks.

    Raises:
        ModelError: if the decoder is not supported, can't write so long a text, or asks for what
            is not followed.
    """
    family = DECODER_FAMILIES[model_type]
    lm = library_model
    project: nn.Module = nn.Identity()
    if family.decoder_attribute:
        lm = getattr(library_model, family.decoder_attribute)
        project = getattr(library_model, "enc_to_dec_proj", project)
        if not family.stack:
            inner_family = _find_family(lm.config.model_type)
            family = replace(
                inner_family,
                decoder_attribute=family.decoder_attribute,
                has_encoder=family.has_encoder,
            )
    _remove_encoder(lm)
    request = TextRequest(
        candidates=candidates,
        max_tokens=max_tokens,
        prompt=prompt,
        language=language,
        task=task,
    )
    generation = read_settings(library_model, lm, tokenizer_json=tokenizer_json, request=request)
    # The part of a composite model has a configuration of its own.
    lm.config._attn_implementation = "eager"
    return TextDecoder(
        lm.eval(),
        family,
        tokenizer_json=tokenizer_json,
        generation=generation,
        project=project,
        lead=family.text_start or find_lead(tokenizer_json, prompt),
    )
