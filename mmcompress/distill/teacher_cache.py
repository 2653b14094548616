"""The teacher of a distillation, with a cache of its outputs: files of a small set come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.distill.compact_outputs import (
    compact_outputs,
    expand_outputs,
    name_tensors,
    pick_pair,
)
from mmcompress.distill.pair_plan import MIXED_DRAWS
from mmcompress.distill.teacher_store import CompactOutputs, TeacherStore
from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.models.device import CPU
from mmcompress.pipeline.forward import TorchPipeline

TEACHER_CACHE_BYTES = 1 << 30
"""Bytes of outputs that are kept at most. Pairs beyond them are run anew each time."""

PAIR_PREFIX = "pair:"
"""Stands before the name of a pair in the store: draws have names of their own."""

PairOutputs = Mapping[str, Mapping[str, Tensor]]
"""The outputs of one pair by node and output name, without the batch axis."""


class Teacher:
    """The models that a student learns from.

    Outputs of named pairs are kept in memory, and with a store on disk as well. Pairs without a
    name, such as scenes drawn at run time, come again in draws of the same name.

    What is stored differs a little from what was computed. So a training with a store reads what it
    has just written, too: it ends the same way whether a pair was known or not.
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
            store: Keeps the outputs on disk; None: they are computed each time.
        """
        self.store = store
        self.pipeline = pipeline
        self.models = models
        self.free_bytes = cache_bytes
        self.cache: dict[str, CompactOutputs] = {}
        self._recent_draws: OrderedDict[str, CompactOutputs] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Outputs:
        """Return the outputs of every model on a batch, as `TorchPipeline.forward` gives them.

        Logits at positions without a next token are 0 for named pairs.
        """
        return _move_outputs(self._answer(batch), self.pipeline.device)

    def _answer(self, batch: Batch) -> Outputs:
        """Return the outputs on a batch. What was kept is on the processor."""
        if batch.names:
            return self._answer_named_pairs(batch, batch.names)
        if batch.sources:
            return self._answer_mixed_pairs(batch)
        if self.store is None or not batch.draw:
            return self.pipeline.forward(self.models, batch)
        known_outputs = self.store.read(batch.draw)
        if known_outputs is None:
            outputs = self.pipeline.forward(self.models, batch)
            known_outputs = compact_outputs(outputs)
            self.store.write(batch.draw, known_outputs)
        return expand_outputs(known_outputs)

    def can_store(self, draw: str) -> bool:
        """Return whether the outputs of a draw are not kept yet, and there is room for them."""
        return self.store is not None and not self.store.holds(draw) and self.store.has_room

    def _answer_mixed_pairs(self, batch: Batch) -> Outputs:
        """Return the outputs on pairs of several draws; they are computed where one is unknown."""
        rows: list[PairOutputs] = []
        for pair, (draw, place) in enumerate(batch.sources):
            known_outputs = self._read_draw(draw)
            if known_outputs is None:
                return self.pipeline.forward(self.models, batch)
            outputs = expand_outputs(pick_pair(known_outputs, place))
            rows.append(_cut_logits(outputs, _count_targets(batch, pair)))
        return _join_pairs(rows, batch)

    def _read_draw(self, draw: str) -> CompactOutputs | None:
        """Return the outputs of a draw from the store. The last few stay in memory."""
        if draw not in self._recent_draws:
            outputs = self.store.read(draw) if self.store is not None else None
            if outputs is None:
                return None
            self._recent_draws[draw] = outputs
            if len(self._recent_draws) > MIXED_DRAWS:
                self._recent_draws.popitem(last=False)
        return self._recent_draws[draw]

    def _answer_named_pairs(self, batch: Batch, names: Sequence[str]) -> Outputs:
        """Return the outputs on a batch; those of pairs that were asked before are not computed."""
        rows: dict[str, CompactOutputs] = {}
        for name in names:
            row = self._find_row(name)
            if row is not None:
                rows[name] = row
        new_pairs = [i for i, name in enumerate(names) if name not in rows]
        if new_pairs:
            new_batch = batch.pick(new_pairs) if len(new_pairs) < len(batch) else batch
            new_outputs = self.pipeline.forward(self.models, new_batch)
            for place, pair in enumerate(new_pairs):
                outputs = _copy_pair(new_outputs, place, token_counts=_count_targets(batch, pair))
                rows[names[pair]] = self._keep_outputs(names[pair], outputs)
        return _join_pairs([expand_outputs(rows[name]) for name in names], batch)

    def _find_row(self, name: str) -> CompactOutputs | None:
        """Return the outputs of a pair from memory or from disk."""
        row = self.cache.get(name)
        if row is None and self.store is not None:
            row = self.store.read(PAIR_PREFIX + name)
            if row is not None:
                self._keep_in_memory(name, row)
        return row

    def _keep_outputs(self, name: str, outputs: PairOutputs) -> CompactOutputs:
        """Keep the outputs of a pair, where there is room; return them as they are kept."""
        if self.store is None:
            row = name_tensors(outputs)
        else:
            row = compact_outputs(outputs)
            self.store.write(PAIR_PREFIX + name, row)
        self._keep_in_memory(name, row)
        return row

    def _keep_in_memory(self, name: str, row: CompactOutputs) -> None:
        """Keep the outputs of a pair in memory, when there is room for them."""
        size = sum(tensor.nbytes for tensor in row.values())
        if size <= self.free_bytes:
            self.cache[name] = row
            self.free_bytes -= size


def _move_outputs(outputs: Outputs, device: torch.device) -> Outputs:
    """Return outputs on a device."""
    moved: Outputs = {}
    for node_name, node_outputs in outputs.items():
        moved[node_name] = {name: tensor.to(device) for name, tensor in node_outputs.items()}
    return moved


def _count_targets(batch: Batch, pair: int) -> dict[str, int]:
    """Count the positions of a pair that hold something, by node."""
    counts = {}
    for node_name, keep in batch.keep.items():
        counts[node_name] = int(keep[pair].sum())
    return counts


def _cut_logits(row: PairOutputs, token_counts: Mapping[str, int]) -> PairOutputs:
    """Return the outputs of a pair with logits only where a next token counts."""
    cut: dict[str, dict[str, Tensor]] = {}
    for node_name, node_outputs in row.items():
        cut[node_name] = dict(node_outputs)
        if "logits" in node_outputs:
            cut[node_name]["logits"] = node_outputs["logits"][: token_counts[node_name]]
    return cut


def _copy_pair(outputs: Outputs, place: int, *, token_counts: Mapping[str, int]) -> PairOutputs:
    """Copy the outputs at one place of a batch; logits only where a next token counts."""
    row: dict[str, dict[str, Tensor]] = {}
    for node_name, node_outputs in outputs.items():
        row[node_name] = {}
        for output_name, tensor in node_outputs.items():
            values = tensor[place]
            if output_name == "logits":
                values = values[: token_counts[node_name]]
            row[node_name][output_name] = values.to(CPU, copy=True)
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
