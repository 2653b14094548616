"""Everything the search stands on, measured once per run on training pairs and kept in the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mmcompress.data.base import Dataset
from mmcompress.graph.pipeline import TorchPipeline
from mmcompress.models.base import Model
from mmcompress.prune import damage
from mmcompress.prune.allocation import SensitivityCurve
from mmcompress.prune.importance import ImportanceInputs, Scores, score_units
from mmcompress.prune.refit import Gram, Grams, measure_grams
from mmcompress.quantize.simulated import simulate_precision
from mmcompress.records import build_record, to_plain, write_record
from mmcompress.registry import IMPORTANCE
from mmcompress.spec.schema import Spec

Fp32Blocks = dict[str, dict[str, tuple[str, ...]]]


MIN_LOSS_INCREASE_SHARE = 3e-5
"""See `Evidence._trace`."""


@dataclass(frozen=True)
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

    def scaled(self, cuts: Mapping[str, Mapping[str, float]], rounding: Mapping[str, float]) -> Sensitivity:
        """The same with damage so many times as high, by node and block; 1 where a factor is missing.

        Curves are made to rise first, the more is cut, and all damage gets a trace on top: a factor of what is next to
        nothing would be chance.
        """
        every = {n: {b: self._rising(n, c) for b, c in of.items()} for n, of in self.curves.items()}
        times = lambda c, by: SensitivityCurve(c.kept_units, tuple(by * d for d in c.loss_increases))
        curves = {n: {b: times(c, cuts.get(n, {}).get(b, 1.0)) for b, c in of.items()} for n, of in every.items()}
        rounded = lambda n, p, d: rounding.get(n, 1.0) * (d + self._trace(n)) if p != "fp32" else d
        whole = {n: {p: rounded(n, p, d) for p, d in of.items()} for n, of in self.rounding.items()}
        return replace(self, curves=curves, rounding=whole)

    def _trace(self, node: str) -> float:
        """What is next to nothing in a node: a share of what the block that can least be missed does when gone."""
        return (
            MIN_LOSS_INCREASE_SHARE * max((max(c.loss_increases) for c in self.curves[node].values()), default=0.0)
            + 1e-9
        )

    def _rising(self, node: str, c: SensitivityCurve) -> SensitivityCurve:
        rising = np.maximum.accumulate(c.loss_increases[::-1])[::-1]
        trace = self._trace(node) * (1 - np.asarray(c.kept_units) / c.kept_units[-1])
        return SensitivityCurve(c.kept_units, tuple((rising + trace).tolist()))


def gather_sensitivity(
    spec: Spec,
    pipeline: TorchPipeline,
    models: Mapping[str, Model],
    data: Dataset,
    folder: Path,
    progress: Callable[[str, float], None],
    precisions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    shortest: Mapping[str, float] = damage.NO_LIMIT,
) -> Sensitivity:
    """Input moments, importance, damage of every (block, level), damage of the `precisions` of each node.

    `shortest`: see `damage.measure`.
    """
    record, tensors = folder / "evidence.json", folder / "evidence.safetensors"
    if record.exists() and tensors.exists():
        return _read(models, record, tensors)
    progress("input statistics", 0.0)
    batch = pipeline.collate(data.load("train", spec.data.calibration))
    measured = spec.prune.sensitivity == "measured"
    trials_run = spec.search.evaluator == "measured" and spec.prune.refit
    # of a large model they are larger than its weights
    grams = measure_grams(pipeline, models, batch) if measured or trials_run else {n: {} for n in models}
    progress(spec.prune.importance, 0.1)
    criterion = IMPORTANCE.get(spec.prune.importance)
    scores = score_units(criterion, ImportanceInputs(pipeline, models, batch, grams, spec.seed))
    some = batch[slice(0, spec.data.sensitivity_pairs)]
    anchors = pipeline.reference_outputs(models, some)
    base = pipeline.loss_of_models(models, some, dense=anchors)
    spared: Fp32Blocks = {n: {} for n in models}
    rounding = {n: dict.fromkeys(precisions.get(n, ("fp32", "int8")), 0.0) for n in models}
    if measured:
        say = lambda what, share: progress(f"damage of {what}", 0.2 + 0.8 * share)
        curves = damage.measure_sensitivity(pipeline, models, some, scores, grams, spec.prune.ridge, say, shortest)
    else:
        curves = damage.estimate_sensitivity(models, scores, len(batch), shortest)
    loss = lambda: max(pipeline.loss_of_models(models, some, dense=anchors) - base, 0.0)
    for n, m in models.items():
        for p in (p for p in rounding[n] if p != "fp32"):
            if spec.quantize.max_loss_increase:
                progress(f"sensitivity of {n} to {p}", 1.0)
                spared[n][p] = find_sensitive_blocks(m, p, loss, spec.quantize.max_loss_increase)
            with simulate_precision(m, p, m.linear_layers(spared[n].get(p, ()))):
                rounding[n][p] = loss()
    flat = {f"score/{n}/{b}": s.contiguous() for n, by in scores.items() for b, s in by.items()}
    for n, by in grams.items():
        for b, g in by.items():
            flat |= {f"xx/{n}/{b}": g.xx, f"x/{n}/{b}": g.x, f"n/{n}/{b}": torch.tensor(g.n)}
    save_file(flat, tensors)
    write_record(record, {"curves": to_plain(curves), "rounding": rounding, "base_loss": base, "spared": spared})
    return Sensitivity(scores, grams, curves, rounding, base, spared)


def find_sensitive_blocks(model: Model, precision: str, loss: Callable[[], float], bound: float) -> tuple[str, ...]:
    """The blocks whose rounding alone raises the loss by more than `bound`."""
    found = []
    for b in model.weighted_blocks:
        with simulate_precision(model, precision, only=model.linear_layers((b.name,))):
            if loss() > bound:
                found.append(b.name)
    return tuple(found)


def _read(models: Mapping[str, Model], record: Path, tensors: Path) -> Sensitivity:
    data, flat = json.loads(record.read_text()), load_file(tensors)
    scores = {n: {b.name: flat[f"score/{n}/{b.name}"] for b in m.blocks} for n, m in models.items()}
    grams = {
        n: {
            b.name: Gram(flat[f"xx/{n}/{b.name}"], flat[f"x/{n}/{b.name}"], float(flat[f"n/{n}/{b.name}"]))
            for b in m.blocks
            if f"xx/{n}/{b.name}" in flat
        }
        for n, m in models.items()
    }
    curves = {n: {b: build_record(SensitivityCurve, c) for b, c in by.items()} for n, by in data["curves"].items()}
    spared = {n: {p: tuple(bs) for p, bs in by.items()} for n, by in data["spared"].items()}
    return Sensitivity(scores, grams, curves, data["rounding"], data["base_loss"], spared)
