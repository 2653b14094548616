"""The contract of a model: a torch module that knows its blocks, example calls and ONNX graphs.

To bring a model of your own, subclass `ImageEncoderModel`, `TextEncoderModel` or `Model`, and name
the function that builds it in the spec: `source: python:package.module:build`. That function takes
a `LoadContext` and returns the model. `tests/own_tower.py` is a whole example.

Shapes in this file:
    b  batch                                     n  tokens that an encoder gives
    s  side of an image, in pixels               w  width of these tokens
    m  mel bands, f  frames of 10 ms             d  width of an embedding
    t  tokens of a text                          v  size of the vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmcompress.graph.blocks import Block, ConvGeometry
from mmcompress.models.hub_files import HubModel
from mmcompress.spec.node_options import OptionValue

IMAGE_TOKEN_STEPS = 16
"""Steps in which the patches of an image can be cut: one step takes about a sixteenth of them."""

WINDOW_STEPS = 30
"""Steps in which a window of sound can be cut: one step of Whisper's window of 30 s is a second."""


@dataclass(frozen=True, kw_only=True)
class ExportGraph:
    """One ONNX graph of a node, as the exporter needs it."""

    module: nn.Module
    """What is traced: the model itself, or a module that wraps a part of it."""
    example: tuple[Tensor, ...]
    """The tensors that `module` is called with for the trace, at batch 2: an axis of 1 may be taken
    for a constant."""
    inputs: tuple[str, ...]
    """A name for each tensor of `example`, in the same order."""
    outputs: tuple[str, ...]
    """A name for each tensor that `module` returns, in the same order."""
    dynamic_axes: dict[str, dict[int, str]]
    """Axes whose size may differ from the example's, by name of an input or output:
    {"pixels": {0: "batch"}}. Every other axis keeps its size."""
    best_tokens: int = 0
    """Best tokens of each row that the file of a decode step lists beside all scores; 0: it lists
    none."""


class ExampleRequest(NamedTuple):
    """One call of a graph, of the sizes that it has in deployment."""

    inputs: tuple[Tensor, ...]
    """One tensor for each input of the graph, in its order."""
    calls: float
    """Calls per request: 1, or the steps of a decode loop."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The sizes that a block runs at in deployment: what the device table needs for its latency."""

    width: int
    """Features of the residual stream around the block; channels read, for a convolution."""
    positions: int
    """Positions of the sequence (or places of a feature map) that one call computes."""
    keys: int
    """Positions that attention reads; 1 for a convolution."""
    batch: int
    """Sequences in one call: the beams of a generator, 1 for an image."""
    calls: float = 1.0
    """Calls per request: 1, or the steps of a decode loop."""
    prefill: int = 0
    """Positions of one more call per request, which reads a prefix before the decode loop."""
    head: int = 0
    """What stands in for the width of a unit where the block's own says nothing: the output
    channels of a convolution. 0 takes the block's own."""
    conv: ConvGeometry | None = None
    """Kernels and stride of a block of convolutions; None for every other block."""


