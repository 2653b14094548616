"""A loaded model as the other rooms see it: a torch module that knows its blocks and how it is deployed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
    dims: dict[str, int]
    """`embedding`, `tokens`, `context`: widths that must agree across an edge."""

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


@dataclass(frozen=True)
class LoadContext:
    """What a loader may need beside the source: the node's options and a folder for files."""

    kind: str
    path: Path | None
    name: str = ""
    pretrained: str | None = None
    candidates: int = 1
    max_tokens: int = 20


Loader = Callable[[LoadContext], Model]


class Constant(nn.Module):
    """Stands for a removed sub-layer: what it adds to the residual stream is this bias (refit makes it the mean)."""

    def __init__(self, bias: Tensor, outputs: int):
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())
        self.outputs = outputs

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.bias if self.outputs == 1 else (self.bias, *[None] * (self.outputs - 1))


class Skip(nn.Module):
    """Stands before a `Constant`: passes its input on. `weight` is there for libraries that ask a layer's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


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

    def forward(self, x: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        q, k, v = (heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        return self.out_proj(merge(attend(q, k, v, attn_mask))), None
