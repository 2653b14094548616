"""A loaded model as the other rooms see it: a torch module that knows its blocks and how it is deployed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.records import Block


@dataclass(frozen=True)
class Graph:
    """One ONNX graph of a node: a module, an example call, the names of its inputs and outputs, the dynamic axes."""

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]


@dataclass(frozen=True)
class Shape:
    """What the device table needs to know of a block: residual width, positions per call, key positions, batch."""

    width: int
    positions: int
    keys: int
    batch: int
    calls: float = 1.0
    """Calls per request: 1, or the steps of a decode loop."""
    prefill: int = 0
    """Positions of one more call a request: a prefix read before the decode loop."""
    head: int = 0
    """In place of the block's own unit width, where that says nothing (the outputs of a convolution)."""


class Model(nn.Module, ABC):
    """Interface of one node's model. Inputs and outputs of `forward` depend on the kind:

    - image_encoder: pixels [b, 3, s, s] -> embedding [b, d], tokens [b, n, w]
    - text_encoder: ids [b, t] -> embedding [b, d]
    - text_decoder: ids [b, t], context [b, n, w] -> logits [b, t, v] (teacher forcing)
    """

    kind: str
    blocks: tuple[Block, ...]
    config: dict[str, Any]
    """For the runtime node: preprocessing, tokenizer file name, generation. JSON-ready."""
    tokenizer_json: str | None = None
    vocabulary: int = 0
    """How many token ids there are, of models that read text."""
    dims: dict[str, int]
    """`embedding`, `tokens`, `context`: widths that must agree across an edge."""
    refused: Mapping[str, str] = MappingProxyType({})
    """Blocks that can't be pruned here, with the reason."""

    @abstractmethod
    def graphs(self) -> dict[str, Graph]:
        """The ONNX graphs of this node, traced at batch 2."""

    @abstractmethod
    def shapes(self, steps: float, beams: int) -> dict[str, Shape]:
        """The shape every block runs at in deployment, given the decode steps of a request and its beams."""

    @abstractmethod
    def requests(self, steps: float, beams: int) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        """Inputs of each graph as in deployment (one image, all beams, mid-sentence) and calls per request."""

    def linear(self, path: str) -> nn.Linear:
        module = self.get_submodule(path)
        assert isinstance(module, nn.Linear), path
        return module

    def block(self, name: str) -> Block:
        return next(b for b in self.blocks if b.name == name)


class ImageModel(Model):
    """Base of image encoders: `forward(pixels [b, 3, s, s])` gives embedding [b, d] of length 1 and tokens [b, n, w].

    A subclass sets `blocks`, then calls `settle` with the width of its layers.
    """

    kind = "image_encoder"

    def settle(self, size: int, width: int, preprocess: dict[str, Any], hidden: int = 0) -> None:
        """Fix the input size and learn what comes out.

        `preprocess`: keys of `runtime.images.preprocess`; `hidden`: positions inside that are not among the tokens.
        """
        self.size, self.width = size, width
        self.config = {"preprocess": {**preprocess, "size": size}}
        with torch.no_grad():
            embedding, tokens = self(torch.zeros(1, 3, size, size))
        self.patches = int(tokens.shape[1])
        self.positions = self.patches + hidden
        self.dims = {"embedding": int(embedding.shape[-1]), "tokens": int(tokens.shape[-1])}

    def graphs(self) -> dict[str, Graph]:
        names = ("embedding", "tokens")
        dynamic = {n: {0: "batch"} for n in ("pixels", *names)}
        return {"model": Graph(self, (torch.zeros(2, 3, self.size, self.size),), ("pixels",), names, dynamic)}

    def shapes(self, steps: float, beams: int) -> dict[str, Shape]:
        return {b.name: Shape(self.width, self.positions, self.positions, 1) for b in self.blocks}

    def requests(self, steps: float, beams: int) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        return {"model": ((torch.randn(1, 3, self.size, self.size),), 1.0)}


