"""One trial on a worker: cut, refit, simulate the rounding, judge. Plain data in, plain data out."""

from __future__ import annotations

import importlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.kinds.base import Batch, Outputs
from mmcompress.models.base import Model
from mmcompress.models.sources import load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.refit import Gram, Grams, refit_from_gram_
from mmcompress.prune.surgery import copy_without_units
from mmcompress.prune.units import choose_units
from mmcompress.quantize.simulation import simulate_precision
from mmcompress.search.sensitivity.curves import SensitivityCurve, SensitivityCurves
from mmcompress.spec.schema import Spec
from mmcompress.storage import build_record, to_plain

WorkerContext = dict[str, Any]
"""What a worker needs: the spec as JSON and arrays; see `pack`."""


@dataclass(kw_only=True)
class _Loaded:
    spec: Spec
    models: dict[str, Model]
    pipeline: TorchPipeline
    scores: dict[str, dict[str, torch.Tensor]]
    grams: dict[str, Grams]
    batch: Batch
    anchors: Outputs = field(default_factory=dict)
    known: OutputCache = field(default_factory=lambda: OutputCache())
    spared: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    more: list[Batch] = field(default_factory=list)
    more_anchors: list[Outputs] = field(default_factory=list)


@dataclass(kw_only=True)
class OutputCache:
    """Outputs of node variants seen before, the oldest forgotten first: most trials change one or two nodes."""

    limit: int = 1 << 28
    """Bytes kept."""
    entries: OrderedDict[Any, dict[str, torch.Tensor]] = field(default_factory=OrderedDict)
    size: int = 0

    def get(self, key: Any) -> dict[str, torch.Tensor] | None:
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key: Any, outputs: dict[str, torch.Tensor]) -> None:
        if key in self.entries:
            return
        self.entries[key] = outputs
        self.size += _bytes(outputs)
        while self.size > self.limit:
            self.size -= _bytes(self.entries.popitem(last=False)[1])


