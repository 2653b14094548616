"""TODO."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from mmcompress.graph.structure import Candidate
from mmcompress.models.base import Model
from mmcompress.prune.importance import Scores
from mmcompress.prune.refit import Gram, Grams
from mmcompress.search.sensitivity.curves import SensitivityCurve
from mmcompress.storage import build_record

Fp32Blocks = dict[str, dict[str, tuple[str, ...]]]


MIN_LOSS_INCREASE_SHARE = 3e-5
"""See `Evidence._trace`."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Importance, input moments, damage curves, damage of rounding by node and precision, and the dense loss."""

    scores: Scores
    grams: dict[str, Grams]
    curves: dict[str, dict[str, SensitivityCurve]]
    rounding: dict[str, dict[str, float]]
    base_loss: float
    fp32_blocks: Fp32Blocks
    """Blocks that stay in fp32, by node and precision."""

    def loss_increase(self, node: str, block: str, kept: int) -> float:
        """What keeping so many units of one block does to the loss, measured with all else whole."""
        return float(self.curves[node][block].loss_increase(kept))

    def scaled(
        self, cuts: Mapping[str, Mapping[str, float]], rounding: Mapping[str, float]
    ) -> Sensitivity:
        """The same with damage so many times as high, by node and block; 1 where a factor is missing.

        Curves are made to rise first, the more is cut, and all damage gets a trace on top: a factor of what is next to
        nothing would be chance.
        """
        every = {n: {b: self._rising(n, c) for b, c in of.items()} for n, of in self.curves.items()}
        times = lambda c, by: SensitivityCurve(
            c.kept_units, tuple(by * d for d in c.loss_increases)
        )
        curves = {
            n: {b: times(c, cuts.get(n, {}).get(b, 1.0)) for b, c in of.items()}
            for n, of in every.items()
        }
        rounded = lambda n, p, d: rounding.get(n, 1.0) * (d + self._trace(n)) if p != "fp32" else d
        whole = {n: {p: rounded(n, p, d) for p, d in of.items()} for n, of in self.rounding.items()}
        return replace(self, curves=curves, rounding=whole)

    def _trace(self, node: str) -> float:
        """What is next to nothing in a node: a share of what the block that can least be missed does when gone."""
        return (
            MIN_LOSS_INCREASE_SHARE
            * max((max(c.loss_increases) for c in self.curves[node].values()), default=0.0)
            + 1e-9
        )

    def _rising(self, node: str, c: SensitivityCurve) -> SensitivityCurve:
        rising = np.maximum.accumulate(c.loss_increases[::-1])[::-1]
        trace = self._trace(node) * (1 - np.asarray(c.kept_units) / c.kept_units[-1])
        return SensitivityCurve(c.kept_units, tuple((rising + trace).tolist()))


def _read(models: Mapping[str, Model], record: Path, *, tensors: Path) -> Sensitivity:
    data, flat = json.loads(record.read_text()), load_file(tensors)
    scores = {n: {b.name: flat[f"score/{n}/{b.name}"] for b in m.blocks} for n, m in models.items()}
    grams = {
        n: {
            b.name: Gram(
                xx=flat[f"xx/{n}/{b.name}"],
                x=flat[f"x/{n}/{b.name}"],
                n=float(flat[f"n/{n}/{b.name}"]),
            )
            for b in m.blocks
            if f"xx/{n}/{b.name}" in flat
        }
        for n, m in models.items()
    }
    curves = {
        n: {b: build_record(SensitivityCurve, c) for b, c in by.items()}
        for n, by in data["curves"].items()
    }
    spared = {n: {p: tuple(bs) for p, bs in by.items()} for n, by in data["spared"].items()}
    return Sensitivity(
        scores=scores,
        grams=grams,
        curves=curves,
        rounding=data["rounding"],
        base_loss=data["base_loss"],
        fp32_blocks=spared,
    )


def select_fp32_blocks(ev: Sensitivity, c: Candidate) -> dict[str, tuple[str, ...]]:
    """Blocks of a candidate that stay in fp32, by node."""
    return {n: ev.fp32_blocks.get(n, {}).get(p, ()) for n, p in c.precision.items()}
