"""Text decoders that read another node's output as a prefix of their own sequence: GIT, LLaVA and its kind.

K and V of the prefix are computed once a request by the `context` graph; the `step` graph goes on from there. Image and
text meet in every self-attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block
from mmcompress.models.base import BlockShape, ExampleRequest, ExportGraph, LoadContext, Model
from mmcompress.models.families.decoding import (
    STEP_AXES,
    AbsentEncoder,
    arrange_by_layer,
    build_cache,
    head_width,
    library_options,
    read_generation,
    tokenize_prompt,
)
from mmcompress.models.hub import POOLER, load_library_model, load_tokenizer_json
from mmcompress.models.layouts import find_blocks, normalize_
from mmcompress.runtime.beam_search import FAR

BRIDGE = "bridge."


@dataclass(frozen=True, kw_only=True)
class PrefixFamily:
    """One line of prefix decoders: how it embeds words and the prefix, runs its layers and names its parts.

    `embed(lm, ids, text positions)`, `prefix(lm, context)` -> [b, t, w]; `run(lm, x, positions in the whole sequence,
    mask, cache or None)` -> [b, t, w]; `score(lm, x)` -> logits. `open_prefix`: the prefix sees itself both ways.
    """

    class_name: str
    stack: str
    embed: Callable[[Any, Tensor, Tensor], Tensor]
    prefix: Callable[[Any, Tensor], Tensor]
    run: Callable[[Any, Tensor, Tensor, Tensor, Any], Tensor]
    score: Callable[[Any, Tensor], Tensor]
    reads: Callable[[Any], int]
    open_prefix: bool
    encoder: str
    """The library's own encoder, which is a node of its own here."""
    generate: Callable[..., Tensor]
    """(lm, context, prefix, start ids, options) -> whole sequences, by the library's `generate`."""
    bridge: str = ""
    """The projector between the two, where it has units of its own."""


