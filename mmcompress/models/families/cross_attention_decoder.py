"""Text decoders of transformers that cross-attend to another node's output, whatever their line.

Training and teacher forcing run the library's own forward. The deployed step runs it too, with every cached tensor as
an explicit input and output; cross-attention K and V are computed once a request by a graph of their own. A `Line`
says where a library keeps the parts; adding a line is adding a row to `LINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import Block
from mmcompress.models.attention import split_heads
from mmcompress.models.base import BlockShape, ExampleRequest, ExportGraph, Model
from mmcompress.models.families.decoding import (
    STEP_AXES,
    AbsentEncoder,
    arrange_by_layer,
    build_cache,
    head_width,
    library_options,
    read_generation,
)
from mmcompress.models.layouts import find_blocks, normalize_


@dataclass(frozen=True, kw_only=True)
class DecoderFamily:
    """One line of decoders in transformers.

    `stack` holds the layers, `call` runs the library's forward; `width` names the hidden size in the config,
    `positions` whether the forward takes position ids (else it counts the cache).
    """

    class_name: str
    stack: str
    run_decoder: Callable[..., Tensor]
    width: str = "hidden_size"
    positions: bool = True
    lead: str = ""
    """What a text begins with."""
    part: str = ""
    """Where a composite model keeps the decoder."""
    prepare: Callable[[Any], None] = lambda lm: None
    """Changes made to the library's model before its blocks are found."""


def _causal(lm: nn.Module, ids: Tensor, context: Tensor, **cached: Any) -> Tensor:
    return lm(input_ids=ids, encoder_hidden_states=context, **cached).logits


def _whisper(lm: Any, ids: Tensor, context: Tensor, **cached: Any) -> Tensor:
    return lm.proj_out(
        lm.model.decoder(input_ids=ids, encoder_hidden_states=context, **cached).last_hidden_state
    )


def _t5(lm: Any, ids: Tensor, context: Tensor, **cached: Any) -> Tensor:
    x = lm.decoder(input_ids=ids, encoder_hidden_states=context, **cached).last_hidden_state
    return lm.lm_head(x * lm.model_dim**-0.5 if lm.config.scale_decoder_outputs else x)


class HeadBias(nn.Module):
    """An embedding stored by head: buckets [..] -> [.., heads]."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.weight = nn.Parameter(table.detach().T.clone())
        self.bias = None

    def forward(self, buckets: Tensor) -> Tensor:
        return torch.nn.functional.embedding(buckets, self.weight.T)


def _own_bias(
    module: nn.Module, args: tuple, options: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    return args, {**options, "position_bias": None}


def _t5_prepare(lm: Any) -> None:
    """Give every layer of T5 a copy of the first one's relative position bias, so that it can lose heads alone."""
    table = lm.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    for path, module in lm.decoder.named_modules():
        if path.endswith(("SelfAttention", "EncDecAttention")):
            module.register_forward_pre_hook(_own_bias, with_kwargs=True)
        if path.endswith("SelfAttention"):
            module.has_relative_attention_bias = True
            module.relative_attention_bias = HeadBias(table)


DECODER_FAMILIES = {
    "mbart": DecoderFamily(
        class_name="AutoModelForCausalLM",
        stack="model.decoder",
        run_decoder=_causal,
        width="d_model",
        positions=False,
    ),
    "gpt2": DecoderFamily(
        class_name="AutoModelForCausalLM", stack="transformer", run_decoder=_causal
    ),
    "bert": DecoderFamily(class_name="AutoModelForCausalLM", stack="bert", run_decoder=_causal),
    "blip_text_model": DecoderFamily(
        class_name="BlipTextLMHeadModel", stack="bert", run_decoder=_causal
    ),
    "blip": DecoderFamily(
        class_name="BlipForConditionalGeneration",
        stack="bert",
        run_decoder=_causal,
        part="text_decoder",
    ),
    "vision-encoder-decoder": DecoderFamily(
        class_name="VisionEncoderDecoderModel", stack="", run_decoder=_causal, part="decoder"
    ),
    "whisper": DecoderFamily(
        class_name="WhisperForConditionalGeneration",
        stack="model.decoder",
        run_decoder=_whisper,
        width="d_model",
        lead=" ",
    ),
    "coca": DecoderFamily(class_name="", stack="layers", run_decoder=_causal),
    "t5": DecoderFamily(
        class_name="T5ForConditionalGeneration",
        stack="decoder",
        run_decoder=_t5,
        width="d_model",
        positions=False,
        prepare=_t5_prepare,
    ),
}


