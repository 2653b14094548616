"""A loaded model as the other rooms see it: a torch module that knows its blocks and how it is deployed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block


@dataclass(frozen=True, kw_only=True)
class ExportGraph:
    """One ONNX graph of a node: a module, an example call, the names of its inputs and outputs, the dynamic axes."""

    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: dict[str, dict[int, str]]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
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
    - audio_encoder: log-mel features [b, m, f] -> embedding [b, d], tokens [b, n, w]
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

    @abstractmethod
    def export_graphs(self) -> dict[str, ExportGraph]:
        """The ONNX graphs of this node, traced at batch 2."""

    @abstractmethod
    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """The shape every block runs at in deployment, given the decode steps of a request (of a text encoder: of the
        generator it reads) and its beams."""

    @abstractmethod
    def make_example_requests(
        self, steps: float, beams: int
    ) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        """Inputs of each graph as in deployment (one image, all beams, mid-sentence) and calls per request."""

    def get_linear(self, path: str) -> nn.Linear:
        module = self.get_submodule(path)
        assert isinstance(module, nn.Linear), path
        return module

    def get_block(self, name: str) -> Block:
        return next(b for b in self.blocks if b.name == name)

    @property
    def weighted_blocks(self) -> tuple[Block, ...]:
        """The blocks whose units carry weights: all but positions."""
        return tuple(b for b in self.blocks if b.group != "tokens")

    def list_linear_layers(self, blocks: Collection[str] | None = None) -> list[nn.Linear]:
        """The linear layers of some blocks (default: all), each once; of blocks that are gone, none."""
        some = (b for b in self.weighted_blocks if blocks is None or b.name in blocks)
        paths = dict.fromkeys(p for b in some for p in (*(w.path for w in b.writers), b.reader))
        return [m for m in map(self.get_submodule, paths) if isinstance(m, nn.Linear)]

    @property
    def token_selector(self) -> TokenSelector | None:
        """Where positions of the sequence may be left out, None for models that can't lose any."""
        return next((m for m in self.modules() if isinstance(m, TokenSelector)), None)


class TokenSelector(nn.Module):
    """A module whose output [b, extra + n, w] loses positions for good: those not in `index`. All are kept at first.

    The first `extra` positions (a class token) always stay. What is left out is the same for every input.
    """

    def __init__(self, inner: nn.Module, extra: int, *, count: int):
        super().__init__()
        self.inner, self.extra, self.count = inner, extra, count
        self.register_buffer("index", torch.arange(count))

    def __getattr__(self, name: str) -> Any:  # libraries ask an embedding for its parts
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    @property
    def kept_count(self) -> int:
        return len(self.index)

    def keep_positions_(self, units: Tensor) -> None:
        """Keep these of the positions that are left."""
        self.index = self.index[units].clone()

    def select_positions(self, x: Tensor, index: Tensor) -> Tensor:
        """x [b, e + count, w] without the positions not in `index`, the leading e always kept."""
        lead = torch.arange(x.shape[1] - self.count)
        return x[:, torch.cat([lead, len(lead) + index])]

    def forward(self, *args: Any, **options: Any) -> Tensor:
        x = self.inner(*args, **options)
        return (
            x
            if self.kept_count == self.count
            else x[:, torch.cat([torch.arange(self.extra), self.extra + self.index])]
        )


def add_tokens_block(
    model: nn.Module, path: str, *, extra: int, count: int, ordered: bool = False
) -> Block:
    """Wrap the module at `path` so that positions of what it puts out can be cut, in sixteenths or so of all."""
    inner = model.get_submodule(path)
    model.set_submodule(
        path,
        TokenSelector(
            inner.inner if isinstance(inner, TokenSelector) else inner, extra, count=count
        ),
    )
    step = max(1, round(count / (30 if ordered else 16)))
    return Block(
        name="tokens",
        kind="tokens",
        reader=path,
        writers=(),
        units=count,
        width=1,
        granularity=step,
        module=path,
        reads=("stream",),
        drop=(),
        prefix_only=ordered,
    )