class Model(nn.Module, ABC):
    """The model of one node. Subclasses set the fields below and implement the abstract methods.

    `forward` depends on the kind of the node:

    - image_encoder: pixels [b, 3, height, width] -> embedding [b, d], tokens [b, n, w]
    - audio_encoder: log-mel features [b, m, f] -> embedding [b, d], tokens [b, n, w]
    - text_encoder: ids [b, t] -> embedding [b, d]
    - text_decoder: ids [b, t], context [b, n, w] -> logits [b, t, v]; the logits at a position
      score the token that follows it (teacher forcing)
    - fusion_encoder: ids [b, t], context [b, n, w] -> embedding [b, d], tokens [b, t, d], scores
      [b], the log-odds that a text describes its picture

    All tensors are float32, ids are int64, embeddings have length 1. A text_decoder also has
    `context_tokens`: the pipeline sets it to the tokens n that the encoder before it gives.
    """

    kind: str
    """The kind of node it serves: one of those above, or one that a plug-in adds."""
    blocks: tuple[Block, ...]
    """What can be cut, in the order of execution; `models.layouts.find_blocks` finds most of it.
    A cut replaces them by smaller ones."""
    config: dict[str, Any]
    """What the deployed node needs beside the graphs, ready for JSON.

    - image_encoder: `preprocess`
    - audio_encoder: `features`
    - text_encoder: `tokenizer`, `context_length`, `pad`, `eos`, `any_length` and what
      `runtime.text.TextReader` reads
    - text_decoder: `tokenizer`, `generation`, `past` and `lead`
    """
    tokenizer_json: str | None = None
    """The fast tokenizer as JSON, of models that read or write text."""
    vocabulary: int = 0
    """How many token ids there are, of models that read or write text."""
    has_own_encoder: bool = False
    """Whether its checkpoint also holds the encoder that it was trained to read."""
    dims: dict[str, int]
    """Widths that must agree across an edge of the pipeline: `embedding` d and `tokens` w that it
    gives, `context` w that it reads."""

    @abstractmethod
    def export_graphs(self) -> dict[str, ExportGraph]:
        """Return the ONNX graphs of this node by name, with examples of batch 2.

        An encoder has one graph, `model`, from `pixels`, `features` or `ids` to `embedding` and (of
        images and sounds) `tokens`. A text_decoder has `step`, which computes the scores of the
        next token from a cache, and `context`, which runs once per request.
        """

    @abstractmethod
    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Return the sizes that every block runs at in deployment, by name of the block.

        Args:
            steps: Decode steps of a request; for a text encoder, those of the generator whose text
                it reads.
            beams: Texts that a request holds at once.
        """

    @abstractmethod
    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        """Return one call of each graph as in deployment: one image, all beams, mid-sentence.

        Args:
            steps: Decode steps of a request, as above.
            beams: Texts that a request holds at once.

        Returns:
            The call by name of the graph. Only sizes count, so values may be random.
        """

    def generate_with_library(self, context: Tensor) -> list[list[int]]:
        """Generate texts with the `generate` of the model's library, for models that write text.

        Args:
            context: The tokens that a generator reads, of one input [1, n, w].

        Returns:
            Token ids of all beams, the best first.
        """
        raise NotImplementedError(f"a {self.kind} writes no text")

    @property
    def passes_positions(self) -> bool:
        """Whether its tokens are the positions inside, and not a few queries that read them."""
        return True

    def get_linear(self, path: str) -> nn.Linear:
        """Return the linear layer at a path."""
        module = self.get_submodule(path)
        assert isinstance(module, nn.Linear), path
        return module

    def get_block(self, name: str) -> Block:
        """Return the block of a name."""
        return next(block for block in self.blocks if block.name == name)

    @property
    def weighted_blocks(self) -> tuple[Block, ...]:
        """The blocks whose units carry weights: all but positions."""
        return tuple(block for block in self.blocks if block.group != "tokens")

    def list_linear_layers(self, blocks: Collection[str] | None = None) -> list[nn.Linear]:
        """Return the linear layers of blocks, each one once.

        Args:
            blocks: Names of blocks; names that the model no longer has are passed over. None takes
                all blocks.
        """
        paths: list[str] = []
        for block in self.weighted_blocks:
            if blocks is None or block.name in blocks:
                paths += [writer.path for writer in block.writers]
                paths.append(block.reader)
        modules = [self.get_submodule(path) for path in dict.fromkeys(paths)]
        return [module for module in modules if isinstance(module, nn.Linear)]

    @property
    def token_selector(self) -> TokenSelector | None:
        """The module that can leave out positions of the sequence; None for models without one."""
        for module in self.modules():
            if isinstance(module, TokenSelector):
                return module
        return None


class TokenSelector(nn.Module):
    """Wrap a module, and leave out positions of its output [b, extra + count, w].

    The same positions are left out for every input. At first all are kept.

    Args:
        inner: The wrapped module; arguments of `forward` are passed on to it.
        extra: Leading positions that always stay, such as a class token.
        count: Positions behind them, which can be left out.
    """

    def __init__(self, inner: nn.Module, extra: int, *, count: int):
        super().__init__()
        self.inner = inner
        self.extra = extra
        self.count = count
        self.index: Tensor
        self.register_buffer("index", torch.arange(count))

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped module: libraries ask an embedding for its parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    @property
    def kept_count(self) -> int:
        """Positions that are left, without the leading ones."""
        return len(self.index)

    def keep_positions_(self, units: Tensor) -> None:
        """Keep some of the positions that are left.

        Args:
            units: [kept] indices into the positions that are left now.
        """
        self.index = self.index[units.to(self.index.device)].clone()

    def select_positions(self, x: Tensor, index: Tensor) -> Tensor:
        """Return a sequence without the positions that are not in `index`.

        Args:
            x: [b, leading + count, w], with any number of leading positions; they stay.
            index: [kept] indices into the `count` positions.
        """
        leading = torch.arange(x.shape[1] - self.count, device=x.device)
        return x[:, torch.cat([leading, len(leading) + index])]

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Return the output of the wrapped module, [b, extra + kept_count, w]."""
        x: Tensor = self.inner(*args, **options)
        if self.kept_count == self.count:
            return x
        leading = torch.arange(self.extra, device=x.device)
        return x[:, torch.cat([leading, self.extra + self.index])]