class TextDecoder(Model):
    """ids [b, t], context [b, n, w] -> logits [b, t, v], given the tokens before (teacher forcing)."""

    kind = "text_decoder"
    context_tokens = 64
    """Length of the context, set by the pipeline that feeds this decoder."""

    def __init__(
        self,
        lm: nn.Module,
        line: DecoderFamily,
        *,
        tokenizer_json: str,
        generation: dict[str, Any],
        project: nn.Module,
    ):
        super().__init__()
        line.prepare(lm)
        self.lm, self.line, self.project = normalize_(lm), line, project
        self.tokenizer_json, self.generation = tokenizer_json, generation
        self.blocks = find_blocks(self, f"lm.{line.stack}")
        self.layers = 1 + max(int(b.name.partition(".")[0]) for b in self.blocks)
        config: Any = lm.config
        self.vocabulary = int(config.vocab_size)
        self.width = int(getattr(config, line.width))
        self.reads = project.in_features if isinstance(project, nn.Linear) else _context_width(self)
        self.dims = {"context": self.reads}

    def cached(self, kind: str) -> list[tuple[int, Block]]:
        """(layer, block) of every attention of a kind that is left; a block's unit is one head of keys."""
        return [(int(b.name.partition(".")[0]), b) for b in self.blocks if b.kind == kind]

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """For the runtime node; `past` holds (heads, head width) of every cached tensor that is left."""
        past = [[b.units, head_width(b)] for _, b in self.cached("attention") for _ in "kv"]
        generation = {"generation": self.generation, "lead": self.line.lead}
        return {"tokenizer": "tokenizer.json", "past": past, **generation}

    def forward(self, ids: Tensor, context: Tensor) -> Tensor:
        return self.line.run_decoder(self.lm, ids, self.project(context), use_cache=False)

    def export_graphs(self) -> dict[str, ExportGraph]:
        """`context`: cross-attention K and V of all layers, once a request; `step`: new tokens, with a cache."""
        own, cross = self.cached("attention"), self.cached("cross_attention")
        past = tuple(torch.zeros(2, b.units, 3, head_width(b)) for _, b in own for _ in "kv")
        memory = tuple(torch.zeros(2, b.units, 5, head_width(b)) for _, b in cross for _ in "kv")
        named = lambda what, kind: tuple(f"{what}.{i}.{p}" for i, _ in kind for p in "kv")
        past_names, new_names, cross_names = (
            named("past", own),
            named("new", own),
            named("cross", cross),
        )
        graphs = {}
        if cross:
            dynamic = {"context": {0: "images", 1: "tokens"}} | {
                n: {0: "images", 2: "tokens"} for n in cross_names
            }
            example = torch.zeros(2, 5, self.reads)
            graphs["context"] = ExportGraph(
                module=CrossKeys(self),
                example=(example,),
                inputs=("context",),
                outputs=cross_names,
                dynamic_axes=dynamic,
            )
        dynamic = STEP_AXES | {n: {0: "batch", 2: "past"} for n in past_names}
        dynamic |= {n: {0: "batch", 2: "total"} for n in new_names}
        dynamic |= {n: {0: "images", 2: "tokens"} for n in cross_names}
        given = (torch.zeros(2, 2, dtype=torch.long), torch.arange(3, 5), torch.zeros(1, 1, 2, 5))
        names = ("ids", "position", "mask", *past_names, *cross_names)
        graphs["step"] = ExportGraph(
            module=Step(self),
            example=(*given, *past, *memory),
            inputs=names,
            outputs=("scores", *new_names),
            dynamic_axes=dynamic,
        )
        return graphs

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        keys = {"attention": round((steps + 1) / 2), "cross_attention": self.context_tokens}
        return {
            b.name: BlockShape(
                width=self.width, positions=1, keys=keys.get(b.kind, 1), batch=beams, calls=steps
            )
            for b in self.blocks
        }

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        past = max(1, round((steps - 1) / 2))
        cross = [b for _, b in self.cached("cross_attention")]
        feeds = [torch.full((beams, 1), 3), torch.tensor([past]), torch.zeros(1, 1, 1, past + 1)]
        feeds += [torch.randn(beams, h, past, d) for h, d in self.config["past"]]
        feeds += [
            torch.randn(1, b.units, self.context_tokens, head_width(b)) for b in cross for _ in "kv"
        ]
        context = (
            {"context": ExampleRequest((torch.randn(1, self.context_tokens, self.reads),), 1.0)}
            if cross
            else {}
        )
        return {**context, "step": ExampleRequest(tuple(feeds), steps)}

    @torch.inference_mode()
    def library_generate(self, context: Tensor) -> list[list[int]]:
        """All beams of one item [1, n, w] by the library's own `generate`, the best first."""
        from transformers import GenerationMixin
        from transformers.modeling_outputs import BaseModelOutput

        g, lm = self.generation, self.lm
        options = {**library_options(g), "max_length": g["max_tokens"]}
        prompt = torch.tensor([g["prompt"] or [g["bos"]]])
        if lm.config.is_encoder_decoder:
            options |= {
                "encoder_outputs": BaseModelOutput(self.project(context)),
                "decoder_input_ids": prompt,
            }
        else:
            options |= {"encoder_hidden_states": self.project(context), "input_ids": prompt}
        # Whisper and BLIP wrap it in loops of their own, over windows of sound and over pixels
        return GenerationMixin.generate(lm, **options).tolist()