class TextModel(Model):
    """Base of text encoders: `forward(ids [b, t])` gives embedding [b, d] of length 1; t is the context length.

    A subclass sets `blocks`, then calls `settle` with the width of its layers.
    """

    kind = "text_encoder"

    def settle(self, context: int, width: int, vocabulary: int, pad: int, eos: int) -> None:
        """Fix the length of the input and learn what comes out."""
        self.context, self.width, self.vocabulary = context, width, vocabulary
        self.config = {"tokenizer": "tokenizer.json", "context_length": context, "pad": pad, "eos": eos}
        with torch.no_grad():
            self.dims = {"embedding": int(self(self._example(1)).shape[-1])}

    def _example(self, batch: int) -> Tensor:
        ids = torch.full((batch, self.context), self.config["pad"], dtype=torch.long)
        ids[:, 0] = self.config["eos"]
        return ids

    def graphs(self) -> dict[str, Graph]:
        dynamic = {"ids": {0: "batch"}, "embedding": {0: "batch"}}
        return {"model": Graph(self, (self._example(2),), ("ids",), ("embedding",), dynamic)}

    def shapes(self, steps: float, beams: int) -> dict[str, Shape]:
        return {b.name: Shape(self.width, self.context, self.context, beams) for b in self.blocks}

    def requests(self, steps: float, beams: int) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        return {"model": ((torch.full((beams, self.context), self.config["eos"]),), 1.0)}


@dataclass(frozen=True)
class LoadContext:
    """What a loader may need beside the source: the node's options and a folder for files."""

    kind: str
    path: Path | None
    name: str = ""
    pretrained: str | None = None
    candidates: int = 1
    max_tokens: int = 0


Loader = Callable[[LoadContext], Model]


class Constant(nn.Module):
    """Stands for a removed sub-layer: what it adds to the residual stream is this bias (refit makes it the mean).

    `returns`: what the library expects of the sub-layer: "plain" a tensor, "pair" also its attention weights, "biased"
    also the position bias that T5 hands from layer to layer. `weight` is there for libraries that ask a layer's dtype.
    """

    def __init__(self, bias: Tensor, returns: str = "plain"):
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())
        self.register_buffer("weight", torch.zeros(0), persistent=False)
        self.returns = returns

    def forward(self, *_: Any, position_bias: Tensor | None = None, **__: Any) -> Any:
        return {"plain": self.bias, "pair": (self.bias, None), "biased": (self.bias, position_bias, None)}[self.returns]


class Skip(nn.Module):
    """Stands before a `Constant`: passes its input on. `weight`: see there."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0), persistent=False)
        self.pair = pair

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return (x, None) if self.pair else x


STANDINS: dict[str, Callable[[Tensor], nn.Module]] = {
    "plain": Constant,
    "pair": lambda bias: Constant(bias, "pair"),
    "biased": lambda bias: Constant(bias, "biased"),
    "skip": lambda bias: Skip(),
    "skip pair": lambda bias: Skip(pair=True),
}
"""What takes the place of a module of a removed block, by mode; made from the bias of its output projection."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for [b, h, t, d], spelled out so that its ONNX graph stays small."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def heads(x: Tensor, count: int) -> Tensor:
    """[b, t, h * d] -> [b, h, t, d]."""
    return x.view(x.shape[0], -1, count, x.shape[-1] // count).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[b, h, t, d] -> [b, t, h * d]."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * x.shape[3])


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused q, k, v projection; any number of heads of a fixed head width.

    Takes the place of `nn.MultiheadAttention`, whose packed projection can't lose heads, and is called like it.
    """

    def __init__(self, qkv: nn.Linear, out_proj: nn.Linear, num_heads: int):
        super().__init__()
        self.qkv, self.out_proj, self.num_heads = qkv, out_proj, num_heads
        self.batch_first = True

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> SelfAttention:
        rows, width = attention.in_proj_weight.shape
        qkv = nn.Linear(width, rows)
        with torch.no_grad():
            qkv.weight.copy_(attention.in_proj_weight)
            qkv.bias.copy_(attention.in_proj_bias)
        out = nn.Linear(attention.out_proj.in_features, attention.out_proj.out_features)
        out.load_state_dict(attention.out_proj.state_dict())
        return cls(qkv, out, attention.num_heads)

    def forward(
        self,
        x: Tensor | None = None,
        *_: Any,
        attn_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        x = hidden_states if x is None else x
        assert x is not None
        q, k, v = (heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        return self.out_proj(merge(attend(q, k, v, attn_mask))), None
