"""Text decoders that read another node's output as a prefix of their text: GIT, LLaVA and others.

The `context` graph computes keys and values of the prefix once a request; the `step` graph goes on
from there. Image and text meet in every self-attention. A new family is a new row of
`PREFIX_FAMILIES`.

Shapes in this file:
    B  batch
    T  text tokens
    P  prefix tokens
    S  tokens that the layers read in one call: P + T, or those of a decode step
    V  vocabulary
    N  context tokens
    W  width
    H  heads
    D  width of one head
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block
from mmcompress.models.base import BlockShape, ExampleRequest, ExportGraph, LoadContext, Model
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
    SpecialTokens,
    TextRequest,
    build_generation_settings,
    find_generation_config,
    load_plain_tokenizer,
    make_generate_options,
    read_special_tokens,
    refuse_languages,
)
from mmcompress.models.hub import POOLER, load_library_model
from mmcompress.models.layouts import find_blocks, normalize_
from mmcompress.models.tokenizer_files import load_tokenizer_json
from mmcompress.runtime.beam_search import MASKED_SCORE
from mmcompress.runtime.token_scores import ALL_SCORES

PROJECTOR_PREFIX = "bridge."
"""Start of the names of a projector's blocks; structures and bundles store it."""
IMAGE_PLACEHOLDER = "<image>"
"""Where the image stands in a prompt."""


def embed_git_words(lm: nn.Module, ids_BT: Tensor, *, positions_T: Tensor) -> Tensor:
    """Embed words as GIT does: [B, T, W]. Positions count the text alone."""
    positions_BT = positions_T[None].expand(ids_BT.shape[0], -1)
    return lm.git.embeddings(input_ids=ids_BT, position_ids=positions_BT)


def embed_llava_words(lm: nn.Module, ids_BT: Tensor, *, positions_T: Tensor) -> Tensor:
    """Embed words as LLaVA does: [B, T, W]. They hold no positions: the layers rotate them in."""
    return lm.model.language_model.embed_tokens(ids_BT)


def project_git_context(lm: nn.Module, context_BNW: Tensor) -> Tensor:
    """Bring image tokens to the width of GIT's layers."""
    return lm.git.visual_projection(context_BNW)


def project_llava_context(lm: nn.Module, context_BNW: Tensor) -> Tensor:
    """Bring image tokens to the width of LLaVA's layers."""
    return lm.model.multi_modal_projector(context_BNW)


def run_git_layers(
    lm: nn.Module,
    x_BSW: Tensor,
    *,
    positions_S: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
) -> Tensor:
    """Run GIT's layers: [B, S, W]. They need no positions: the word embeddings hold them."""
    outputs = lm.git.encoder(
        x_BSW, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
    )
    return outputs.last_hidden_state


