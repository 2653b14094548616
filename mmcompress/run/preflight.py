"""Before hours of work: everything that can fail at their end is tried in a minute.

A run tries what depends on the machine (`check_machine`) before it measures anything.
`mmcompress validate --deep` also exports the dense pipeline with all proofs and runs every
precision (`check_everything`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mmcompress.data.base import count_available
from mmcompress.errors import ClusterError, DataError, MissingPackage, ModelError
from mmcompress.export.bundle import (
    UNROUNDED_PRECISION,
    BundleContents,
    quantize_bundle,
    write_bundle,
)
from mmcompress.export.fidelity import prove_fidelity
from mmcompress.export.proofs import require_proofs
from mmcompress.kinds.base import Batch
from mmcompress.models.counts import FP32_BYTES, count_params
from mmcompress.models.device import CPU
from mmcompress.registry import EXECUTORS, resolve_entry
from mmcompress.report.fill_templates import check_templates
from mmcompress.results.records import Proof
from mmcompress.run.answers import try_metrics
from mmcompress.run.compress.training import SHARING_EXECUTOR
from mmcompress.run.profile import prove_generators
from mmcompress.runtime.allocator import keep_freed_memory
from mmcompress.runtime.environment import BYTES_PER_MB
from mmcompress.runtime.graph import load_bundle
from mmcompress.search.executors import (
    ExecutorSettings,
    ExplainsWait,
    TaskResult,
    answer_from_worker,
)
from mmcompress.spec.target import split_targets
from mmcompress.workspace.context import RunContext, list_precisions

TRIED_PRODUCTS = 2
"""Matrix products of a graph that are rounded to see that a precision runs here. ONNX Runtime's
quantizer takes some 15 s for all of Whisper's."""

TRIED_GENERATIONS = 2
"""Validation pairs that generation is proved on. After it, fidelity is proved on many more raw
inputs, which are written by the same loop."""

RAY_TRAIN_PACKAGES = ("pandas", "pyarrow")
"""Packages that Ray Train imports, and that Ray itself does without."""

CHECK_TRAINING_WORKERS = "mmcompress.run.compress.train_on_ray:check_training_workers"
"""Checks the workers of a training; it takes Ray Train."""

EXECUTOR_SECONDS = 120.0
"""Seconds that a worker may take for its first answer: it starts and unpacks the package."""

RUNTIME_MB = 900.0
"""Megabytes of Python with torch, transformers, ONNX Runtime and Optuna, before any model."""

TRAINED_COPIES = 6
"""Copies of the parameters that training holds at once. They are the dense models, the
student, its gradients, two moments of Adam, and the best weights so far."""

EXPORTED_COPIES = 3.5
"""Copies of the parameters that are held while a structure is cut, exported and measured. They
are the dense models, those of the structure, its graphs, and the sessions that run them."""

PAIR_COPIES = 3
"""Copies of the pairs that are held: as they were read, as they are collated, and what the dense
models make of them."""

SHARED_COPIES_ON_DISK = 3
"""Copies of the weights that the targets of a run share on disk. They are the dense bundle, its
rounded copies, and a structure that is being measured."""

TARGET_COPIES_ON_DISK = 2.5
"""Copies of the weights that each target takes on disk. They are its bundle, its weights, and a
part of them for an artifact that is set aside. A bundle holds a generator's weights for two
graphs."""

RECORDS_MB = 2.0
"""Megabytes of journals, records and pages of a run, whatever the models are."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run will take of the machine."""

    memory_mb: float
    """Megabytes of memory, of all processes together."""
    disk_mb: float
    """Megabytes of disk in the run folder."""
    store_gb: float = 0.0
    """Gigabytes of disk that the dense pipeline's outputs may take on top. Without that room they
    are not kept."""

    def describe(self) -> str:
        """Return both in words."""
        text = f"about {self.memory_mb / 1e3:.1f} GB of memory and {self.disk_mb:.0f} MB of disk"
        if self.store_gb:
            text += f", and up to {self.store_gb:g} GB for outputs of the dense pipeline"
        return text


