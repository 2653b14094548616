"""What every kind of node shares in torch: batches, outputs, and the interface of a node and of a
join.

A kind has a folder of up to three small files:

- `entry.py` says what it is, as plain data.
- `deployed.py` says how it runs on ONNX Runtime.
- `trainable.py` says how it runs and learns in torch. The classes below are its interface.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmcompress.data.base import Pairs
from mmcompress.models.base import Model

Outputs = dict[str, dict[str, Tensor]]
"""Outputs of the nodes of a pipeline: node name -> output name -> tensor, batch first."""

Models = Mapping[str, Model]
"""The models of a pipeline by node name."""

FIRST_RANDOM_ID = 3
"""Lowest token id of random texts: special tokens often have the ones below."""

SIMILARITY_SCALE = 30.0
"""Factor on cosine similarities before a softmax: the inverse temperature of contrastive losses."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The inputs of every model for b pairs."""

    inputs: dict[str, Tensor]
    """Input of each node by name: pixels [b, 3, height, width], features [b, m, f] or token ids
    [b, t]. A text encoder behind a lookup reads two texts a pair, ids [b, 2, t]: the query, and the
    text that it should find."""
    keep: dict[str, Tensor] = field(default_factory=dict)
    """Which positions hold something [b, p], by node, where not all do. For a generator: those with
    a next token."""
    names: tuple[str, ...] = ()
    """Names of the pairs, when the data gives them any: a pair of the same name is the same
    pair."""
    draw: str = ""
    """Name of the draw that all pairs together are. A draw of the same name has the same pairs in
    the same order; empty where it has no name."""
    sources: tuple[tuple[str, int], ...] = ()
    """(name of the draw, place in it) of every pair, where the pairs of several draws are mixed."""

    def __len__(self) -> int:
        first_input = next(iter(self.inputs.values()))
        return len(first_input)

    def __getitem__(self, index: slice) -> Batch:
        """Return the pairs of a slice."""
        inputs = {node: values[index] for node, values in self.inputs.items()}
        keep = {node: values[index] for node, values in self.keep.items()}
        return Batch(inputs=inputs, keep=keep, names=self.names[index])

    def pick(self, indices: Sequence[int]) -> Batch:
        """Return the pairs at some indices."""
        rows = list(indices)
        inputs = {node: values[rows] for node, values in self.inputs.items()}
        keep = {node: values[rows] for node, values in self.keep.items()}
        names = tuple(self.names[i] for i in rows) if self.names else ()
        return Batch(inputs=inputs, keep=keep, names=names)

    def move(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device."""
        inputs = {node: values.to(device) for node, values in self.inputs.items()}
        keep = {node: values.to(device) for node, values in self.keep.items()}
        return replace(self, inputs=inputs, keep=keep)

    def split_into(self, count: int) -> list[Batch]:
        """Return the batch in exactly so many pieces of nearly equal size; itself for one piece."""
        if count == 1:
            return [self]
        bounds = [len(self) * i // count for i in range(count + 1)]
        return [self[start:end] for start, end in itertools.pairwise(bounds)]

    def split_evenly(self, size: int) -> list[Batch]:
        """Return the batch in pieces of at most `size` pairs."""
        return [self[start : start + size] for start in range(0, len(self), size)]


@dataclass(frozen=True, kw_only=True)
class NodeSetup:
    """What a trainable node learns of its place in the pipeline."""

    name: str
    """The name of the node in the spec."""
    config: Mapping[str, Any]
    """What its model says for deployment: preprocessing, token ids, generation (`Model.config`)."""
    tokenizer_json: str | None
    """Its tokenizer as JSON text; None for models that read no text."""
    sources: Mapping[str, str]
    """The node (or pipeline input) behind every input port."""
    feeds_list: bool
    """Whether a join compares its embedding to a list of texts that it embeds as well."""
    is_unjoined: bool
    """Whether no join compares its embedding: its distance to the dense model's is then its
    loss."""
    labels_by_teacher: bool
    """Whether generators learn what the dense pipeline writes, not the texts of the data."""


class TrainableNode(ABC):
    """A model of the pipeline in torch: how pairs become its inputs, how it runs, and which losses
    it brings."""

    def __init__(self, setup: NodeSetup):
        self.setup = setup
        self.name = setup.name

    @abstractmethod
    def collate(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """Make the model's input of some pairs.

        Args:
            pairs: b pairs of input and text.

        Returns:
            The input, batch first, and which positions hold something [b, p], or None when all of
            them do.
        """

    @abstractmethod
    def forward(self, model: Model, batch: Batch, *, outputs: Outputs) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            model: The model of this node, dense or pruned.
            batch: The inputs of b pairs.
            outputs: Outputs of the nodes in `read_nodes`.

        Returns:
            The outputs of this node by name.
        """

    @property
    def read_nodes(self) -> tuple[str, ...]:
        """The nodes whose outputs `forward` reads. Text is read from the data here, not from a
        generator."""
        return ()

    @property
    def needs_reference(self) -> bool:
        """Whether the loss of this node looks at outputs of the dense pipeline."""
        return self.setup.is_unjoined or self.setup.feeds_list

    def select_reference(self, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the loss needs of the dense model's outputs; empty when it needs nothing."""
        return dict(dense) if self.needs_reference else {}

    def compute_losses(
        self, batch: Batch, *, outputs: Outputs, reference: Outputs | None
    ) -> dict[str, Tensor]:
        """Return the losses that this node brings to the pipeline's own loss, by name.

        Args:
            batch: The inputs of b pairs.
            outputs: Outputs of all nodes.
            reference: What `select_reference` gave for the dense pipeline, by node; None when there
                is none.

        Returns:
            Scalar losses by name, each ending in `.<node>`.
        """
        if reference is None or not self.setup.is_unjoined:
            return {}
        drift = compute_squared_distance(
            outputs[self.name]["embedding"], reference[self.name]["embedding"]
        )
        return {f"drift.{self.name}": drift}

    def compute_quality(self, batch: Batch, *, outputs: Outputs) -> dict[str, float]:
        """Return figures of quality on a batch, by name without the node's."""
        return {}

    @staticmethod
    @abstractmethod
    def make_random_inputs(
        model: Model, batch_size: int, *, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return random inputs of `model.forward`, for proofs that hold whatever the weights."""


class TrainableWriter(TrainableNode):
    """A model that writes text: not every position of its outputs counts."""

    @abstractmethod
    def find_target_positions(self, batch: Batch) -> Tensor:
        """Return the positions whose next token counts [b, t - 1]."""


class TrainableJoin(ABC):
    """A node without weights that compares embeddings: the losses and figures that it brings."""

    def __init__(self, name: str, *, sources: Mapping[str, str]):
        self.node_name = name
        self.sources = sources

    @property
    @abstractmethod
    def query(self) -> tuple[str, str]:
        """(node, output) of the embedding that asks."""

    @property
    @abstractmethod
    def keys(self) -> tuple[str, str]:
        """(node, output) of the embedding that is to be found."""

    @property
    def name(self) -> str:
        """The names of the two models that it compares, or of the only one."""
        names = dict.fromkeys((self.query[0], self.keys[0]))
        return ".".join(names)

    def select_pair(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the two embeddings that it compares, each [b, d]."""
        query_node, query_output = self.query
        keys_node, keys_output = self.keys
        return outputs[query_node][query_output], outputs[keys_node][keys_output]

    def compute_losses(self, outputs: Outputs, *, reference: Outputs | None) -> dict[str, Tensor]:
        """Return the losses of this join by name: the symmetric contrastive loss (CLIP, Radford et
        al. 2021)."""
        query_BD, keys_BD = self.select_pair(outputs)
        similarity_BB = SIMILARITY_SCALE * query_BD @ keys_BD.T
        own_B = torch.arange(len(query_BD), device=query_BD.device)
        forwards = functional.cross_entropy(similarity_BB, own_B)
        backwards = functional.cross_entropy(similarity_BB.T, own_B)
        return {f"contrast.{self.name}": (forwards + backwards) / 2}

    @abstractmethod
    def compute_quality(self, outputs: Outputs) -> dict[str, float]:
        """Return figures of quality on a batch, by name without the node's."""

    def rank_pairs(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return for every query the key that is nearest, and for every key the query, as indices
        [b]."""
        query_BD, keys_BD = self.select_pair(outputs)
        similarity_BB = query_BD @ keys_BD.T
        return similarity_BB.argmax(1), similarity_BB.argmax(0)


def draw_random_ids(model: Model, batch_size: int, *, generator: torch.Generator) -> Tensor:
    """Draw token ids of a text encoder [b, t] that end in an end token."""
    size = (batch_size, model.config["context_length"])
    ids = torch.randint(FIRST_RANDOM_ID, model.vocabulary, size, generator=generator)
    ids[:, -1] = model.config["eos"]
    return ids


def compute_squared_distance(one_BD: Tensor, other_BD: Tensor) -> Tensor:
    """Return the mean squared distance of embeddings [b, d]."""
    return (one_BD - other_BD).square().sum(-1).mean()


def compute_share(right: Tensor) -> float:
    """Return the share of a boolean tensor that is true."""
    return right.float().mean().item()
