"""One trial on a worker: cut, refit, simulate the rounding, evaluate. Plain data in and out."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor

from mmcompress.data.remote_files import trim_remote_cache
from mmcompress.graph.structure import Candidate, Fp32Blocks, KeptUnits, find_fp32_blocks
from mmcompress.kinds.base import Batch, Outputs
from mmcompress.models.base import Model
from mmcompress.models.device import CPU, place_models
from mmcompress.models.sources import load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.refit import Gram, Grams, refit_from_gram_
from mmcompress.prune.surgery import copy_without_units
from mmcompress.prune.units import choose_units
from mmcompress.quantize.simulation import simulate_precision
from mmcompress.search.executors import TaskResult
from mmcompress.search.sensitivity.curves import SensitivityTable
from mmcompress.spec.schema import Spec
from mmcompress.storage import build_record, to_plain

OUTPUT_CACHE_BYTES = 1 << 28
"""Bytes of node outputs that a worker keeps between trials: most trials change one or two nodes."""

PlainCandidate = dict[str, object]
"""A `Candidate` as plain data, as it crosses to a worker."""


@dataclass(frozen=True, kw_only=True)
class BatchArrays:
    """A `Batch` as arrays."""

    inputs: dict[str, np.ndarray]
    """Inputs of every model [b, ...], by node."""
    keep: dict[str, np.ndarray]
    """Positions that hold something [b, p], by node; a node is missing where all of them do."""


@dataclass(frozen=True, kw_only=True)
class GramArrays:
    """A `Gram` as arrays."""

    xx: np.ndarray
    """Sum of x x^T over rows [f, f]."""
    x: np.ndarray
    """Sum of x over rows [f]."""
    n: float
    """Rows."""


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What a worker needs to evaluate candidates. It loads weights from the spec's sources."""

    key: str
    """Name of this context, unique in a process: a worker keeps what it loaded under it."""
    threads: int
    """Threads of torch during an evaluation."""
    plugins: tuple[str, ...]
    """Modules that are imported before the spec is read: it may use names they register."""
    spec: dict[str, object]
    """The spec as plain data."""
    scores: dict[str, dict[str, np.ndarray]]
    """Importance [units] by node and block."""
    grams: dict[str, dict[str, GramArrays]]
    """Input moments for the refit, by node and block."""
    fp32_blocks: Fp32Blocks
    """Blocks that stay in fp32, by node and precision."""
    batch: BatchArrays
    """Validation pairs that every candidate is evaluated on."""
    more_pairs: BatchArrays | None
    """Further validation pairs for the best few, in whole multiples of `batch`; None: no more."""


@dataclass(frozen=True, kw_only=True)
class EstimateContext:
    """What `estimate_candidate` needs: no weights, no pairs."""

    table: SensitivityTable
    """Loss increases of every cut and rounding."""
    base_loss: float
    """Loss of the dense pipeline."""


class OutputCache:
    """Outputs of node variants, the least recently used forgotten first.

    Args:
        max_bytes: Bytes kept. Outputs of one node that are larger are not kept.
    """

    def __init__(self, max_bytes: int = OUTPUT_CACHE_BYTES):
        self._outputs: LRUCache[Hashable, dict[str, Tensor]] = LRUCache(
            maxsize=max_bytes, getsizeof=count_bytes
        )

    @property
    def size_bytes(self) -> int:
        """Bytes kept now."""
        return int(self._outputs.currsize)

    def get(self, key: Hashable) -> dict[str, Tensor] | None:
        """Return the outputs kept under a key, or None."""
        return self._outputs.get(key)

    def put(self, key: Hashable, outputs: dict[str, Tensor]) -> None:
        """Keep outputs unless they are larger than the cache or kept already."""
        if key not in self._outputs and count_bytes(outputs) <= self._outputs.maxsize:
            self._outputs[key] = outputs