class ImageEncoderModel(Model):
    """Base of image encoders: `forward(pixels [b, 3, s, s])` gives embedding [b, d] of length 1 and tokens [b, n, w].

    A subclass sets `blocks`, then calls `settle` with the width of its layers.
    """

    kind = "image_encoder"

    def finish_setup(
        self, size: int, width: int, *, preprocess: dict[str, Any], hidden_positions: int = 0
    ) -> None:
        """Fix the input size and learn what comes out.

        `preprocess`: keys of `runtime.images.preprocess`; `hidden_positions`: positions inside that are not among the tokens.
        """
        self.size, self.width = size, width
        self.config = {"preprocess": {**preprocess, "size": size}}
        with torch.no_grad():
            embedding, tokens = self(torch.zeros(1, 3, size, size))
        self.given, self.hidden = int(tokens.shape[1]), hidden_positions
        self.dims = {"embedding": int(embedding.shape[-1]), "tokens": int(tokens.shape[-1])}

    @property
    def passes_positions(self) -> bool:
        """The tokens that come out are the positions inside, not a few queries that read them."""
        at = self.token_selector
        return at is None or self.given in (at.count, at.count + at.extra)

    @property
    def token_count(self) -> int:
        """Tokens that come out."""
        at = self.token_selector
        return self.given - (at.count - at.kept_count if at and self.passes_positions else 0)

    @property
    def positions(self) -> int:
        """Positions inside."""
        at = self.token_selector
        return at.extra + at.kept_count if at else self.given + self.hidden

    def export_graphs(self) -> dict[str, ExportGraph]:
        names = ("embedding", "tokens")
        dynamic = {n: {0: "batch"} for n in ("pixels", *names)}
        return {
            "model": ExportGraph(
                module=self,
                example=(torch.zeros(2, 3, self.size, self.size),),
                inputs=("pixels",),
                outputs=names,
                dynamic_axes=dynamic,
            )
        }

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        return {
            b.name: BlockShape(
                width=self.width, positions=self.positions, keys=self.positions, batch=1
            )
            for b in self.blocks
        }

    def make_example_requests(
        self, steps: float, beams: int
    ) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        return {"model": ((torch.randn(1, 3, self.size, self.size),), 1.0)}


class TextEncoderModel(Model):
    """Base of text encoders: `forward(ids [b, t])` gives embedding [b, d] of length 1; t is the context length.

    A subclass sets `blocks`, then calls `settle` with the width of its layers. One that ignores padding takes texts of
    `any_length` up to its context.
    """

    kind = "text_encoder"

    def finish_setup(
        self,
        context: int,
        width: int,
        *,
        vocabulary: int,
        pad: int,
        eos: int,
        any_length: bool = False,
    ) -> None:
        """Fix the length of the input and learn what comes out."""
        self.context, self.width, self.vocabulary, self.any_length = (
            context,
            width,
            vocabulary,
            any_length,
        )
        self.config = {
            "tokenizer": "tokenizer.json",
            "context_length": context,
            "pad": pad,
            "eos": eos,
        }
        self.config |= {"any_length": any_length}
        with torch.no_grad():
            self.dims = {"embedding": int(self(self._example(1)).shape[-1])}

    def _example(self, batch: int) -> Tensor:
        ids = torch.full((batch, self.context), self.config["pad"], dtype=torch.long)
        ids[:, 0] = self.config["eos"]
        return ids

    def export_graphs(self) -> dict[str, ExportGraph]:
        dynamic = {"ids": {0: "batch"}, "embedding": {0: "batch"}}
        if self.any_length:
            dynamic["ids"][1] = "length"
        return {
            "model": ExportGraph(
                module=self,
                example=(self._example(2),),
                inputs=("ids",),
                outputs=("embedding",),
                dynamic_axes=dynamic,
            )
        }

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        length = self._length(steps)
        return {
            b.name: BlockShape(width=self.width, positions=length, keys=length, batch=beams)
            for b in self.blocks
        }

    def make_example_requests(
        self, steps: float, beams: int
    ) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        return {"model": ((torch.full((beams, self._length(steps)), self.config["eos"]),), 1.0)}

    def _length(self, steps: float) -> int:
        """Tokens of a text that took a generator so many steps."""
        return min(self.context, round(steps) + 1) if self.any_length else self.context


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """What a loader may need beside the source: the node's options and a folder for files."""

    kind: str
    path: Path | None
    name: str = ""
    pretrained: str | None = None
    candidates: int = 1
    max_tokens: int = 0
    prompt: str = ""


Loader = Callable[[LoadContext], Model]