def _bytes(outputs: dict[str, torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in outputs.values())


_cache: dict[str, _Loaded] = {}


def make_worker_context(
    spec: Spec,
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    grams: Mapping[str, Grams],
    batch: Batch,
    more: Batch | None,
    key: str,
    threads: int,
    spared: Mapping[str, Mapping[str, Sequence[str]]] = MappingProxyType({}),
) -> WorkerContext:
    """Everything a trial needs but the weights, which every worker loads from the spec's sources.

    `batch`: pairs that every candidate is judged on; `more`: those that the best few are judged on besides.
    """
    flat = lambda b: {
        part: {n: x.numpy() for n, x in getattr(b, part).items()} for part in ("inputs", "keep")
    }
    return {
        "key": key,
        "threads": threads,
        "spec": to_plain(spec),
        "spared": to_plain(dict(spared)),
        "scores": {n: {b: s.numpy() for b, s in by.items()} for n, by in scores.items()},
        "grams": {
            n: {b: (g.xx.numpy(), g.x.numpy(), g.n) for b, g in by.items()}
            for n, by in grams.items()
        },
        "batch": flat(batch),
        "more": flat(more) if more is not None else None,
    }


def make_estimate_context(
    curves: Mapping[str, SensitivityCurves],
    rounding: Mapping[str, Mapping[str, float]],
    *,
    base: float,
) -> WorkerContext:
    """What `estimate` needs: no weights, no pairs."""
    return {"curves": to_plain(curves), "rounding": to_plain(rounding), "base": base}


def estimate_candidate(context: WorkerContext, candidate: dict[str, Any]) -> dict[str, Any]:
    """Loss of a candidate as the sum of its blocks' damage, nothing run: {loss, quality, seconds}."""
    start = time.perf_counter()
    c = build_record(Candidate, candidate)
    loss = float(context["base"])
    for n, kept in c.kept_units.items():
        loss += sum(
            float(build_record(SensitivityCurve, context["curves"][n][b]).loss_increase(k))
            for b, k in kept.items()
        )
        loss += context["rounding"][n][c.precision[n]]
    return {"loss": loss, "quality": {}, "seconds": time.perf_counter() - start}


def _tensor(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(a))


def _batch(flat: Mapping[str, Mapping[str, np.ndarray]]) -> Batch:
    inputs = {n: _tensor(x) for n, x in flat["inputs"].items()}
    keep = {n: _tensor(x) for n, x in flat["keep"].items()}
    return Batch(inputs, keep)


def _load(context: WorkerContext) -> _Loaded:
    if context["key"] not in _cache:
        for plugin in context["spec"]["plugins"]:
            importlib.import_module(plugin)
        _cache.clear()
        spec = build_record(Spec, context["spec"])
        models = load_models(spec)
        _cache[context["key"]] = _Loaded(
            spec=spec,
            models=models,
            pipeline=TorchPipeline(spec, models),
            scores={
                n: {b: _tensor(s) for b, s in by.items()} for n, by in context["scores"].items()
            },
            grams={
                n: {b: Gram(xx=_tensor(xx), x=_tensor(x), n=c) for b, (xx, x, c) in by.items()}
                for n, by in context["grams"].items()
            },
            batch=_batch(context["batch"]),
            spared=context["spared"],
        )
        loaded = _cache[context["key"]]
        loaded.anchors = loaded.pipeline.reference_outputs(models, loaded.batch)
    return _cache[context["key"]]


def prune_node(
    model: Model,
    kept: KeptUnits,
    *,
    scores: Mapping[str, torch.Tensor],
    grams: Grams | None,
    ridge: float,
) -> Model:
    """A pruned copy of one model, refitted from the dense moments when `grams` are given."""
    units = choose_units(kept, model.blocks, scores=scores)
    cut = copy_without_units(model, units)
    if grams is not None:
        refit_from_gram_(cut, model, units=units, grams=grams, ridge=ridge)
    return cut.eval()


def _threads(judge: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """On as many threads as the context says, and as before after that: the process may be the one that trains."""

    @wraps(judge)
    def within(context: WorkerContext, candidate: dict[str, Any]) -> dict[str, Any]:
        before = torch.get_num_threads()
        torch.set_num_threads(context["threads"])
        try:
            return judge(context, candidate)
        finally:
            torch.set_num_threads(before)

    return within


@_threads
def evaluate_candidate(context: WorkerContext, candidate: dict[str, Any]) -> dict[str, Any]:
    """Loss and quality of a candidate on the choosing pairs: {loss, quality, seconds}."""
    start = time.perf_counter()
    loaded = _load(context)
    c, p = build_record(Candidate, candidate), loaded.pipeline
    keys: dict[str, Any] = {}
    for n in p.order:
        keys[n] = (
            n,
            tuple(sorted(c.kept_units[n].items())),
            c.precision[n],
            *(keys[source] for source in p.sources_of(n)),
        )
    found = {n: loaded.known.get(k) for n, k in keys.items()}
    known: Outputs = {n: o for n, o in found.items() if o is not None}
    outputs = _run(loaded, c, known=known)
    for n, o in outputs.items():
        loaded.known.put(keys[n], o)
    loss = p.loss_of_outputs(outputs, loaded.batch, dense=loaded.anchors)
    quality = p.quality(outputs, loaded.batch)
    return {"loss": loss, "quality": quality, "seconds": time.perf_counter() - start}


@_threads
def evaluate_on_more_pairs(context: WorkerContext, candidate: dict[str, Any]) -> dict[str, Any]:
    """Mean loss of a candidate over further pairs, as many at a time as it was judged on before: {loss, seconds}."""
    start = time.perf_counter()
    loaded, c, losses = _load(context), build_record(Candidate, candidate), []
    if not loaded.more:
        loaded.more = _batch(context["more"]).chunks(len(loaded.batch))
        loaded.more_anchors = [
            loaded.pipeline.reference_outputs(loaded.models, b) for b in loaded.more
        ]
    for batch, anchors in zip(loaded.more, loaded.more_anchors, strict=True):
        losses.append(
            loaded.pipeline.loss_of_outputs(
                _run(loaded, c, known={}, batch=batch), batch, dense=anchors
            )
        )
    return {"loss": sum(losses) / len(losses), "seconds": time.perf_counter() - start}


def _run(loaded: _Loaded, c: Candidate, *, known: Outputs, batch: Batch | None = None) -> Outputs:
    """Outputs of every node on choosing pairs; only nodes not in `known` are pruned, refitted and run."""
    prune, models = loaded.spec.prune, {}
    with ExitStack() as stack:
        for n, m in loaded.models.items():
            if n in known:
                continue
            grams = loaded.grams[n] if prune.refit else None
            models[n] = prune_node(
                m, c.kept_units[n], scores=loaded.scores[n], grams=grams, ridge=prune.ridge
            )
            spared = loaded.spared.get(n, {}).get(c.precision[n], ())
            stack.enter_context(
                simulate_precision(
                    models[n], c.precision[n], spared=models[n].list_linear_layers(spared)
                )
            )
        return loaded.pipeline.forward_in_pieces(
            models, loaded.batch if batch is None else batch, known=known
        )
