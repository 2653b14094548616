"""The teacher of a distillation, with a cache of its outputs: files of a small set come again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.pipeline.forward import TorchPipeline

TEACHER_CACHE_BYTES = 1 << 30
"""Bytes of outputs that are kept at most. Pairs beyond them are run anew each time."""

PairOutputs = Mapping[str, Mapping[str, Tensor]]
"""The outputs of one pair by node and output name, without the batch axis."""


class Teacher:
    """The models that a student learns from.

    Outputs of named pairs are kept in memory. Pairs without a name, such as scenes drawn at run
    time, come again in draws of the same name: these are kept on disk.
    """

    def __init__(
        self,
        pipeline: TorchPipeline,
        models: Models,
        *,
        cache_bytes: int = TEACHER_CACHE_BYTES,
        store: TeacherStore | None = None,
    ):
        """Make a teacher.

        Args:
            pipeline: The graph that the models run in.
            models: The models by node, usually the dense ones. They are not changed.
            cache_bytes: Bytes of outputs that may be kept in memory.
            store: Keeps the outputs of draws on disk; None: they are computed each time.
        """
        self.store = store
        self.pipeline = pipeline
        self.models = models
        self.free_bytes = cache_bytes
        self.cache: dict[str, PairOutputs] = {}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Outputs:
        """Return the outputs of every model on a batch, as `TorchPipeline.forward` gives them.

        Logits at positions without a next token are 0 for named pairs.
        """
        if self.store is None or batch.names or not batch.draw:
            return self._compute_new_pairs(batch)
        known_outputs = self.store.read(batch.draw)
        if known_outputs is not None:
            return known_outputs
        outputs = self._compute_new_pairs(batch)
        self.store.write(batch.draw, outputs)
        kept_outputs = self.store.read(batch.draw)
        return outputs if kept_outputs is None else kept_outputs

    def _compute_new_pairs(self, batch: Batch) -> Outputs:
        """Return the outputs on a batch; those of pairs in the cache are taken from there."""
        new_pairs = self._list_new_pairs(batch)
        new_outputs: Outputs = {}
        if new_pairs:
            new_batch = batch.pick(new_pairs) if len(new_pairs) < len(batch) else batch
            new_outputs = self.pipeline.forward(self.models, new_batch)
        if not batch.names:
            return new_outputs
        new_rows: dict[str, PairOutputs] = {}
        for place, pair in enumerate(new_pairs):
            new_rows[batch.names[pair]] = _copy_pair(
                new_outputs, place, token_counts=_count_targets(batch, pair)
            )
        for name, row in new_rows.items():
            self._keep_row(name, row)
        rows = [new_rows[name] if name in new_rows else self.cache[name] for name in batch.names]
        return _join_pairs(rows, batch)

    def _list_new_pairs(self, batch: Batch) -> list[int]:
        """Return the indices of the pairs that are not in the cache."""
        if not batch.names:
            return list(range(len(batch)))
        return [i for i, name in enumerate(batch.names) if name not in self.cache]

    def _keep_row(self, name: str, row: PairOutputs) -> None:
        """Keep the outputs of a pair, when there is room for them."""
        size = 0
        for outputs in row.values():
            size += sum(tensor.nbytes for tensor in outputs.values())
        if size <= self.free_bytes:
            self.cache[name] = row
            self.free_bytes -= size


def _count_targets(batch: Batch, pair: int) -> dict[str, int]:
    """Count the positions of a pair that hold something, by node."""
    counts = {}
    for node_name, keep in batch.keep.items():
        counts[node_name] = int(keep[pair].sum())
    return counts


def _copy_pair(outputs: Outputs, place: int, *, token_counts: Mapping[str, int]) -> PairOutputs:
    """Copy the outputs at one place of a batch; logits only where a next token counts."""
    row: dict[str, dict[str, Tensor]] = {}
    for node_name, node_outputs in outputs.items():
        row[node_name] = {}
        for output_name, tensor in node_outputs.items():
            values = tensor[place]
            if output_name == "logits":
                values = values[: token_counts[node_name]]
            row[node_name][output_name] = values.clone()
    return row


def _join_pairs(rows: Sequence[PairOutputs], batch: Batch) -> Outputs:
    """Stack the outputs of pairs into those of a batch; logits are padded with 0."""
    outputs: Outputs = {}
    for node_name, first in rows[0].items():
        outputs[node_name] = {}
        for output_name in first:
            parts = [row[node_name][output_name] for row in rows]
            if output_name == "logits":
                length = batch.keep[node_name].shape[1]
                parts = [F.pad(part, (0, 0, 0, length - len(part))) for part in parts]
            outputs[node_name][output_name] = torch.stack(parts)
    return outputs
