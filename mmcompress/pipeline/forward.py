"""The pipeline in torch: its graph run on batches of pairs, its own loss, and the quality that a
trial is judged by.

Every kind of node says itself how it runs and what it loses (`mmcompress/kinds/*/trainable.py`).
This file only goes along the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mmcompress.data.base import Pairs
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import (
    find_unjoined_encoders,
    name_by_node,
    parse_reference,
    sort_nodes,
)
from mmcompress.kinds.base import (
    Batch,
    Models,
    NodeSetup,
    Outputs,
    TrainableJoin,
    TrainableNode,
    TrainableWriter,
)
from mmcompress.models.base import Model
from mmcompress.models.device import find_device, free_memory
from mmcompress.registry import resolve_entry
from mmcompress.runtime.progress import ignore_progress
from mmcompress.spec.schema import Spec

Result = TypeVar("Result")
"""What a piece of work returns."""


class TorchPipeline:
    """The graph of a spec over given models.

    It holds no models: they are passed to each call, so that pruned ones fit as well.
    """

    def __init__(self, spec: Spec, models: Models):
        self.spec = spec
        self.batch_size = spec.data.batch
        self.device = find_device(models)
        self.tell_memory: Callable[[str], None] = ignore_progress
        """Called with a message when memory runs out, the first time."""
        self._has_told_memory = False
        self.unjoined_encoders = find_unjoined_encoders(spec)
        self.nodes: dict[str, TrainableNode] = {}
        self.joins: list[TrainableJoin] = []
        for name in sort_nodes(spec):
            kind = get_kind(spec.nodes[name].kind)
            make = resolve_entry(kind.trainable)
            if kind.is_model:
                self.nodes[name] = make(self._set_up(name, models[name]))
        for name, node in spec.nodes.items():
            kind = get_kind(node.kind)
            if not kind.is_model:
                make = resolve_entry(kind.trainable)
                self.joins.append(make(name, sources=self._list_sources(name)))
        self.order = list(self.nodes)

    def _list_sources(self, name: str) -> dict[str, str]:
        """Return the node or pipeline input behind every input port of a node."""
        inputs = self.spec.nodes[name].inputs
        return {port: parse_reference(reference).node for port, reference in inputs.items()}

    def _set_up(self, name: str, model: Model) -> NodeSetup:
        """Return what a trainable node learns of its place in the pipeline."""
        feeds_list = False
        for node in self.spec.nodes.values():
            reads_it = any(parse_reference(r).node == name for r in node.inputs.values())
            feeds_list = feeds_list or (get_kind(node.kind).embeds_list and reads_it)
        return NodeSetup(
            name=name,
            config=model.config,
            tokenizer_json=model.tokenizer_json,
            sources=self._list_sources(name),
            feeds_list=feeds_list,
            is_unjoined=name in self.unjoined_encoders,
            labels_by_teacher=self.spec.data.labels == "teacher",
        )

    def collate(self, pairs: Pairs) -> Batch:
        """Preprocess and tokenize pairs for every model that reads them, onto the device."""
        inputs: dict[str, Tensor] = {}
        keep: dict[str, Tensor] = {}
        for name, node in self.nodes.items():
            inputs[name], mask = node.collate(pairs)
            if mask is not None:
                keep[name] = mask
        return Batch(inputs=inputs, keep=keep, names=pairs.names).move(self.device)

    def list_sources(self, name: str) -> tuple[str, ...]:
        """Return the models whose outputs `forward` gives to a node. Texts come from the data
        here."""
        return self.nodes[name].read_nodes

    def list_downstream(self, name: str) -> set[str]:
        """Return a node and every model that reads from it."""
        reached_nodes = {name}
        for other in self.order:
            if reached_nodes & set(self.list_sources(other)):
                reached_nodes.add(other)
        return reached_nodes

    def find_target_positions(self, batch: Batch, name: str) -> Tensor:
        """Return the positions of a generator whose next token counts [b, t - 1].

        Raises:
            TypeError: The node writes no text.
        """
        node = self.nodes[name]
        if not isinstance(node, TrainableWriter):
            raise TypeError(f"{name} writes no text: no position of it has a next token")
        return node.find_target_positions(batch)

    def forward(
        self, models: Models, batch: Batch, *, known_outputs: Outputs | None = None
    ) -> Outputs:
        """Run every model on a batch.

        Args:
            models: The models by node.
            batch: The inputs of b pairs.
            known_outputs: Outputs by node; these nodes are not run again.

        Returns:
            The outputs of every node.
        """
        outputs: Outputs = dict(known_outputs or {})
        for name, node in self.nodes.items():
            if name not in outputs:
                outputs[name] = node.forward(models[name], batch, outputs=outputs)
        return outputs

    def retry_with_fewer_pairs(self, work: Callable[[], Result]) -> Result:
        """Do some work. Where the memory of a GPU runs out, do it again with half the batch size.

        Args:
            work: Runs the models on pieces of at most `batch_size` pairs, and can be called again.

        Returns:
            What it returns.

        Raises:
            torch.OutOfMemoryError: A single pair is too much.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            # Behind the handler: what it holds keeps the tensors of the work that failed.
            self.batch_size //= 2
            free_memory(self.device)
            if not self._has_told_memory:
                self._has_told_memory = True
                self.tell_memory(
                    "the memory of the device ran out: fewer pairs run at once (data.batch)"
                )

    def forward_in_pieces(
        self, models: Models, batch: Batch, *, known_outputs: Outputs | None = None
    ) -> Outputs:
        """Run every model on a large batch in pieces of the spec's `data.batch`; arguments as in
        `forward`."""
        run_pieces = partial(self._forward_in_pieces, models, batch, known_outputs=known_outputs)
        return self.retry_with_fewer_pairs(run_pieces)

    @torch.inference_mode()
    def _forward_in_pieces(
        self, models: Models, batch: Batch, *, known_outputs: Outputs | None
    ) -> Outputs:
        """Run every model on a batch in pieces of at most `batch_size` pairs."""
        pieces: list[Outputs] = []
        whole_outputs = known_outputs or {}
        for start in range(0, len(batch), self.batch_size):
            rows = slice(start, start + self.batch_size)
            known_rows = {
                name: _select_rows(values, rows) for name, values in whole_outputs.items()
            }
            pieces.append(self.forward(models, batch[rows], known_outputs=known_rows))
        outputs: Outputs = {}
        for name, first in pieces[0].items():
            outputs[name] = {}
            for output_name in first:
                parts = [piece[name][output_name] for piece in pieces]
                outputs[name][output_name] = torch.cat(parts)
        return outputs

    def compute_losses(
        self, outputs: Outputs, batch: Batch, *, dense: Outputs | None = None
    ) -> dict[str, Tensor]:
        """Return the pipeline's own loss by part.

        Args:
            outputs: Outputs of every model.
            batch: The inputs that they belong to.
            dense: What `reference_outputs` gave for the dense pipeline; without it, drift does not
                count.

        Returns:
            Scalar losses by name: `contrast.<join>`, `drift.<join or node>`, `caption.<node>`, and
            others of a kind.
        """
        parts: dict[str, Tensor] = {}
        for join in self.joins:
            parts |= join.compute_losses(outputs, reference=dense)
        for node in self.nodes.values():
            parts |= node.compute_losses(batch, outputs=outputs, reference=dense)
        return parts

    def compute_quality(self, outputs: Outputs, batch: Batch) -> dict[str, float]:
        """Return the figures of every join and model on a batch, as `name_by_node` names them."""
        figures: dict[str, dict[str, float]] = {}
        for join in self.joins:
            figures[join.node_name] = join.compute_quality(outputs)
        for name, node in self.nodes.items():
            figures[name] = node.compute_quality(batch, outputs=outputs)
        return name_by_node(figures)

    @torch.inference_mode()
    def compute_loss(
        self,
        models: Models,
        batch: Batch,
        *,
        known_outputs: Outputs | None = None,
        dense: Outputs | None = None,
    ) -> float:
        """Return the loss over a whole batch: run in pieces, scored together."""
        outputs = self.forward_in_pieces(models, batch, known_outputs=known_outputs)
        return self.compute_loss_of_outputs(outputs, batch, dense=dense)

    @torch.inference_mode()
    def compute_loss_of_outputs(
        self, outputs: Outputs, batch: Batch, *, dense: Outputs | None = None
    ) -> float:
        """Return the loss of given outputs."""
        parts = self.compute_losses(outputs, batch, dense=dense)
        return float(sum(parts.values()))

    def compute_reference_outputs(self, models: Models, batch: Batch) -> Outputs:
        """Return what `losses` compares with: outputs of the dense models, as far as any loss needs
        them."""
        needed_nodes = {name for name, node in self.nodes.items() if node.needs_reference}
        reads_others = any(self.list_sources(name) for name in needed_nodes)
        skipped_outputs: Outputs = {}
        if not reads_others:
            skipped_outputs = {name: {} for name in self.order if name not in needed_nodes}
        outputs = self.forward_in_pieces(models, batch, known_outputs=skipped_outputs)
        return self.select_reference_outputs(outputs)

    def select_reference_outputs(self, dense: Outputs) -> Outputs:
        """Return the part of the dense models' outputs that `losses` compares with."""
        selected_outputs: Outputs = {}
        for name, node in self.nodes.items():
            if node.needs_reference:
                selected_outputs[name] = node.select_reference(dense[name])
        return selected_outputs


def _select_rows(values: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Return some rows of every output of a node."""
    return {name: tensor[rows] for name, tensor in values.items()}