def add_tokens_block(
    model: nn.Module, path: str, *, extra: int, count: int, prefix_only: bool = False
) -> Block:
    """Wrap a module of the model in a `TokenSelector`, and return the block of its positions.

    Args:
        model: The model; the module at `path` is replaced.
        path: A module whose output is a sequence [b, extra + count, w].
        extra: Leading positions that always stay, such as a class token.
        count: Positions that can be cut.
        prefix_only: Positions are cut from the end only, as those of an audio window.
    """
    inner = model.get_submodule(path)
    if isinstance(inner, TokenSelector):
        inner = inner.inner
    model.set_submodule(path, TokenSelector(inner, extra, count=count))
    step_count = WINDOW_STEPS if prefix_only else IMAGE_TOKEN_STEPS
    return Block(
        name="tokens",
        kind="tokens",
        reader=path,
        writers=(),
        units=count,
        width=1,
        granularity=max(1, round(count / step_count)),
        module=path,
        reads=("stream",),
        drop=(),
        prefix_only=prefix_only,
    )


class ImageEncoderModel(Model):
    """Base of image encoders: pixels [b, 3, height, width] -> embedding [b, d], tokens [b, n, w].

    The embedding has length 1. A subclass implements `forward`. Its `__init__` sets `blocks`, then
    calls `finish_setup`.
    """

    kind = "image_encoder"

    def finish_setup(
        self,
        size: int | tuple[int, int],
        width: int,
        *,
        preprocess: dict[str, Any],
        hidden_positions: int = 0,
    ) -> None:
        """Fix the size of the input, and run one image to learn the shapes of the outputs.

        Args:
            size: Side of the input in pixels, or its (height, width).
            width: Features of the residual stream inside.
            preprocess: How a picture becomes the input, as `runtime.images.preprocess_image` takes
                it, without `size`.
            hidden_positions: Positions of the sequence inside that are not among the tokens.
        """
        height = size[0] if isinstance(size, tuple) else size
        image_width = size[1] if isinstance(size, tuple) else size
        self.image_shape = (3, height, image_width)
        self.width = width
        saved_size = height if height == image_width else [height, image_width]
        self.config = {"preprocess": {**preprocess, "size": saved_size}}
        with torch.no_grad():
            embedding, tokens = self(torch.zeros((1, *self.image_shape)))
        self.dense_token_count = int(tokens.shape[1])
        self.hidden_positions = hidden_positions
        self.dims = {"embedding": int(embedding.shape[-1]), "tokens": int(tokens.shape[-1])}

    @property
    def passes_positions(self) -> bool:
        """Whether the tokens are the positions inside, and not a few queries that read them."""
        selector = self.token_selector
        if selector is None:
            return True
        return self.dense_token_count in (selector.count, selector.count + selector.extra)

    @property
    def token_count(self) -> int:
        """Tokens n that the model gives now."""
        selector = self.token_selector
        if selector is None or not self.passes_positions:
            return self.dense_token_count
        return self.dense_token_count - (selector.count - selector.kept_count)

    @property
    def positions(self) -> int:
        """Positions of the sequence inside."""
        selector = self.token_selector
        if selector is None:
            return self.dense_token_count + self.hidden_positions
        return selector.extra + selector.kept_count

    def export_graphs(self) -> dict[str, ExportGraph]:
        """Return one graph: pixels [b, 3, height, width] -> embedding, tokens."""
        graph = ExportGraph(
            module=self,
            example=(torch.zeros((2, *self.image_shape)),),
            inputs=("pixels",),
            outputs=("embedding", "tokens"),
            dynamic_axes={name: {0: "batch"} for name in ("pixels", "embedding", "tokens")},
        )
        return {"model": graph}

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Return the same sizes for every block: all positions of one image."""
        shape = BlockShape(width=self.width, positions=self.positions, keys=self.positions, batch=1)
        return {block.name: shape for block in self.blocks}

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        """Return one call: an image of noise."""
        pixels = torch.randn((1, *self.image_shape))
        return {"model": ExampleRequest((pixels,), 1.0)}


class TextEncoderModel(Model):
    """Base of text encoders: ids [b, t] -> embedding [b, d].

    The embedding has length 1. A subclass implements `forward`. Its `__init__` sets `blocks`, then
    calls `finish_setup`. Texts are padded to the context length, unless the model ignores padding
    (`any_length`).
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
        text_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Fix the length of the input, and run one text to learn the shape of the output.

        Args:
            context: The longest text t, in tokens.
            width: Features of the residual stream inside.
            vocabulary: How many token ids there are.
            pad: The id that fills a text up.
            eos: The id that ends a text, or another one that is no padding.
            any_length: Texts may be shorter than `context`, since the model ignores padding.
            text_settings: What else `runtime.text.TextReader` reads, such as `prompt` and `clean`.
        """
        self.context = context
        self.width = width
        self.vocabulary = vocabulary
        self.any_length = any_length
        self.config = {
            "tokenizer": "tokenizer.json",
            "context_length": context,
            "pad": pad,
            "eos": eos,
            "any_length": any_length,
            **(text_settings or {}),
        }
        with torch.no_grad():
            embedding = self(self._make_example_ids(1))
        self.dims = {"embedding": int(embedding.shape[-1])}

    def _make_example_ids(self, batch: int) -> Tensor:
        """Return ids [batch, context] of a text that is all padding but for one token."""
        ids = torch.full((batch, self.context), self.config["pad"], dtype=torch.long)
        # one token that is no padding: a mean over none of them would divide by zero
        ids[:, 0] = self.config["eos"]
        return ids

    def export_graphs(self) -> dict[str, ExportGraph]:
        """Return one graph: ids [b, t] -> embedding [b, d]."""
        dynamic_axes = {"ids": {0: "batch"}, "embedding": {0: "batch"}}
        if self.any_length:
            dynamic_axes["ids"][1] = "length"
        graph = ExportGraph(
            module=self,
            example=(self._make_example_ids(2),),
            inputs=("ids",),
            outputs=("embedding",),
            dynamic_axes=dynamic_axes,
        )
        return {"model": graph}

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Return the same sizes for every block: all tokens of the texts of a request."""
        length = self._count_text_tokens(steps)
        shape = BlockShape(width=self.width, positions=length, keys=length, batch=beams)
        return {block.name: shape for block in self.blocks}

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        """Return one call: as many texts as there are beams."""
        ids = torch.full((beams, self._count_text_tokens(steps)), self.config["eos"])
        return {"model": ExampleRequest((ids,), 1.0)}

    def _count_text_tokens(self, steps: float) -> int:
        """Return the tokens of a text that a generator writes in so many steps."""
        if not self.any_length:
            return self.context
        return min(self.context, round(steps) + 1)