def _context_width(model: TextDecoder) -> int:
    cross = next((b for b in model.blocks if b.kind == "cross_attention"), None)
    if cross is None:
        raise ModelError("this decoder has no cross-attention: it can't read another node's output")
    return model.get_linear(cross.writers[min(1, len(cross.writers) - 1)].path).in_features


class CrossKeys(nn.Module):
    """context [b, n, w] -> K and V [b, h, n, d] of every cross-attention."""

    def __init__(self, model: TextDecoder):
        super().__init__()
        self.project = model.project
        blocks = [b for _, b in model.cached("cross_attention")]
        self.units = [b.units for b in blocks]
        self.linears = nn.ModuleList(
            nn.ModuleList([model.get_linear(w.path) for w in b.writers[1:]]) for b in blocks
        )

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        x, out = self.project(context), []
        for count, linears in zip(self.units, self.linears, strict=True):
            pair = [f(x) for f in linears] if len(linears) == 2 else linears[0](x).chunk(2, -1)
            out += [split_heads(p, count) for p in pair]
        return tuple(out)


class Step(nn.Module):
    """ids [b, t], position [t], mask [1, 1, t, total], past K and V, cross K and V -> log-probabilities [b, v] after
    the last, new K and V.

    The mask is added to the scores of self-attention. Cross K and V may have batch 1: all beams of one image share
    them.
    """

    def __init__(self, model: TextDecoder):
        super().__init__()
        self.model = model
        self.own = [i for i, _ in model.cached("attention")]
        self.cross = [i for i, _ in model.cached("cross_attention")]

    def forward(
        self, ids: Tensor, position: Tensor, mask: Tensor, *cache: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers.cache_utils import EncoderDecoderCache

        m, split = self.model, 2 * len(self.own)
        past = arrange_by_layer(m.layers, self.own, tensors=cache[:split])
        memory = arrange_by_layer(m.layers, self.cross, tensors=cache[split:])
        both = EncoderDecoderCache(build_cache(past), build_cache(memory))
        both.is_updated = dict.fromkeys(range(m.layers), True)
        # some libraries count past tokens on the first layer, whose attention may be gone
        both.get_seq_length = lambda *_: position[0]  # type: ignore[method-assign, assignment]
        options: dict[str, Any] = {
            "past_key_values": both,
            "attention_mask": mask,
            "use_cache": True,
        }
        if m.line.positions:
            options["position_ids"] = position[None].expand(ids.shape[0], -1)
        # what the layers would project is in the cache; only its presence is asked for
        context = torch.zeros(ids.shape[0], 1, m.width)
        logits = m.line.run_decoder(m.lm, ids, context, **options)
        scores = torch.log_softmax(logits[:, -1].float(), -1)
        kept = [both.self_attention_cache.layers[i] for i in self.own]
        return (scores, *(x for layer in kept for x in (layer.keys, layer.values)))


def assemble_decoder(
    whole: Any, model_type: str, *, tokenizer_json: str, candidates: int, max_tokens: int
) -> TextDecoder:
    """The decoder node of a loaded library model; what only its encoder needs is let go."""
    line, lm, project = DECODER_FAMILIES[model_type], whole, nn.Identity()
    if line.part:
        lm = getattr(whole, line.part)
        project = getattr(whole, "enc_to_dec_proj", project)
        if not line.stack:
            inner = DECODER_FAMILIES.get(lm.config.model_type)
            if inner is None:
                raise ModelError(
                    f"a decoder of type '{lm.config.model_type}' is not supported (known: {', '.join(DECODER_FAMILIES)})"
                )
            line = replace(inner, part=line.part)
    if hasattr(lm, "encoder"):
        lm.encoder = AbsentEncoder()
    elif hasattr(lm, "model") and hasattr(lm.model, "encoder"):
        lm.model.encoder = AbsentEncoder()
    generation = read_generation(whole, lm, candidates=candidates, max_tokens=max_tokens)
    limit = getattr(lm.config, "max_position_embeddings", None) or getattr(
        lm.config, "max_target_positions", None
    )
    if limit and max_tokens > limit:
        raise ModelError(f"max_tokens {max_tokens} exceeds the decoder's {limit} positions")
    lm.config._attn_implementation = "eager"
    return TextDecoder(
        lm.eval(), line, tokenizer_json=tokenizer_json, generation=generation, project=project
    )