def run_llava_layers(
    lm: nn.Module,
    x_BSW: Tensor,
    *,
    positions_S: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
) -> Tensor:
    """Run the layers of LLaVA's language model: [B, S, W]."""
    outputs = lm.model.language_model(
        inputs_embeds=x_BSW,
        attention_mask=mask,
        position_ids=positions_S[None].expand(x_BSW.shape[0], -1),
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return outputs.last_hidden_state


def compute_git_logits(lm: nn.Module, x_BTW: Tensor) -> Tensor:
    """Compute logits [B, T, V] with GIT's head."""
    return lm.output(x_BTW)


def compute_llava_logits(lm: nn.Module, x_BTW: Tensor) -> Tensor:
    """Compute logits [B, T, V] with LLaVA's head."""
    return lm.lm_head(x_BTW)


def read_git_context_width(lm: nn.Module) -> int:
    """Read the width of the image tokens that GIT takes."""
    return int(lm.config.vision_config.hidden_size)


def read_llava_context_width(lm: nn.Module) -> int:
    """Read the width of the image tokens that LLaVA's projector takes."""
    return int(lm.model.multi_modal_projector.linear_1.in_features)


def generate_with_git(
    lm: nn.Module,
    context_BNW: Tensor,
    *,
    prefix_BPW: Tensor,
    ids_before_T: Tensor,
    ids_BT: Tensor,
    options: dict[str, object],
) -> Tensor:
    """Generate with GIT's own `generate`; returns whole sequences of ids."""
    # The stand-in for the encoder returns the context, whatever the pixels are.
    lm.git.image_encoder.fixed_output = context_BNW
    return lm.generate(pixel_values=torch.zeros(1, 3, 1, 1), input_ids=ids_BT, **options)


def generate_with_llava(
    lm: nn.Module,
    context_BNW: Tensor,
    *,
    prefix_BPW: Tensor,
    ids_before_T: Tensor,
    ids_BT: Tensor,
    options: dict[str, object],
) -> Tensor:
    """Generate with LLaVA's own `generate`; returns sequences of ids from the image on.

    It reads embeddings, with the ids of all words and of the image beside them: rules against
    repetition look at those.
    """
    words_BTW = lm.model.language_model.embed_tokens(ids_BT)
    x_BSW = torch.cat([prefix_BPW, words_BTW], 1)
    ids_of_image_BN = torch.full(context_BNW.shape[:2], lm.config.image_token_id)
    ids_BS = torch.cat([ids_before_T[None], ids_of_image_BN, ids_BT], 1)
    # Lengths count words here, those of the library the image as well.
    shortest = cast(int, options.pop("min_length")) - ids_BT.shape[1]
    options["min_new_tokens"] = max(0, shortest)
    # Embeddings stand for the first step alone; later steps need the cache.
    options["use_cache"] = True
    sequences = lm.generate(
        input_ids=ids_BS,
        inputs_embeds=x_BSW,
        attention_mask=torch.ones(x_BSW.shape[:2]),
        **options,
    )
    return sequences[:, ids_BS.shape[1] - ids_BT.shape[1] :]


@dataclass(frozen=True, kw_only=True)
class PrefixFamily:
    """Say where transformers keeps the parts of a family of prefix decoders, and how to run them.

    `lm` is always the library's model.
    """

    class_name: str
    """Class of transformers that loads the weights."""
    stack: str
    """Path of the module that holds the layers."""
    embed_words: Callable[..., Tensor]
    """Called with (lm, ids [B, T], positions_T=positions in the text); returns [B, T, W]."""
    project_context: Callable[[nn.Module, Tensor], Tensor]
    """Called with (lm, context [B, N, W of the encoder]); returns [B, N, W of the layers]."""
    run_layers: Callable[..., Tensor]
    """Called with (lm, x [B, S, W], positions_S=, mask=, cache=); returns [B, S, W]."""
    compute_logits: Callable[[nn.Module, Tensor], Tensor]
    """Called with (lm, x [B, T, W]); returns logits [B, T, V]."""
    read_context_width: Callable[[nn.Module], int]
    """Called with (lm); returns the width of the encoder's tokens."""
    bidirectional_prefix: bool
    """Whether every token of the prefix sees the whole prefix."""
    encoder: str
    """Path of the library's own encoder, which is a node of its own here."""
    run_generate: Callable[..., Tensor]
    """Called with (lm, context, prefix_BPW=, ids_before_T=, ids_BT=, options=); returns texts."""
    projector: str = ""
    """Path of the projector between encoder and layers; empty if it has no units to cut."""


PREFIX_FAMILIES = {
    "git": PrefixFamily(
        class_name="GitForCausalLM",
        stack="git.encoder",
        embed_words=embed_git_words,
        project_context=project_git_context,
        run_layers=run_git_layers,
        compute_logits=compute_git_logits,
        read_context_width=read_git_context_width,
        bidirectional_prefix=True,
        encoder="git.image_encoder",
        run_generate=generate_with_git,
    ),
    "llava": PrefixFamily(
        class_name="LlavaForConditionalGeneration",
        stack="model.language_model",
        embed_words=embed_llava_words,
        project_context=project_llava_context,
        run_layers=run_llava_layers,
        compute_logits=compute_llava_logits,
        read_context_width=read_llava_context_width,
        bidirectional_prefix=False,
        encoder="model.vision_tower",
        run_generate=generate_with_llava,
        projector="model.multi_modal_projector",
    ),
}
"""Rows by `model_type` of the library's configuration; to add a family, copy a row."""


class PrefixDecoder(Model):
    """Decode text that reads the tokens of another node ahead of its own.

    `forward` takes ids [B, T] and context [B, N, W]. It returns logits [B, T, V], each from the
    context and the tokens before it (teacher forcing).

    Args:
        lm: the library's model without its encoder; its layers are normalized in place.
        family: where the library keeps its parts.
        tokenizer_json: a fast tokenizer as JSON.
        generation: settings of the decode loop.
        ids_before_image: token ids of the prompt that stand before the image; may be empty.
        lead: stands between the prompt and the first word of a text.
    """

    kind = "text_decoder"
    has_own_encoder = True
    context_tokens = 64
    """Length of the context in tokens; the pipeline that feeds this decoder sets it."""

    def __init__(
        self,
        lm: nn.Module,
        family: PrefixFamily,
        *,
        tokenizer_json: str,
        generation: GenerationSettings,
        ids_before_image: list[int],
        lead: str = "",
    ):
        super().__init__()
        self.lead = lead
        # Not persistent: the prompt belongs to the spec, not to the weights.
        buffer = torch.tensor(ids_before_image, dtype=torch.long)
        self.register_buffer("ids_before_image", buffer, persistent=False)
        self.lm = lm
        self.family = family
        self.tokenizer_json = tokenizer_json
        self.generation = generation
        normalize_(lm.get_submodule(family.stack))
        layer_blocks = [_connect_block(block) for block in find_blocks(self, f"lm.{family.stack}")]
        self.layer_count = count_layers(layer_blocks)
        self.blocks = (*self._find_projector_blocks(), *layer_blocks)
        text_config = lm.config.get_text_config()
        self.vocabulary = int(text_config.vocab_size)
        self.width = int(text_config.hidden_size)
        self.dims = {"context": family.read_context_width(lm)}

    def _find_projector_blocks(self) -> list[Block]:
        """Find the blocks of the projector; they see the context alone."""
        if not self.family.projector:
            return []
        path = f"lm.{self.family.projector}"
        blocks = find_blocks(self, path, prefix=PROJECTOR_PREFIX)
        return [dataclasses.replace(block, reads=("context",)) for block in blocks]

    def list_attentions(self) -> list[Block]:
        """List the attentions that are left; one unit of a block is one head of keys."""
        return [block for block in self.blocks if block.kind == "attention"]

    @property
    def config(self) -> dict[str, object]:  # type: ignore[override]
        """Describe the decoder for the runtime node.

        `past` holds [heads, head width] of every cached key and value.
        """
        return {
            "tokenizer": "tokenizer.json",
            "generation": self.generation,
            "past": list_cache_shapes(self.list_attentions()),
            "lead": self.lead,
        }

    @property
    def prompt_length_before_image(self) -> int:
        """Tokens of the prompt that stand before the image."""
        return len(self.ids_before_image)

    def embed_prefix(self, context_BNW: Tensor) -> Tensor:
        """Embed the prefix [B, P, W]: words of the prompt before the image, then the image."""
        image_BNW = self.family.project_context(self.lm, context_BNW)
        if self.prompt_length_before_image == 0:
            return image_BNW
        words_1TW = self.family.embed_words(
            self.lm,
            self.ids_before_image[None],
            positions_T=torch.arange(
                self.prompt_length_before_image, device=self.ids_before_image.device
            ),
        )
        words_BTW = words_1TW.expand(image_BNW.shape[0], -1, -1)
        return torch.cat([words_BTW, image_BNW], 1)

    def forward(self, ids: Tensor, context: Tensor) -> Tensor:
        prefix_BPW = self.embed_prefix(context)
        prefix_length = prefix_BPW.shape[1]
        text_length = ids.shape[1]
        total = prefix_length + text_length
        positions_T = torch.arange(text_length, device=ids.device)
        words_BTW = self.family.embed_words(self.lm, ids, positions_T=positions_T)
        x_BSW = self.family.run_layers(
            self.lm,
            torch.cat([prefix_BPW, words_BTW], 1),
            positions_S=torch.arange(total, device=ids.device),
            mask=self.make_mask(
                ids.shape[0], total, prefix_length=prefix_length, device=ids.device
            ),
            cache=None,
        )
        return self.family.compute_logits(self.lm, x_BSW[:, prefix_length:])

    def make_mask(
        self, batch: int, total: int, *, prefix_length: int, device: torch.device
    ) -> Tensor:
        """Make the mask [B, 1, S, S] that is added to scores: a token sees what comes before it.

        Args:
            batch: B.
            total: S, tokens of prefix and text together.
            prefix_length: P; if the family's prefix is bidirectional, all tokens see all of it.
            device: Where the mask is needed.
        """
        positions_S = torch.arange(total, device=device)
        is_hidden_SS = positions_S[None] > positions_S[:, None]
        if self.family.bidirectional_prefix:
            is_hidden_SS = is_hidden_SS & (positions_S[None] >= prefix_length)
        return (is_hidden_SS[None, None] * MASKED_SCORE).expand(batch, 1, -1, -1)

    def export_graphs(self) -> dict[str, ExportGraph]:
        """Describe the two graphs.

        `context` computes keys and values of the prefix once a request. `step` reads new tokens and
        a cache that starts with them.
        """
        return {
            "context": self._describe_context_graph(),
            "step": self._describe_step_graph(),
        }

    def _describe_context_graph(self) -> ExportGraph:
        """Describe the graph that computes keys and values of the prefix."""
        names = name_cache_tensors("past", self.list_attentions())
        dynamic_axes = {"context": {0: "images", 1: "tokens"}}
        for name in names:
            dynamic_axes[name] = {0: "images", 2: "tokens"}
        return ExportGraph(
            module=Prefill(self),
            example=(torch.zeros(2, 5, self.dims["context"]),),
            inputs=("context",),
            outputs=names,
            dynamic_axes=dynamic_axes,
        )

    def _describe_step_graph(self) -> ExportGraph:
        """Describe the graph of a decode step: two beams, two new tokens, eight in the cache."""
        attentions = self.list_attentions()
        past_names = name_cache_tensors("past", attentions)
        new_names = name_cache_tensors("new", attentions)
        dynamic_axes = dict(STEP_AXES)
        for name in past_names:
            dynamic_axes[name] = {0: "batch", 2: "past"}
        for name in new_names:
            dynamic_axes[name] = {0: "batch", 2: "total"}
        # A size of 1 would become a constant of the traced graph.
        ids = torch.zeros(2, 2, dtype=torch.long)
        position = torch.arange(3, 5)
        mask = torch.zeros(1, 1, 2, 10)
        past = make_zero_cache(attentions, batch=2, length=8)
        return ExportGraph(
            module=Step(self),
            example=(ids, position, mask, *past),
            inputs=("ids", "position", "mask", *past_names),
            outputs=(ALL_SCORES, *new_names),
            dynamic_axes=dynamic_axes,
            best_tokens=count_best_tokens(self.generation),
        )

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Describe the shape of every block.

        The projector runs once a request; the layers run once over the prefix and in every step.
        """
        prefix_length = self.context_tokens + self.prompt_length_before_image
        key_count = prefix_length + round((steps + 1) / 2)
        shapes = {}
        for block in self.blocks:
            if block.name.startswith(PROJECTOR_PREFIX):
                shapes[block.name] = BlockShape(
                    width=self.width, positions=prefix_length, keys=prefix_length, batch=1
                )
                continue
            shapes[block.name] = BlockShape(
                width=self.width,
                positions=1,
                keys=key_count if block.group == "heads" else 1,
                batch=beams,
                calls=steps,
                prefill=prefix_length,
            )
        return shapes

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        """Make inputs of each graph in the middle of a text, and count its calls in a request."""
        text_length = max(1, round((steps - 1) / 2))
        prefix_length = self.context_tokens + self.prompt_length_before_image
        inputs = [
            torch.full((beams, 1), EXAMPLE_TOKEN),
            torch.tensor([text_length]),
            torch.zeros(1, 1, 1, prefix_length + text_length + 1),
        ]
        for heads, head_width in list_cache_shapes(self.list_attentions()):
            inputs.append(torch.randn(beams, heads, prefix_length + text_length, head_width))
        context = torch.randn(1, self.context_tokens, self.dims["context"])
        return {
            "context": ExampleRequest((context,), 1.0),
            "step": ExampleRequest(tuple(inputs), steps),
        }

    @torch.inference_mode()
    def generate_with_library(self, context: Tensor) -> list[list[int]]:
        """Generate with the library's own `generate`.

        Args:
            context: one item, [1, N, W].

        Returns:
            Token ids of all beams, the best first.
        """
        settings = self.generation
        start_ids = settings["prompt"] or [settings["bos"]]
        options = make_generate_options(settings)
        # The prefix has no token ids, so only the number of new tokens can be limited.
        options["max_new_tokens"] = settings["max_tokens"] - len(start_ids)
        sequences = self.family.run_generate(
            self.lm,
            context,
            prefix_BPW=self.embed_prefix(context),
            ids_before_T=self.ids_before_image,
            ids_BT=torch.tensor([start_ids]),
            options=options,
        )
        return sequences.tolist()


def _connect_block(block: Block) -> Block:
    """Note that image and text meet in an attention, and that the first one can't be removed whole.

    Only the first attention reads the prefix as it comes in.
    """
    if block.group != "heads":
        return block
    drop = () if get_layer_index(block) == 0 else block.drop
    return dataclasses.replace(block, reads=("stream", "context"), drop=drop)


class Prefill(nn.Module):
    """Compute keys and values [B, H, P, D] of the prefix in every attention.

    Input: the context [B, N, W].
    """

    def __init__(self, model: PrefixDecoder):
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        prefix_BPW = model.embed_prefix(context)
        length = prefix_BPW.shape[1]
        cache = build_cache([None] * model.layer_count)
        model.family.run_layers(
            model.lm,
            prefix_BPW,
            positions_S=torch.arange(length, device=context.device),
            mask=model.make_mask(
                prefix_BPW.shape[0], length, prefix_length=length, device=context.device
            ),
            cache=cache,
        )
        layers = [get_layer_index(block) for block in model.list_attentions()]
        return tuple(list_cached_tensors(cache, layers))


class Step(nn.Module):
    """Run one decode step of a `PrefixDecoder` with an explicit cache.

    Inputs: ids [B, T], position [T] in the text, mask [1, 1, T, total]. Then come keys and values
    of the past tokens, [B, H, total - T, D] each.

    Outputs: log-probabilities [B, V] after the last token, then the new keys and values.
    """

    def __init__(self, model: PrefixDecoder):
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, position: Tensor, mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        model = self.model
        family = model.family
        layers = [get_layer_index(block) for block in model.list_attentions()]
        past_length = past[0].shape[2]
        cache = build_cache(arrange_cache_by_layer(model.layer_count, layers, tensors=past))

        def count_past_tokens(*_: object) -> int:
            return past_length

        # Libraries count past tokens on the first layer, whose attention may be gone.
        cache.get_seq_length = count_past_tokens  # type: ignore[method-assign, assignment]
        positions_S = torch.arange(ids.shape[1], device=ids.device) + past_length
        words_BSW = family.embed_words(model.lm, ids, positions_T=position)
        x_BSW = family.run_layers(
            model.lm, words_BSW, positions_S=positions_S, mask=mask, cache=cache
        )
        logits_BV = family.compute_logits(model.lm, x_BSW[:, -1])
        scores_BV = compute_scores(logits_BV, model.generation)
        return (scores_BV, *list_cached_tensors(cache, layers))


def assemble_prefix_decoder(
    library_model: nn.Module,
    model_type: str,
    *,
    tokenizer_json: str,
    candidates: int,
    max_tokens: int,
    prompt: str = "",
) -> PrefixDecoder:
    """Make the decoder node of a library's model; its encoder is dropped.

    A prompt may hold `<image>`. The words before it become part of the prefix, those after it start
    the text.

    Args:
        library_model: the model as the library loads it; changed in place.
        model_type: a row of `PREFIX_FAMILIES`.
        tokenizer_json: a fast tokenizer as JSON.
        candidates: number of texts for each input, which is the number of beams.
        max_tokens: tokens of the longest text, the prompt included; 0 leaves it to the checkpoint.
        prompt: what every text starts with; may be empty.

    Raises:
        ModelError: if the prompt is too long, or names words before the image where the family
            reads none there.
    """
    family = PREFIX_FAMILIES[model_type]
    request = TextRequest(candidates=candidates, max_tokens=max_tokens, prompt=prompt)
    generation_config = find_generation_config(library_model, library_model)
    tokens = read_special_tokens(
        library_model, library_model, tokenizer_json=tokenizer_json, is_encoder_decoder=False
    )
    parts = _split_prompt(prompt, tokenizer_json=tokenizer_json, tokens=tokens, family=family)
    if parts.before_image and family.bidirectional_prefix:
        raise ModelError(f"prompt: a model of type '{model_type}' reads the image before all words")
    history: list[int] = []
    if not family.bidirectional_prefix:
        generation_config = _leave_out_lengths(generation_config, request)
        history = _list_history(library_model, generation_config, before_image=parts.before_image)
    settings = build_generation_settings(
        generation_config,
        tokens,
        request=request,
        prompt=parts.behind_image,
        position_limit=getattr(library_model.config, "max_position_embeddings", None),
        history=history,
    )
    library_model.set_submodule(family.encoder, AbsentEncoder())
    return PrefixDecoder(
        library_model.eval(),
        family,
        tokenizer_json=tokenizer_json,
        generation=settings,
        ids_before_image=parts.before_image,
        lead=find_lead(tokenizer_json, prompt),
    )


@dataclass(frozen=True, kw_only=True)
class _PromptParts:
    """Token ids of a prompt, start token included."""

    before_image: list[int]
    """Those ahead of the image; none: the image comes first."""
    behind_image: list[int]
    """Those that the text starts with; none: the start token alone."""


def _split_prompt(
    prompt: str, *, tokenizer_json: str, tokens: SpecialTokens, family: PrefixFamily
) -> _PromptParts:
    """Split a prompt where its image stands; without a place for it, the image comes first.

    A prompt with `<image>` is tokenized as the library does, with what its tokenizer puts ahead.

    Raises:
        ModelError: The prompt names several images, or no word behind its image.
    """
    if IMAGE_PLACEHOLDER not in prompt:
        words = tokenize_prompt(tokenizer_json, prompt)
        return _PromptParts(before_image=[], behind_image=[tokens.bos, *words] if words else [])
    if prompt.count(IMAGE_PLACEHOLDER) > 1:
        raise ModelError(f"prompt: {IMAGE_PLACEHOLDER} stands there twice; a node reads one image")
    tokenizer = load_plain_tokenizer(tokenizer_json)
    image_id = tokenizer.token_to_id(IMAGE_PLACEHOLDER)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if image_id in ids:
        place = ids.index(image_id)
        ids_before = ids[:place]
        ids_behind = ids[place + 1 :]
    else:
        text_before, _, text_behind = prompt.partition(IMAGE_PLACEHOLDER)
        ids_before = tokenize_prompt(tokenizer_json, text_before)
        ids_behind = tokenize_prompt(tokenizer_json, text_behind)
    if family.bidirectional_prefix:
        return _PromptParts(before_image=ids_before, behind_image=[tokens.bos, *ids_behind])
    if not ids_behind:
        raise ModelError(
            f"prompt: {prompt!r}: a word must stand behind {IMAGE_PLACEHOLDER}, as in "
            "'USER: <image> ASSISTANT:'"
        )
    start = _list_leading_specials(tokenizer)
    return _PromptParts(before_image=[*start, *ids_before], behind_image=ids_behind)


def _list_leading_specials(tokenizer: Tokenizer) -> list[int]:
    """List the special tokens that a tokenizer puts ahead of every text."""
    encoding = tokenizer.encode("a")
    ids: list[int] = []
    for token, is_special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not is_special:
            break
        ids.append(token)
    return ids


def _leave_out_lengths(generation_config: Any, request: TextRequest) -> Any:
    """Return a generation configuration for texts whose image has ids among those of the words.

    The library counts the image in lengths. How long it is, only the pipeline tells.

    Raises:
        ModelError: The configuration limits lengths in a way that depends on the image.
    """
    if getattr(generation_config, "min_length", None) and not generation_config.min_new_tokens:
        raise ModelError(
            f"min_length: {generation_config.min_length}: the library counts the image as well; "
            "name min_new_tokens in generation_config.json"
        )
    has_total = generation_config.max_length and not generation_config.max_new_tokens
    if has_total and not request.max_tokens:
        raise ModelError(
            f"max_length: {generation_config.max_length}: the library counts the image as well; "
            "give the node a `max_tokens`"
        )
    counted_config = copy.deepcopy(generation_config)
    # A text with an image never starts with one token alone, so the library forces none.
    counted_config.forced_bos_token_id = None
    return counted_config


def _list_history(
    library_model: nn.Module, generation_config: Any, *, before_image: list[int]
) -> list[int]:
    """List the ids ahead of a text that rules against repetition look at.

    The image has one id, many times over; as often as the longest span counts is enough.
    """
    span = getattr(generation_config, "no_repeat_ngram_size", None) or 0
    words = getattr(generation_config, "bad_words_ids", None) or []
    longest = max([1, span, *(len(word) for word in words)])
    return [*before_image, *[int(library_model.config.image_token_id)] * longest]


def load_prefix_decoder(context: LoadContext, config: PretrainedConfig) -> Model:
    """Load the decoder of a transformers folder or hub id.

    Raises:
        ModelError: if the weights can't be loaded or the prompt does not fit.
    """
    refuse_languages(context.language, context.task, model_type=config.model_type)
    class_name = PREFIX_FAMILIES[config.model_type].class_name
    library_model = load_library_model(context, class_name, config=config, unread=POOLER)
    return assemble_prefix_decoder(
        library_model,
        config.model_type,
        tokenizer_json=load_tokenizer_json(context),
        candidates=context.candidates,
        max_tokens=context.max_tokens,
        prompt=context.prompt,
    )