def mark_tokens(ids: Tensor, pad: int) -> Tensor:
    """Mark what is no padding behind a text: everything up to the last other token.

    A text may hold the padding token itself; the libraries let the model attend to it.

    Args:
        ids: Token ids [b, t]; texts are filled up on the right.
        pad: The id that fills them up, which ends no text.

    Returns:
        bool [b, t].
    """
    positions = torch.arange(ids.shape[1], device=ids.device)
    last = ((ids != pad) * positions).amax(1, keepdim=True)
    return positions <= last


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """What a loader is given: where the weights are, and the options of the node."""

    kind: str
    """The kind of the node: see `mmcompress list kinds`."""
    path: Path | None
    """The folder with the weights, a hub's copy included; None when `name` says where they are."""
    name: str = ""
    """The model at a hub or in a library, or `package.module:build` of the user's own module."""
    pretrained: str | None = None
    """open_clip's tag of the weights, or a file of them."""
    revision: str = ""
    """A branch, tag or commit of the model at a hub that a tag names; empty for the main branch."""
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    """Values of the options that the kind of the node has, by name. Those that loaders of the house
    ask for have properties below."""
    hub_model: HubModel | None = None
    """The model of a hub that `path` is a copy of; None for a folder of the user's own."""

    @property
    def candidates(self) -> int:
        """Texts that a generator writes for an input, and the beams that it finds them with."""
        return int(self.options.get("candidates", 1))

    @property
    def max_tokens(self) -> int:
        """The longest text in tokens; 0 leaves it to the loader."""
        return int(self.options.get("max_tokens", 0))

    @property
    def prompt(self) -> str:
        """What a generator reads before it writes."""
        return str(self.options.get("prompt", ""))

    @property
    def language(self) -> str:
        """The language that a generator of several languages writes; empty: the checkpoint's."""
        return str(self.options.get("language", ""))

    @property
    def task(self) -> str:
        """What a generator of several tasks does with speech; empty: the checkpoint's."""
        return str(self.options.get("task", ""))


Loader = Callable[[LoadContext], Model]
"""A row of the registry `FAMILIES`, and the function behind `python:package.module:build`."""