def estimate_needs(run: RunContext) -> Needs:
    """Estimate the memory and the disk that a run will take.

    Both follow from its parameters and pairs, and from what one pair leaves behind for the
    gradients.
    """
    params_mb = (
        sum(count_params(model) for model in run.models.values()) * FP32_BYTES / BYTES_PER_MB
    )
    first_pair = run.pipeline.collate(run.data.load("val", 1))
    models_mb = EXPORTED_COPIES * params_mb
    if run.spec.distill.steps:
        activations_mb = 0.0
        # Those on a GPU take memory of its own.
        if run.pipeline.device == CPU:
            batch_pairs = count_available(run.data, "train", wanted=run.spec.distill.batch)
            activations_mb = batch_pairs * measure_activations_mb(run, first_pair)
        models_mb = max(models_mb, TRAINED_COPIES * params_mb + activations_mb)
    pair_mb = sum(tensor.nbytes for tensor in first_pair.inputs.values()) / BYTES_PER_MB
    data = run.spec.data
    pairs = count_available(run.data, "train", wanted=data.calibration)
    pairs += count_available(
        run.data, "val", wanted=data.validation_pairs * data.final_pairs_factor
    )
    memory_mb = RUNTIME_MB + models_mb + PAIR_COPIES * pairs * pair_mb
    if run.spec.search.executor != "inline":
        # Every worker imports the same packages and holds the dense models and a candidate.
        memory_mb += run.spec.search.workers * (RUNTIME_MB / 2 + 2 * params_mb + pairs * pair_mb)
    copies = SHARED_COPIES_ON_DISK + TARGET_COPIES_ON_DISK * len(split_targets(run.spec))
    return Needs(
        memory_mb=memory_mb,
        disk_mb=RECORDS_MB + copies * params_mb,
        store_gb=run.spec.distill.store_gb if run.spec.distill.steps else 0.0,
    )


