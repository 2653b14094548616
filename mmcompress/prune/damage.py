"""Damage of every (block, level): how much the pipeline's loss rises when one block alone is cut and refitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mmcompress.graph.pipeline import Batch, Models, TorchPipeline
from mmcompress.prune.allocation import Curve, after, choose_units, steps
from mmcompress.prune.refit import Grams, refit_from_gram_
from mmcompress.prune.surgery import sliced
from mmcompress.records import Block

SHARES = (0.25, 0.5, 0.75, 1.0)
NO_LIMIT: Mapping[str, float] = MappingProxyType({})


@torch.inference_mode()
def measure(
    pipeline: TorchPipeline,
    models: Models,
    batch: Batch,
    scores: Mapping[str, Mapping[str, Tensor]],
    grams: Mapping[str, Grams],
    ridge: float,
    progress: Callable[[str, float], None] = lambda what, share: None,
    shortest: Mapping[str, float] = NO_LIMIT,
) -> dict[str, dict[str, Curve]]:
    """Curves per node and block. Only the nodes downstream of the cut are run again.

    `shortest`: the largest share of its positions that a node may lose. Damage rises steeply where the end of what is
    seen or heard begins: levels beyond would say too much of those within.
    """
    dense = pipeline.run(models, batch)
    anchors = pipeline.anchors_of(dense)
    base = pipeline.judge(dense, batch, anchors)
    found: dict[str, dict[str, Curve]] = {}
    total = sum(len(m.blocks) for m in models.values())
    done = 0
    for node, model in models.items():
        again = pipeline.downstream(node)
        known = {n: o for n, o in dense.items() if n not in again}
        found[node] = {}
        for block in model.blocks:
            progress(f"{node}.{block.name}", done / total)
            done += 1
            points = {block.units: 0.0}
            for kept in _levels(block, shortest.get(node, 0.0)):
                cut = _cut(model, block, kept, scores[node], grams[node], ridge)
                loss = pipeline.evaluate({**models, node: cut}, batch, known, anchors)
                points[kept] = max(loss - base, 0.0)
            order = sorted(points)
            found[node][block.name] = Curve(tuple(order), tuple(points[k] for k in order))
    return found


def _levels(block: Block, shortest: float) -> list[int]:
    """Units kept at which damage is measured, all of them aside."""
    most = shortest if block.group == "tokens" and shortest else 1.0
    return sorted({int(after(block, round(s * most * steps(block)))) for s in SHARES} - {block.units}, reverse=True)


def estimate(
    models: Models, scores: Mapping[str, Mapping[str, Tensor]], pairs: int, shortest: Mapping[str, float] = NO_LIMIT
) -> dict[str, dict[str, Curve]]:
    """Curves without running anything: half the mask Fisher information that is cut, per pair (Kwon et al. 2022)."""
    found: dict[str, dict[str, Curve]] = {}
    for node, model in models.items():
        found[node] = {}
        for block in model.blocks:
            given = scores[node][block.name]
            lost = (given.flip(0) if block.ordered else given.sort().values).cumsum(0) / (2 * pairs)
            kept = sorted({block.units, *_levels(block, shortest.get(node, 0.0))})
            points = tuple(float(lost[block.units - k - 1]) if k < block.units else 0.0 for k in kept)
            found[node][block.name] = Curve(tuple(kept), points)
    return found


def _cut(model, block: Block, kept: int, scores: Mapping[str, Tensor], grams: Grams, ridge: float):  # type: ignore[no-untyped-def]
    units = choose_units({block.name: kept}, [block], scores)
    cut = sliced(model, units)
    refit_from_gram_(cut, model, units, grams, ridge)
    return cut.eval()
