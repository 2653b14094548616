"""One trial on a worker: cut, refit, simulate the rounding, judge. Plain data in, plain data out."""

from __future__ import annotations

import importlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmcompress.graph.pipeline import Batch, Outputs, TorchPipeline
from mmcompress.models.base import Model
from mmcompress.models.sources import load_models
from mmcompress.prune.allocation import Curve, Curves, choose_units
from mmcompress.prune.refit import Gram, Grams, refit_from_gram_
from mmcompress.prune.surgery import sliced
from mmcompress.quantize.simulated import simulated
from mmcompress.records import Candidate, Kept, build, plain
from mmcompress.spec.schema import Spec

Context = dict[str, Any]
"""What a worker needs: the spec as JSON and arrays; see `pack`."""


@dataclass
class _Loaded:
    spec: Spec
    models: dict[str, Model]
    pipeline: TorchPipeline
    scores: dict[str, dict[str, torch.Tensor]]
    grams: dict[str, Grams]
    batch: Batch
    anchors: Outputs = field(default_factory=dict)
    known: Known = field(default_factory=lambda: Known())


@dataclass
class Known:
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


def pack(
    spec: Spec,
    scores: Mapping[str, Mapping[str, torch.Tensor]],
    grams: Mapping[str, Grams],
    batch: Batch,
    key: str,
    threads: int,
) -> Context:
    """Everything a trial needs but the weights, which every worker loads from the spec's sources."""
    return {
        "key": key,
        "threads": threads,
        "spec": plain(spec),
        "scores": {n: {b: s.numpy() for b, s in by.items()} for n, by in scores.items()},
        "grams": {n: {b: (g.xx.numpy(), g.x.numpy(), g.n) for b, g in by.items()} for n, by in grams.items()},
        "batch": {n: x.numpy() for n, x in batch.inputs.items()},
        "keep": {n: x.numpy() for n, x in batch.keep.items()},
    }


def pack_estimate(curves: Mapping[str, Curves], rounding: Mapping[str, Mapping[str, float]], base: float) -> Context:
    """What `estimate` needs: no weights, no pairs."""
    return {"curves": plain(curves), "rounding": plain(rounding), "base": base}


def estimate(context: Context, candidate: dict[str, Any]) -> dict[str, Any]:
    """Loss of a candidate as the sum of its blocks' damage, nothing run: {loss, quality, seconds}."""
    start = time.perf_counter()
    c = build(Candidate, candidate)
    loss = float(context["base"])
    for n, kept in c.kept.items():
        loss += sum(float(build(Curve, context["curves"][n][b]).at(k)) for b, k in kept.items())
        loss += context["rounding"][n][c.precision[n]]
    return {"loss": loss, "quality": {}, "seconds": time.perf_counter() - start}


def _tensor(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(a))


def _load(context: Context) -> _Loaded:
    if context["key"] not in _cache:
        for plugin in context["spec"]["plugins"]:
            importlib.import_module(plugin)
        _cache.clear()
        spec = build(Spec, context["spec"])
        models = load_models(spec)
        _cache[context["key"]] = _Loaded(
            spec,
            models,
            TorchPipeline(spec, models),
            {n: {b: _tensor(s) for b, s in by.items()} for n, by in context["scores"].items()},
            {
                n: {b: Gram(_tensor(xx), _tensor(x), c) for b, (xx, x, c) in by.items()}
                for n, by in context["grams"].items()
            },
            Batch(*({n: _tensor(x) for n, x in context[part].items()} for part in ("batch", "keep"))),
        )
        loaded = _cache[context["key"]]
        loaded.anchors = loaded.pipeline.anchors(models, loaded.batch)
    return _cache[context["key"]]


def prune_node(
    model: Model, kept: Kept, scores: Mapping[str, torch.Tensor], grams: Grams | None, ridge: float
) -> Model:
    """A pruned copy of one model, refitted from the dense moments when `grams` are given."""
    units = choose_units(kept, model.blocks, scores)
    cut = sliced(model, units)
    if grams is not None:
        refit_from_gram_(cut, model, units, grams, ridge)
    return cut.eval()


def evaluate(context: Context, candidate: dict[str, Any]) -> dict[str, Any]:
    """Loss and quality of a candidate on the choosing pairs: {loss, quality, seconds}."""
    start = time.perf_counter()
    torch.set_num_threads(context["threads"])
    loaded = _load(context)
    c, p = build(Candidate, candidate), loaded.pipeline
    keys: dict[str, Any] = {}
    for n in p.order:
        keys[n] = (n, tuple(sorted(c.kept[n].items())), c.precision[n], *(keys[source] for source in p.reads(n)))
    found = {n: loaded.known.get(k) for n, k in keys.items()}
    known: Outputs = {n: o for n, o in found.items() if o is not None}
    outputs = _run(loaded, c, known)
    for n, o in outputs.items():
        loaded.known.put(keys[n], o)
    loss, quality = p.judge(outputs, loaded.batch, loaded.anchors)
    return {"loss": loss, "quality": quality, "seconds": time.perf_counter() - start}


def _run(loaded: _Loaded, c: Candidate, known: Outputs) -> Outputs:
    """Outputs of every node on the choosing pairs; only nodes not in `known` are pruned, refitted and run."""
    prune, models = loaded.spec.prune, {}
    with ExitStack() as stack:
        for n, m in loaded.models.items():
            if n in known:
                continue
            grams = loaded.grams[n] if prune.refit else None
            models[n] = prune_node(m, c.kept[n], loaded.scores[n], grams, prune.ridge)
            stack.enter_context(simulated(models[n], c.precision[n]))
        return loaded.pipeline.run(models, loaded.batch, known)
