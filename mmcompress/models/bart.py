"""Decoders of the BART line in transformers with cross-attention (mBART, the decoder of Donut).

Training and teacher forcing run the library's own forward; the deployed step graph below is ours, made of the
library's modules, and is proved equal to it token for token.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.errors import MissingPackage, ModelError
from mmcompress.models.base import Constant, Graph, LoadContext, Model, Shape, attend, heads, merge
from mmcompress.models.open_clip import tokenizer_of
from mmcompress.records import Block

SUPPORTED = ("mbart",)


class TextDecoder(Model):
    """ids [b, t], context [b, n, w] -> logits [b, t, v], given the tokens before (teacher forcing)."""

    kind = "text_decoder"

    def __init__(self, lm: nn.Module, tokenizer_json: str, candidates: int, max_tokens: int):
        super().__init__()
        self.lm = lm
        c = lm.config
        self.decoder = lm.model.decoder
        if max_tokens > c.max_position_embeddings:
            raise ModelError(f"max_tokens {max_tokens} exceeds the decoder's {c.max_position_embeddings} positions")
        self.width, self.max_tokens = int(c.d_model), max_tokens
        self.tokenizer_json = tokenizer_json
        found = []
        for i in range(len(self.decoder.layers)):
            for name, module, reads in (
                ("attention", "self_attn", ("stream",)),
                ("cross_attention", "encoder_attn", ("stream", "context")),
            ):
                at = f"lm.model.decoder.layers.{i}.{module}"
                a = self.get_submodule(at)
                writers = tuple((f"{at}.{p}_proj", 1) for p in "qkv")
                found.append(
                    Block(
                        f"{i}.{name}",
                        name,
                        f"{at}.out_proj",
                        writers,
                        a.num_heads,
                        a.head_dim,
                        1,
                        at,
                        reads,
                        ((at, "pair"),),
                    )
                )
            at = f"lm.model.decoder.layers.{i}"
            found.append(
                Block(
                    f"{i}.ffn",
                    "ffn",
                    f"{at}.fc2",
                    ((f"{at}.fc1", 1),),
                    int(c.decoder_ffn_dim),
                    1,
                    16,
                    at,
                    ("stream",),
                    ((f"{at}.fc1", "skip"), (f"{at}.fc2", "plain")),
                )
            )
        self.blocks = tuple(found)
        self.dims = {"context": self.width}
        self.generation: dict[str, Any] = {
            "bos": c.bos_token_id,
            "eos": c.eos_token_id,
            "pad": c.pad_token_id,
            "beams": candidates,
            "max_tokens": max_tokens,
            "prompt": [],
            "early_stopping": False,
        }

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """For the runtime node; `past` holds (heads, head width) of every cached tensor that is left."""
        own = [a for a, _ in self.attentions() if a is not None]
        past = [[a.num_heads, a.head_dim] for a in own for _ in "kv"]
        return {"tokenizer": "tokenizer.json", "generation": self.generation, "past": past}

    @property
    def pad(self) -> int:
        return int(self.lm.config.pad_token_id)

    def forward(self, ids: Tensor, context: Tensor) -> Tensor:
        return self.lm(input_ids=ids, encoder_hidden_states=context, use_cache=False).logits

    def attentions(self) -> list[tuple[Any, Any]]:
        """(self, cross) attention modules whose K and V are cached, layer by layer; removed ones left out as None."""
        keep = lambda m: None if isinstance(m, Constant) else m
        return [(keep(x.self_attn), keep(x.encoder_attn)) for x in self.decoder.layers]

    def graphs(self) -> dict[str, Graph]:
        """`context`: cross-attention K and V of all layers, once a request; `step`: new tokens, with a cache."""
        pairs = self.attentions()
        own = [(i, a) for i, (a, _) in enumerate(pairs) if a is not None]
        cross = [(i, a) for i, (_, a) in enumerate(pairs) if a is not None]
        past = tuple(torch.zeros(2, a.num_heads, 3, a.head_dim) for _, a in own for _ in "kv")
        memory = tuple(torch.zeros(2, a.num_heads, 5, a.head_dim) for _, a in cross for _ in "kv")
        past_names = tuple(f"past.{i}.{p}" for i, _ in own for p in "kv")
        cross_names = tuple(f"cross.{i}.{p}" for i, _ in cross for p in "kv")
        new_names = tuple(f"new.{i}.{p}" for i, _ in own for p in "kv")
        graphs = {}
        if cross:
            dynamic = {"context": {0: "images", 1: "tokens"}} | {n: {0: "images", 2: "tokens"} for n in cross_names}
            module = CrossKeys([a for _, a in cross])
            graphs["context"] = Graph(module, (torch.zeros(2, 5, self.width),), ("context",), cross_names, dynamic)
        dynamic = {"ids": {0: "batch", 1: "step"}, "position": {0: "step"}, "scores": {0: "batch"}}
        dynamic |= {n: {0: "batch", 2: "past"} for n in past_names} | {n: {0: "batch", 2: "total"} for n in new_names}
        dynamic |= {n: {0: "images", 2: "tokens"} for n in cross_names}
        ids = torch.zeros(2, 2, dtype=torch.long)
        graphs["step"] = Graph(
            Step(self),
            (ids, torch.arange(3, 5), *past, *memory),
            ("ids", "position", *past_names, *cross_names),
            ("scores", *new_names),
            dynamic,
        )
        return graphs

    def shapes(self, steps: float, beams: int) -> dict[str, Shape]:
        mean = round((steps + 1) / 2)
        keys = {"attention": mean, "cross_attention": self.context_tokens, "ffn": 1}
        return {b.name: Shape(self.width, 1, keys[b.kind], beams, steps) for b in self.blocks}

    def requests(self, steps: float, beams: int) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        past = max(1, round((steps - 1) / 2))
        cross = [a for _, a in self.attentions() if a is not None]
        feeds = [torch.full((beams, 1), 3), torch.tensor([past])]
        feeds += [torch.randn(beams, h, past, d) for h, d in self.config["past"]]
        feeds += [torch.randn(1, a.num_heads, self.context_tokens, a.head_dim) for a in cross for _ in "kv"]
        context = {"context": ((torch.randn(1, self.context_tokens, self.width),), 1.0)} if cross else {}
        return {**context, "step": (tuple(feeds), steps)}

    context_tokens = 64
    """Length of the context, set by the pipeline that feeds this decoder."""


class CrossKeys(nn.Module):
    """context [b, n, w] -> K and V [b, h, n, d] of every cross-attention."""

    def __init__(self, attentions: list[nn.Module]):
        super().__init__()
        self.attentions = nn.ModuleList(attentions)

    def forward(self, context: Tensor) -> tuple[Tensor, ...]:
        return tuple(heads(p(context), a.num_heads) for a in self.attentions for p in (a.k_proj, a.v_proj))


class Step(nn.Module):
    """ids [b, t], position [t], past K and V, cross K and V -> log-probabilities [b, v] after the last, new K and V.

    Cross K and V may have batch 1: all beams of one image share them.
    """

    def __init__(self, model: TextDecoder):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, position: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        m = self.model
        d = m.decoder
        own = [a for a, _ in m.attentions() if a is not None]
        past = iter(cache[: 2 * len(own)])
        cross = iter(cache[2 * len(own) :])
        x = d.embed_tokens(ids) + d.embed_positions.weight[position + d.embed_positions.offset]
        x = d.layernorm_embedding(x)
        new: list[Tensor] = []
        mask = None
        for layer, (self_attn, cross_attn) in zip(d.layers, m.attentions(), strict=True):
            if self_attn is not None:
                h = layer.self_attn_layer_norm(x)
                q = heads(self_attn.q_proj(h), self_attn.num_heads)
                k = torch.cat([next(past), heads(self_attn.k_proj(h), self_attn.num_heads)], 2)
                v = torch.cat([next(past), heads(self_attn.v_proj(h), self_attn.num_heads)], 2)
                new += [k, v]
                if mask is None:  # causal among the new tokens; all zeros in a step of one
                    mask = (torch.arange(k.shape[2]) > position[:, None]) * -1e9
                x = x + self_attn.out_proj(merge(attend(q, k, v, mask)))
            else:
                x = x + layer.self_attn.bias
            if cross_attn is not None:
                q = heads(cross_attn.q_proj(layer.encoder_attn_layer_norm(x)), cross_attn.num_heads)
                x = x + cross_attn.out_proj(merge(attend(q, next(cross), next(cross))))
            else:
                x = x + layer.encoder_attn.bias
            x = x + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(x))))
        return (torch.log_softmax(m.lm.lm_head(d.layer_norm(x[:, -1])), -1), *new)


def load_text_decoder(context: LoadContext) -> Model:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as e:
        raise MissingPackage("transformers", "compress") from e
    source = str(context.path or context.name)
    if context.path and not any(context.path.glob("*.safetensors")):
        raise ModelError(f"{source}: no .safetensors file: weights in other formats are not loaded")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ModelError(f"transformers can't load '{source}': {str(e).splitlines()[0]}") from e
    if config.model_type not in SUPPORTED:
        known = ", ".join(SUPPORTED)
        raise ModelError(f"{source}: a text_decoder of type '{config.model_type}' is not supported (known: {known})")
    if config.scale_embedding:
        raise ModelError(f"{source}: scale_embedding is not supported")
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as e:
        raise ModelError(f"transformers can't load '{source}': {e}") from e
    if info["missing_keys"] or info.get("mismatched_keys"):
        wrong = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))[:4]
        raise ModelError(f"{source}: weights are missing or of another shape: {', '.join(wrong)}")
    return TextDecoder(lm.eval(), tokenizer_of(context), context.candidates, context.max_tokens)