def _git_run(lm: Any, x: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
    return lm.git.encoder(
        x, attention_mask=mask, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state


def _llava_run(lm: Any, x: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
    return lm.model.language_model(
        inputs_embeds=x,
        attention_mask=mask,
        position_ids=positions[None].expand(x.shape[0], -1),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def _git_generate(lm: Any, context: Tensor, prefix: Tensor, ids: Tensor, **options: Any) -> Tensor:
    lm.git.image_encoder.given_output = context  # stands in for the encoder, whatever the pixels
    return lm.generate(pixel_values=torch.zeros(1, 3, 1, 1), input_ids=ids, **options)


def _llava_generate(
    lm: Any, context: Tensor, prefix: Tensor, ids: Tensor, **options: Any
) -> Tensor:
    x = torch.cat([prefix, lm.model.language_model.embed_tokens(ids)], 1)
    new = lm.generate(inputs_embeds=x, attention_mask=torch.ones(x.shape[:2]), **options)
    return torch.cat([ids.expand(len(new), -1), new], 1)


PREFIX_FAMILIES = {
    "git": PrefixFamily(
        class_name="GitForCausalLM",
        stack="git.encoder",
        embed=lambda lm, ids, at: lm.git.embeddings(
            input_ids=ids, position_ids=at[None].expand(ids.shape[0], -1)
        ),
        prefix=lambda lm, context: lm.git.visual_projection(context),
        run=_git_run,
        score=lambda lm, x: lm.output(x),
        reads=lambda lm: int(lm.config.vision_config.hidden_size),
        open_prefix=True,
        encoder="git.image_encoder",
        generate=_git_generate,
    ),
    "llava": PrefixFamily(
        class_name="LlavaForConditionalGeneration",
        stack="model.language_model",
        embed=lambda lm, ids, at: lm.model.language_model.embed_tokens(ids),
        prefix=lambda lm, context: lm.model.multi_modal_projector(context),
        run=_llava_run,
        score=lambda lm, x: lm.lm_head(x),
        reads=lambda lm: int(lm.model.multi_modal_projector.linear_1.in_features),
        open_prefix=False,
        encoder="model.vision_tower",
        generate=_llava_generate,
        bridge="model.multi_modal_projector",
    ),
}


class PrefixDecoder(Model):
    """ids [b, t], context [b, n, w] -> logits [b, t, v], given the context and the tokens before (teacher forcing)."""

    kind = "text_decoder"
    context_tokens = 64
    """Length of the context, set by the pipeline that feeds this decoder."""

    def __init__(
        self,
        lm: nn.Module,
        line: PrefixFamily,
        *,
        tokenizer_json: str,
        generation: dict[str, Any],
        before: list[int],
    ):
        super().__init__()
        self.register_buffer("before", torch.tensor(before, dtype=torch.long), persistent=False)
        self.lm, self.line, self.tokenizer_json, self.generation = (
            lm,
            line,
            tokenizer_json,
            generation,
        )
        normalize_(lm.get_submodule(line.stack))
        stack = tuple(_meeting(b) for b in find_blocks(self, f"lm.{line.stack}"))
        self.layers = 1 + max(int(b.name.partition(".")[0]) for b in stack)
        bridge = find_blocks(self, f"lm.{line.bridge}", prefix=BRIDGE) if line.bridge else ()
        self.blocks = (*(dataclasses.replace(b, reads=("context",)) for b in bridge), *stack)
        text: Any = lm.config.get_text_config()
        self.vocabulary, self.width = int(text.vocab_size), int(text.hidden_size)
        self.dims = {"context": line.reads(lm)}

    def cached(self) -> list[tuple[int, Block]]:
        """(layer, block) of every attention that is left; a block's unit is one head of keys."""
        return [(int(b.name.partition(".")[0]), b) for b in self.blocks if b.kind == "attention"]

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        past = [[b.units, head_width(b)] for _, b in self.cached() for _ in "kv"]
        return {"tokenizer": "tokenizer.json", "generation": self.generation, "past": past}

    def prefix(self, context: Tensor) -> Tensor:
        """What comes ahead of the text [b, t + n, w]: the prompt's words before the image, and the image."""
        x = self.line.prefix(self.lm, context)
        if not len(self.before):
            return x
        words = self.line.embed(self.lm, self.before[None], torch.arange(len(self.before)))
        return torch.cat([words.expand(x.shape[0], -1, -1), x], 1)

    def forward(self, ids: Tensor, context: Tensor) -> Tensor:
        prefix = self.prefix(context)
        n, t = prefix.shape[1], ids.shape[1]
        words = self.line.embed(self.lm, ids, torch.arange(t))
        x = self.line.run(
            self.lm,
            torch.cat([prefix, words], 1),
            torch.arange(n + t),
            self._mask(ids, n, total=n + t),
            None,
        )
        return self.line.score(self.lm, x[:, n:])

    def _mask(self, like: Tensor, prefix: int, *, total: int) -> Tensor:
        at = torch.arange(total)
        hidden = at[None] > at[:, None]
        if self.line.open_prefix:
            hidden = hidden & (at[None] >= prefix)
        return (hidden[None, None] * FAR).expand(like.shape[0], 1, -1, -1)

    def export_graphs(self) -> dict[str, ExportGraph]:
        """`context`: K and V of the prefix, once a request; `step`: new tokens, with a cache that starts there."""
        own = self.cached()
        names = lambda what: tuple(f"{what}.{i}.{p}" for i, _ in own for p in "kv")
        past = tuple(torch.zeros(2, b.units, 8, head_width(b)) for _, b in own for _ in "kv")
        dynamic = {"context": {0: "images", 1: "tokens"}} | {
            n: {0: "images", 2: "tokens"} for n in names("past")
        }
        example = torch.zeros(2, 5, self.dims["context"])
        context = ExportGraph(
            module=Prefill(self),
            example=(example,),
            inputs=("context",),
            outputs=names("past"),
            dynamic_axes=dynamic,
        )
        dynamic = STEP_AXES | {n: {0: "batch", 2: "past"} for n in names("past")}
        dynamic |= {n: {0: "batch", 2: "total"} for n in names("new")}
        inputs = (
            torch.zeros(2, 2, dtype=torch.long),
            torch.arange(3, 5),
            torch.zeros(1, 1, 2, 10),
            *past,
        )
        given = ("ids", "position", "mask", *names("past"))
        step = ExportGraph(
            module=Step(self),
            example=inputs,
            inputs=given,
            outputs=("scores", *names("new")),
            dynamic_axes=dynamic,
        )
        return {"context": context, "step": step}

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        n = self.context_tokens + len(self.before)
        keys = n + round((steps + 1) / 2)
        loop = lambda b: BlockShape(
            width=self.width,
            positions=1,
            keys=keys if b.group == "heads" else 1,
            batch=beams,
            calls=steps,
            prefill=n,
        )
        return {
            b.name: BlockShape(width=self.width, positions=n, keys=n, batch=1)
            if b.name.startswith(BRIDGE)
            else loop(b)
            for b in self.blocks
        }

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        text = max(1, round((steps - 1) / 2))
        ahead = self.context_tokens + len(self.before)
        feeds = [
            torch.full((beams, 1), 3),
            torch.tensor([text]),
            torch.zeros(1, 1, 1, ahead + text + 1),
        ]
        feeds += [torch.randn(beams, h, ahead + text, d) for h, d in self.config["past"]]
        example = torch.randn(1, self.context_tokens, self.dims["context"])
        context = {"context": ExampleRequest((example,), 1.0)}
        return {**context, "step": ExampleRequest(tuple(feeds), steps)}

    @torch.inference_mode()
    def library_generate(self, context: Tensor) -> list[list[int]]:
        """All beams of one item [1, n, w] by the library's own `generate`, its encoder's output given."""
        g = self.generation
        start = g["prompt"] or [g["bos"]]
        options = {**library_options(g), "max_new_tokens": g["max_tokens"] - len(start)}
        given = (context, self.prefix(context), torch.tensor([start]))
        return self.line.generate(self.lm, *given, **options).tolist()


def _meeting(block: Block) -> Block:
    """Both modalities meet in every attention; the first one always stays, for the prefix is read by nothing else."""
    if block.group != "heads":
        return block
    drop = () if block.name.startswith("0.") else block.drop
    return dataclasses.replace(block, reads=("stream", "context"), drop=drop)


class Prefill(nn.Module):
    """context [b, n, w] -> K and V [b, h, n, d] of every attention over the prefix."""

    def __init__(self, model: PrefixDecoder):
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        m = self.model
        x = m.prefix(context)
        cache = build_cache([None] * m.layers)
        n = x.shape[1]
        m.line.run(m.lm, x, torch.arange(n), m._mask(x, n, total=n), cache)
        return tuple(
            t for i, _ in m.cached() for t in (cache.layers[i].keys, cache.layers[i].values)
        )


class Step(nn.Module):
    """ids [b, t], position [t] in the text, mask [1, 1, t, total], past K and V -> log-probabilities [b, v] after the
    last, new K and V."""

    def __init__(self, model: PrefixDecoder):
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, position: Tensor, mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        m = self.model
        own = [i for i, _ in m.cached()]
        before = past[0].shape[2]
        cache = build_cache(arrange_by_layer(m.layers, own, tensors=past))
        cache.get_seq_length = lambda *_: before
        at = torch.arange(ids.shape[1]) + before
        x = m.line.run(m.lm, m.line.embed(m.lm, ids, position), at, mask, cache)
        scores = torch.log_softmax(m.line.score(m.lm, x[:, -1]).float(), -1)
        return (scores, *(t for i in own for t in (cache.layers[i].keys, cache.layers[i].values)))


IMAGE = "<image>"
"""Where the image stands in a prompt."""


def assemble_prefix_decoder(
    whole: Any,
    model_type: str,
    tokenizer_json: str,
    candidates: int,
    max_tokens: int,
    prompt: str = "",
) -> PrefixDecoder:
    """The decoder node of a loaded library model; its encoder is let go. Raises `ModelError`."""
    line, g = (
        PREFIX_FAMILIES[model_type],
        read_generation(whole, whole, candidates=candidates, max_tokens=max_tokens),
    )
    words = lambda text: tokenize_prompt(tokenizer_json, text, most=max_tokens)
    ahead, image, behind = prompt.partition(IMAGE)
    if not image:
        ahead, behind = "", prompt
    if ahead and line.open_prefix:
        raise ModelError(f"prompt: a model of type '{model_type}' reads the image before all words")
    before = [g["bos"], *words(ahead)] if image and not line.open_prefix else []
    after = words(behind)
    g["prompt"] = after if before else [g["bos"], *after] if after else []
    whole.set_submodule(line.encoder, AbsentEncoder())
    return PrefixDecoder(
        whole.eval(), line, tokenizer_json=tokenizer_json, generation=g, before=before
    )


def load_prefix_decoder(context: LoadContext, config: Any) -> Model:
    """The decoder of a transformers folder or hub id. Raises `ModelError`."""
    whole = load_library_model(
        context, PREFIX_FAMILIES[config.model_type].class_name, config=config, unread=POOLER
    )
    limits = (context.candidates, context.max_tokens or 20, context.prompt)
    return assemble_prefix_decoder(whole, config.model_type, load_tokenizer_json(context), *limits)
