"""What the original pipeline answers, kept where the same pairs come again: a small set of files is seen many times."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcompress.kinds.base import Batch, Models, Outputs
from mmcompress.pipeline.forward import TorchPipeline

TEACHER_CACHE_BYTES = 1 << 30
"""Bytes of answers that are kept; pairs that come after those are answered anew each time."""


PairOutputs = Mapping[str, Mapping[str, Tensor]]
"""One pair's outputs by node and name."""


class Teacher:
    """The models a student learns from. Pairs without a name, such as scenes drawn at run time, never come again."""

    def __init__(self, pipeline: TorchPipeline, models: Models, *, room: int = TEACHER_CACHE_BYTES):
        self.pipeline, self.models, self.left = pipeline, models, room
        self.known: dict[str, PairOutputs] = {}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Outputs:
        """Outputs of every model, as `TorchPipeline.forward` gives them; logits where no next token is wanted are 0."""
        new = [i for i in range(len(batch)) if not batch.names or batch.names[i] not in self.known]
        out = (
            self.pipeline.forward(self.models, batch.pick(new) if len(new) < len(batch) else batch)
            if new
            else {}
        )
        if not batch.names:
            return out
        rows = {batch.names[i]: self._row(batch, i, out=out, at=at) for at, i in enumerate(new)}
        for name, row in rows.items():
            size = sum(v.nbytes for by in row.values() for v in by.values())
            if size <= self.left:
                self.known[name] = row
                self.left -= size
        return self._together(batch, [rows[n] if n in rows else self.known[n] for n in batch.names])

    def _row(self, batch: Batch, i: int, *, out: Outputs, at: int) -> PairOutputs:
        """Copies of the outputs of pair `i`, which stand at place `at`; of logits those that are wanted."""

        def wanted(node: str, key: str, v: Tensor) -> Tensor:
            return v[: int(batch.keep[node][i].sum())] if key == "logits" else v

        return {n: {k: wanted(n, k, v[at]).clone() for k, v in by.items()} for n, by in out.items()}

    def _together(self, batch: Batch, rows: list[PairOutputs]) -> Outputs:
        def joined(node: str, key: str) -> Tensor:
            parts = [row[node][key] for row in rows]
            if key == "logits":
                longest = batch.keep[node].shape[1]
                parts = [F.pad(p, (0, 0, 0, longest - len(p))) for p in parts]
            return torch.stack(parts)

        return {n: {k: joined(n, k) for k in by} for n, by in rows[0].items()}