def count_bytes(outputs: Mapping[str, Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in outputs.values())


@dataclass(kw_only=True)
class _WorkerState:
    """A context as loaded: models, tensors, and what was computed from them."""

    spec: Spec
    """The pipeline."""
    models: dict[str, Model]
    """The dense models by node."""
    pipeline: TorchPipeline
    """The graph that the models run in."""
    scores: dict[str, dict[str, Tensor]]
    """Importance of every unit [units], by node and block."""
    grams: dict[str, Grams]
    """Moments of the inputs of every block, by node: what a refit needs."""
    fp32_blocks: Fp32Blocks
    """Blocks that stay in fp32 when a node is rounded."""
    batch: Batch
    """Validation pairs that trials are evaluated on."""
    references: Outputs
    """Outputs of the dense pipeline on `batch` that losses are measured against."""
    output_cache: OutputCache = field(default_factory=OutputCache)
    """Outputs of pruned nodes that other trials may ask for again."""
    more_batches: list[Batch] = field(default_factory=list)
    """Further pairs in pieces as large as `batch`; empty until a finalist is evaluated."""
    more_references: list[Outputs] = field(default_factory=list)
    """Outputs of the dense pipeline on each of `more_batches`."""


_loaded_states: dict[str, _WorkerState] = {}
"""The state of the last context of this process, by its key."""


def make_worker_context(
    spec: Spec,
    *,
    scores: Mapping[str, Mapping[str, Tensor]],
    grams: Mapping[str, Grams],
    fp32_blocks: Fp32Blocks,
    batch: Batch,
    more_pairs: Batch | None,
    key: str,
    threads: int,
) -> WorkerContext:
    """Make the context of both functions that run models; for arguments see `WorkerContext`."""
    score_arrays = {}
    for node_name, node_scores in scores.items():
        score_arrays[node_name] = {block: tensor.numpy() for block, tensor in node_scores.items()}
    gram_arrays = {}
    for node_name, node_grams in grams.items():
        gram_arrays[node_name] = {
            block: _make_gram_arrays(gram.move(CPU)) for block, gram in node_grams.items()
        }
    return WorkerContext(
        key=key,
        threads=threads,
        plugins=spec.plugins,
        spec=to_plain(spec),
        scores=score_arrays,
        grams=gram_arrays,
        fp32_blocks=to_plain(dict(fp32_blocks)),
        batch=_make_batch_arrays(batch),
        more_pairs=None if more_pairs is None else _make_batch_arrays(more_pairs),
    )


def estimate_candidate(context: EstimateContext, candidate: PlainCandidate) -> TaskResult:
    """Estimate the loss of a candidate: dense loss plus all its increases. No model is run."""
    start = time.perf_counter()
    loss = context.base_loss + context.table.add_losses(build_record(Candidate, candidate))
    return {"loss": loss, "quality": {}, "seconds": time.perf_counter() - start}


EvaluateOnWorker = Callable[[WorkerContext, PlainCandidate], TaskResult]


def _limit_threads(evaluate: EvaluateOnWorker) -> EvaluateOnWorker:
    """Run `evaluate` on the threads its context names, and restore the number after it.

    The process may be the one that trains, and Ray leaves torch in a reused worker at one thread.
    """

    @wraps(evaluate)
    def evaluate_with_threads(context: WorkerContext, candidate: PlainCandidate) -> TaskResult:
        threads_before = torch.get_num_threads()
        torch.set_num_threads(context.threads)
        try:
            return evaluate(context, candidate)
        finally:
            torch.set_num_threads(threads_before)

    return evaluate_with_threads


@_limit_threads
def evaluate_candidate(context: WorkerContext, candidate: PlainCandidate) -> TaskResult:
    """Measure loss and quality of a candidate on the validation pairs."""
    start = time.perf_counter()
    state = _load_state(context)
    structure = build_record(Candidate, candidate)
    cache_keys = _make_cache_keys(state.pipeline, structure)
    cached_outputs: Outputs = {}
    for node_name, cache_key in cache_keys.items():
        node_outputs = state.output_cache.get(cache_key)
        if node_outputs is not None:
            cached_outputs[node_name] = node_outputs
    outputs = _run_candidate(state, structure, batch=state.batch, known_outputs=cached_outputs)
    for node_name, node_outputs in outputs.items():
        state.output_cache.put(cache_keys[node_name], node_outputs)
    loss = state.pipeline.compute_loss_of_outputs(outputs, state.batch, dense=state.references)
    quality = state.pipeline.compute_quality(outputs, state.batch)
    return {"loss": loss, "quality": quality, "seconds": time.perf_counter() - start}


@_limit_threads
def evaluate_on_more_pairs(context: WorkerContext, candidate: PlainCandidate) -> TaskResult:
    """Measure the mean loss of a candidate over further pairs.

    They come in pieces as large as the first batch: a contrastive loss depends on how many pairs
    are compared.
    """
    start = time.perf_counter()
    state = _load_state(context)
    structure = build_record(Candidate, candidate)
    if not state.more_batches:
        assert context.more_pairs is not None, "the context has no further pairs"
        more_pairs = _make_batch(context.more_pairs).move(state.pipeline.device)
        state.more_batches = more_pairs.split_evenly(len(state.batch))
        state.more_references = [
            state.pipeline.compute_reference_outputs(state.models, batch)
            for batch in state.more_batches
        ]
    losses = []
    for batch, references in zip(state.more_batches, state.more_references, strict=True):
        outputs = _run_candidate(state, structure, batch=batch, known_outputs={})
        losses.append(state.pipeline.compute_loss_of_outputs(outputs, batch, dense=references))
    return {"loss": sum(losses) / len(losses), "seconds": time.perf_counter() - start}


def prune_node(
    model: Model,
    kept_units: KeptUnits,
    *,
    scores: Mapping[str, Tensor],
    grams: Grams | None,
    ridge: float,
) -> Model:
    """Make a pruned copy of one model.

    Args:
        model: The dense model; it stays as it is.
        kept_units: Units kept by block; blocks it does not name stay whole.
        scores: Importance [units] by block; the least important units go.
        grams: Dense input moments by block, for the refit of output projections. None: no refit.
        ridge: Share of the mean variance on the diagonal of the refit.

    Returns:
        The copy, in evaluation mode.
    """
    units = choose_units(kept_units, model.blocks, scores=scores)
    pruned_model = copy_without_units(model, units)
    if grams is not None:
        refit_from_gram_(pruned_model, model, units=units, grams=grams, ridge=ridge)
    return pruned_model.eval()


def _load_state(context: WorkerContext) -> _WorkerState:
    """Load a context, or return what this process loaded for it before."""
    if context.key in _loaded_states:
        return _loaded_states[context.key]
    for plugin in context.plugins:
        importlib.import_module(plugin)
    # The models of another run would take as much memory again.
    _loaded_states.clear()
    spec = build_record(Spec, context.spec)
    models = place_models(load_models(spec), spec.compute)
    trim_remote_cache(spec.cache.max_gb)
    pipeline = TorchPipeline(spec, models)
    device = pipeline.device
    scores: dict[str, dict[str, Tensor]] = {}
    for node_name, node_scores in context.scores.items():
        scores[node_name] = {block: _make_tensor(array) for block, array in node_scores.items()}
    grams: dict[str, Grams] = {}
    for node_name, node_grams in context.grams.items():
        grams[node_name] = {
            block: Gram(
                product_sums=_make_tensor(gram.xx), sums=_make_tensor(gram.x), row_count=gram.n
            ).move(device)
            for block, gram in node_grams.items()
        }
    batch = _make_batch(context.batch).move(device)
    state = _WorkerState(
        spec=spec,
        models=models,
        pipeline=pipeline,
        scores=scores,
        grams=grams,
        fp32_blocks=context.fp32_blocks,
        batch=batch,
        references=pipeline.compute_reference_outputs(models, batch),
    )
    _loaded_states[context.key] = state
    return state


def _make_cache_keys(pipeline: TorchPipeline, structure: Candidate) -> dict[str, Hashable]:
    """Make the cache key of every node: its units, precision, and the keys of nodes it reads."""
    cache_keys: dict[str, Hashable] = {}
    for node_name in pipeline.order:
        units = tuple(sorted(structure.kept_units[node_name].items()))
        source_keys = tuple(cache_keys[source] for source in pipeline.list_sources(node_name))
        cache_keys[node_name] = (node_name, units, structure.precision[node_name], source_keys)
    return cache_keys


def _run_candidate(
    state: _WorkerState, structure: Candidate, *, batch: Batch, known_outputs: Outputs
) -> Outputs:
    """Return the outputs of every node; those in `known_outputs` are not run again."""
    prune = state.spec.prune
    models: dict[str, Model] = {}
    with ExitStack() as simulations:
        for node_name, dense_model in state.models.items():
            if node_name in known_outputs:
                continue
            model = prune_node(
                dense_model,
                structure.kept_units[node_name],
                scores=state.scores[node_name],
                grams=state.grams[node_name] if prune.refit else None,
                ridge=prune.ridge,
            )
            precision = structure.precision[node_name]
            fp32_blocks = find_fp32_blocks(state.fp32_blocks, node_name, precision=precision)
            fp32_layers = model.list_linear_layers(fp32_blocks)
            simulations.enter_context(simulate_precision(model, precision, fp32_layers=fp32_layers))
            models[node_name] = model
        return state.pipeline.forward_in_pieces(models, batch, known_outputs=known_outputs)


def _make_gram_arrays(gram: Gram) -> GramArrays:
    """Turn moments on the processor into arrays."""
    return GramArrays(xx=gram.product_sums.numpy(), x=gram.sums.numpy(), n=gram.row_count)


def _make_batch_arrays(batch: Batch) -> BatchArrays:
    """Turn the tensors of a batch into arrays."""
    batch = batch.move(CPU)
    inputs = {node_name: tensor.numpy() for node_name, tensor in batch.inputs.items()}
    keep = {node_name: tensor.numpy() for node_name, tensor in batch.keep.items()}
    return BatchArrays(inputs=inputs, keep=keep)


def _make_batch(arrays: BatchArrays) -> Batch:
    """Turn arrays back into a batch."""
    inputs = {node_name: _make_tensor(array) for node_name, array in arrays.inputs.items()}
    keep = {node_name: _make_tensor(array) for node_name, array in arrays.keep.items()}
    return Batch(inputs=inputs, keep=keep)


def _make_tensor(array: np.ndarray) -> Tensor:
    """Copy an array into a tensor; arrays from Ray's object store are read-only."""
    return torch.from_numpy(np.array(array))