def measure_activations_mb(run: RunContext, batch: Batch) -> float:
    """Measure what the forward pass of a batch keeps for the gradients, in MB.

    Args:
        run: The run.
        batch: Some pairs.
    """
    bytes_by_storage: dict[int, int] = {}
    weights: set[int] = set()
    for model in run.models.values():
        weights |= {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            bytes_by_storage[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give_back(tensor: Tensor) -> Tensor:
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(note, give_back):
        run.pipeline.forward(run.models, batch)
    return sum(bytes_by_storage.values()) / BYTES_PER_MB


def check_machine(run: RunContext) -> Needs:
    """Try what a run needs of its machine: disk, workers, the report's templates.

    `begin_run` has tried the folders before anything was loaded.

    Returns:
        What the run will take.

    Raises:
        DataError: The disk is too full.
        ClusterError: No worker answers.
    """
    needs = check_disk(run)
    check_executor(run)
    check_shared_training(run)
    return needs


def check_disk(run: RunContext) -> Needs:
    """Tell what a run will take, and try the disk and the report's templates.

    Returns:
        What the run will take.

    Raises:
        DataError: The disk is too full.
    """
    needs = estimate_needs(run)
    run.on_progress("check", f"the run will take {needs.describe()}", None)
    free_mb = shutil.disk_usage(run.folder.path).free / BYTES_PER_MB
    if free_mb < needs.disk_mb:
        raise DataError(
            f"{run.folder}: {free_mb:.0f} MB are free on this disk, the run needs about "
            f"{needs.disk_mb:.0f} MB: choose another --out, or make room"
        )
    check_templates()
    return needs


def check_executor(run: RunContext) -> None:
    """Start workers of the search, send each a task, and stop them.

    On this machine one worker stands for all: each takes seconds of the processor to start.

    Raises:
        ClusterError: They do not start, or do not answer.
    """
    search = run.spec.search
    worker_count = search.workers if search.ray_address else 1
    told = "a worker starts, and answers"
    if worker_count > 1:
        told = f"{worker_count} workers start, and answer"
    run.on_progress("check", f"{told} ({search.executor})", None)
    make_executor: Callable[..., Executor] = EXECUTORS.get(search.executor)
    executor = make_executor(
        {"spec": run.spec.name},
        worker_count,
        ExecutorSettings.from_spec(run.spec),
    )
    try:
        # An executor supplies the first argument, its context.
        submit: Callable[..., Future[TaskResult]] = executor.submit
        futures = [submit(answer_from_worker, i) for i in range(worker_count)]
        for future in futures:
            future.result(timeout=EXECUTOR_SECONDS)
    except TimeoutError as error:
        raise ClusterError(
            f"search.executor: {search.executor}: no worker answered within "
            f"{EXECUTOR_SECONDS:.0f} s{_explain_wait(executor)}"
        ) from error
    except ClusterError:
        raise
    except Exception as error:
        raise ClusterError(
            f"search.executor: {search.executor}: a worker can't run a task: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def check_shared_training(run: RunContext) -> None:
    """Check that a training on several workers can be had, where the spec asks for one.

    Raises:
        MissingPackage: Ray Train needs a package that is not installed.
        SpecError: There are more workers than pairs in a batch.
        ClusterError: The cluster has not what the workers reserve.
    """
    workers = run.spec.resources.distill.workers
    if workers == 1:
        return
    if run.spec.search.executor != SHARING_EXECUTOR:
        run.on_progress(
            "check",
            f"resources.distill.workers: {workers} has no effect: the training is shared where "
            f"search.executor is '{SHARING_EXECUTOR}'",
            None,
        )
        return
    for package in RAY_TRAIN_PACKAGES:
        if find_spec(package) is None:
            raise MissingPackage(package, "cluster")
    resolve_entry(CHECK_TRAINING_WORKERS)(run)


def _explain_wait(executor: Executor) -> str:
    """Return what the executor says of tasks that do not begin, if it says anything."""
    if not isinstance(executor, ExplainsWait):
        return ""
    return f": {executor.explain_wait()} (resources.trial)"


def check_everything(run: RunContext, folder: Path) -> list[Proof]:
    """Try everything that a run does, on the dense pipeline alone.

    Args:
        run: The run.
        folder: Where bundles are written; the caller removes it.

    Returns:
        The proofs of the dense bundle; all of them hold.

    Raises:
        DataError: The disk is too full.
        ClusterError: No worker answers.
        ProofFailed: The dense bundle does not answer as its models, or as their libraries.
        ModelError: A precision can't run on this machine.
    """
    check_disk(run)
    keep_freed_memory()
    dense = folder / "dense"
    # Workers start, and precisions are tried, while this thread proves: each waits for the other.
    with ThreadPoolExecutor(1) as helper:
        started_workers = helper.submit(check_executor, run)
        run.on_progress("check", "exporting the dense pipeline", None)
        contents = BundleContents(models=run.models, lookup_texts=run.lookup_texts)
        proofs = write_bundle(run.spec, contents, folder=dense)
        started_workers.result()
        tried_precisions = helper.submit(_check_precisions, run, dense=dense, folder=folder)
        proofs += prove_generators(
            run.pipeline,
            run.models,
            data=run.data,
            bundle=dense,
            max_pairs=TRIED_GENERATIONS,
        )
        run.on_progress("check", "comparing with the models' own libraries", None)
        proofs += prove_fidelity(
            run.spec, bundle=dense, data=run.data, on_progress=partial(run.on_progress, "check")
        )
        require_proofs(proofs)
        try_metrics(run, dense)
        tried_precisions.result()
    return proofs


def _check_precisions(run: RunContext, *, dense: Path, folder: Path) -> None:
    """Run one request in every precision that the search may choose."""
    nodes_by_precision: dict[str, list[str]] = {}
    for node_name, precisions in list_precisions(run).items():
        for precision in precisions:
            if precision != UNROUNDED_PRECISION:
                nodes_by_precision.setdefault(precision, []).append(node_name)
    for precision, node_names in nodes_by_precision.items():
        run.on_progress("check", f"running {', '.join(node_names)} in {precision}", None)
        try:
            _answer_in_precision(run, dense, folder=folder, precision=precision, nodes=node_names)
        except Exception as error:
            _check_each_node(run, dense, folder=folder, precision=precision, nodes=node_names)
            raise ModelError(
                f"{precision} can't run on this machine in all nodes together: "
                f"{type(error).__name__}: {error}"
            ) from error


def _check_each_node(
    run: RunContext, dense: Path, *, folder: Path, precision: str, nodes: list[str]
) -> None:
    """Find the node that can't run in a precision.

    Raises:
        ModelError: A node can't run, with its name.
    """
    for node_name in nodes:
        try:
            _answer_in_precision(run, dense, folder=folder, precision=precision, nodes=[node_name])
        except Exception as error:
            raise ModelError(
                f"nodes.{node_name}.precision: {precision} can't run on this machine: "
                f"{type(error).__name__}: {error}"
            ) from error


def _answer_in_precision(
    run: RunContext, dense: Path, *, folder: Path, precision: str, nodes: list[str]
) -> None:
    """Write some nodes of the dense bundle in a precision, and let it answer one request."""
    [request] = run.load_whole_requests("val", 1, seed=1)
    bundle = folder / precision
    try:
        quantize_bundle(
            dense,
            run.models,
            precision=dict.fromkeys(nodes, precision),
            folder=bundle,
            max_products=TRIED_PRODUCTS,
        )
        load_bundle(bundle)(**request)
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
