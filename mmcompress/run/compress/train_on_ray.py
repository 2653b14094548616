"""Train pruned models on several workers of a Ray cluster, by Ray Train.

The workers meet by `torch.distributed`, and each has a share of every batch (`worker_group`). The
first one leads and keeps the books. Its checkpoints go to the run folder, through Ray. A worker or
a node that is lost is replaced, and all go on from the last one. A run that was cut off does, too.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# The second version of Ray Train is asked for before Ray is imported.
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import pyarrow.fs
import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmcompress.data.base import Dataset
from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.help_leader import help_leader
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.distill.worker_group import StepRequest, WorkerGroup
from mmcompress.errors import ClusterError, SpecError
from mmcompress.export.weights import load_weights, save_weights
from mmcompress.kinds.base import Batch, Models
from mmcompress.models.base import Model
from mmcompress.models.device import place_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.run.compress.training_state import locate_stored_training
from mmcompress.runtime.environment import BYTES_PER_GB
from mmcompress.runtime.progress import StageProgress, ignore_progress
from mmcompress.search.executors import ExecutorSettings
from mmcompress.search.ray_executor import describe_resources, use_ray
from mmcompress.spec.schema import Spec, TrainingResources
from mmcompress.storage import build_record, read_plain, to_plain
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.run_storage import RunStorage

TRAINING_NAME = "training"
"""Name of the training in its storage: one of the same name goes on from its checkpoints."""

SHARED_CHECKPOINT_SECONDS = 60.0
"""Seconds between two checkpoints: what a lost worker costs at most."""

MAX_LOST_WORKERS = 5
"""Times that a training goes on after it lost workers, until a person has to look."""

OMITTED_CALLBACK = "PlacementGroupCleanerCallback"
"""The callback of Ray Train that is left out (`ray.train.v2._internal.callbacks`)."""

STATE_FILE = "state.safetensors"
"""The state of a training, in a checkpoint."""

CURVE_FILE = "curve.json"
"""The loss curve of a training that has ended, in its last checkpoint."""

MESSAGE_SECONDS = 0.5
"""Seconds between two looks for messages of the leader."""

KEPT_CHECKPOINTS = 2
"""Checkpoints that are kept: one may be torn when its node is lost."""


@dataclass(frozen=True, kw_only=True)
class _Shipment:
    """What every worker needs for a training."""

    spec: dict[str, object]
    """The spec as plain data."""
    plugins: tuple[str, ...]
    """Modules that are imported before the spec is read."""
    student: dict[str, Model]
    """The models to train, by node."""
    teacher: dict[str, Model]
    """The models to learn from, by node."""
    data: Dataset
    """Where the training pairs come from."""
    validation: Batch | None
    """Pairs that the loss is taken on, on the way."""
    options: TrainingOptions
    """The settings, and the weights that must not change."""
    threads: int
    """Threads of torch."""
    checkpoint_seconds: float
    """Seconds between two checkpoints."""
    store_folder: Path
    """Where the outputs of the teacher are kept, if the node has the folder of the run."""
    store_bytes: int
    """Bytes of outputs of the teacher that are kept."""


def check_training_workers(run: RunContext) -> None:
    """Check before the work that the workers of the training can be had.

    Raises:
        SpecError: There are more workers than pairs in a batch.
        ClusterError: No cluster answers, or it has not what the workers reserve.
    """
    resources = run.spec.resources.distill
    if resources.workers > run.spec.distill.batch:
        raise SpecError(
            f"resources.distill.workers: {resources.workers} workers share a batch of "
            f"{run.spec.distill.batch} pairs (distill.batch): each needs one at least"
        )
    with use_ray(ExecutorSettings.from_spec(run.spec), cpus=resources.workers * resources.cpu):
        _require_resources(resources)


def _require_resources(resources: TrainingResources) -> None:
    """Raise `ClusterError` where the cluster has not what all workers reserve together."""
    available: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    short: list[str] = []
    for name, amount in _list_reserved(resources).items():
        if resources.workers * amount > available.get(name, 0.0):
            short.append(
                f"{resources.workers * amount:g} {name} (the cluster has "
                f"{available.get(name, 0.0):g})"
            )
    if short:
        raise ClusterError(f"resources.distill: the workers reserve {', '.join(short)}")


def _list_reserved(resources: TrainingResources) -> dict[str, float]:
    """List what a worker reserves, under Ray's names."""
    reserved: dict[str, float] = {"CPU": resources.cpu, **resources.custom}
    if resources.gpu:
        reserved["GPU"] = resources.gpu
    if resources.memory_gb:
        reserved["memory"] = resources.memory_gb * BYTES_PER_GB
    return reserved


def distill_on_workers_(
    run: RunContext, models: Models, *, inputs: TrainingInputs, options: TrainingOptions
) -> list[dict[str, float]]:
    """Train pruned models in place on the workers of `resources.distill`.

    Args:
        run: The run. Its folder holds the state, and must be at the same path on all nodes, unless
            the run is kept at a storage URL.
        models: The models to train, by node.
        inputs: The pipeline, the teacher and the data.
        options: How they are trained. Its checkpoint is not used.

    Returns:
        The loss curve.

    Raises:
        ClusterError: No cluster answers, it has not what a worker reserves, or workers were lost
            again and again.
    """
    resources = run.spec.resources.distill
    settings = ExecutorSettings.from_spec(run.spec)
    run.on_progress(
        "distill",
        f"{resources.workers} workers share every step; each reserves "
        f"{describe_resources(resources)}",
        0.0,
    )
    with use_ray(settings, cpus=resources.workers * resources.cpu):
        _require_resources(resources)
        shipment = ray.put(_pack(run, models, inputs=inputs, options=options))
        with _pass_messages_on(options.progress) as messages:
            result = _fit(run, resources, shipment=shipment, messages=messages)
    with result.as_directory() as folder:
        for name, model in models.items():
            load_weights(model, Path(folder) / f"{name}.safetensors")
        curve = read_plain(list, Path(folder) / CURVE_FILE)
        if options.history is not None:
            shutil.copyfile(Path(folder) / options.history.name, options.history)
    return curve


def _pack(
    run: RunContext, models: Models, *, inputs: TrainingInputs, options: TrainingOptions
) -> _Shipment:
    """Return what every worker needs."""
    return _Shipment(
        spec=to_plain(run.spec),
        plugins=run.spec.plugins,
        student=dict(models),
        teacher=dict(inputs.teacher.models),
        data=inputs.data,
        validation=inputs.validation,
        options=replace(
            options,
            progress=ignore_progress,
            checkpoint=None,
            history=None if options.history is None else Path(options.history.name),
        ),
        threads=max(1, int(run.spec.resources.distill.cpu)),
        checkpoint_seconds=SHARED_CHECKPOINT_SECONDS,
        store_folder=run.shared.teacher_outputs,
        store_bytes=int(run.spec.distill.store_gb * BYTES_PER_GB),
    )


class TrainerOfOneCluster(TorchTrainer):
    """A trainer whose workers are not ended by what another Ray of this machine says."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out the cleaner that ends the workers of a controller that has died.

        It asks the dashboard of its Ray. A local Ray has none, and names the usual port all the
        same. Where another Ray has its dashboard at that port, that one does not know the
        controller, and healthy workers are ended. The driver here ends with its controller, and Ray
        then frees what both have reserved.
        """
        # Checkers see the trainer of the first version of Ray Train.
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        return [each for each in callbacks if type(each).__name__ != OMITTED_CALLBACK]


def _fit(
    run: RunContext, resources: TrainingResources, *, shipment: Any, messages: Queue
) -> ray.train.Checkpoint:
    """Train on the workers; returns the last checkpoint."""
    storage_path, filesystem = _locate_storage(run)
    trainer = TrainerOfOneCluster(
        _train_on_worker,
        # In a list, a reference is handed over as it is.
        train_loop_config={"shipment": [shipment], "messages": messages},
        torch_config=TorchConfig(backend="nccl" if resources.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpu > 0,
            resources_per_worker=_list_reserved(resources),
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(
            name=TRAINING_NAME,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=MAX_LOST_WORKERS),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # Ray Train raises several that it does not export
        raise ClusterError(
            f"the training on {resources.workers} workers failed: {error}; "
            "--resume goes on from its last checkpoint"
        ) from error
    if result.checkpoint is None:
        raise ClusterError("the training on several workers ended without a checkpoint")
    checkpoint: ray.train.Checkpoint = result.checkpoint
    return checkpoint


def _locate_storage(run: RunContext) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """Return where Ray Train keeps checkpoints, and the file system; None: that of the nodes."""
    if not run.storage_url:
        return str(run.folder.shared_training.resolve()), None
    storage = RunStorage(run.storage_url)
    handler = pyarrow.fs.FSSpecHandler(storage.filesystem)
    return storage.locate(locate_stored_training(run)), pyarrow.fs.PyFileSystem(handler)


@contextmanager
def _pass_messages_on(progress: StageProgress) -> Iterator[Queue]:
    """Give a queue whose messages reach a person for the length of the block."""
    # On the node of the run: a node that is lost would take the messages, and the training, along.
    place = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": place})
    is_over = threading.Event()

    def pass_on() -> None:
        while not is_over.is_set():
            try:
                message, share = messages.get(timeout=MESSAGE_SECONDS)
            except Empty:
                continue
            except Exception:  # the queue is gone with its node, or with Ray
                return
            progress(message, share)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield messages
    finally:
        is_over.set()
        thread.join()


class _ReportedCheckpoint(Checkpoint):
    """A checkpoint that Ray Train brings to the storage; all workers take part in that."""

    def __init__(self, folder: Path, group: WorkerGroup, *, interval_seconds: float):
        super().__init__(path=folder / STATE_FILE, interval_seconds=interval_seconds)
        self.group = group

    def save(self, state: Any, weights: Any, **others: Any) -> None:
        """Write the state of the training, and report it."""
        super().save(state, weights, **others)
        _report(self.group, self.path.parent, step=state.step)


def _report(group: WorkerGroup, folder: Path, *, step: int) -> None:
    """Bring a folder of the leader to the storage."""
    group.send(StepRequest(is_report=True))
    ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))


def _train_on_worker(config: dict[str, Any]) -> None:
    """Lead the training, or help with it. Ray Train calls it on every worker."""
    shipment: _Shipment = ray.get(config["shipment"][0])
    for plugin in shipment.plugins:
        importlib.import_module(plugin)
    torch.set_num_threads(shipment.threads)
    spec = build_record(Spec, shipment.spec)
    teacher = place_models(shipment.teacher, spec.compute)
    student = place_models(shipment.student, spec.compute)
    pipeline = TorchPipeline(spec, teacher)
    group = WorkerGroup(pipeline.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inputs = TrainingInputs(
            pipeline=pipeline,
            teacher=Teacher(pipeline, teacher, store=_open_store(shipment, folder)),
            data=shipment.data,
            validation=shipment.validation,
        )
        options = replace(shipment.options, group=group)
        if not group.is_leader:
            help_leader(student, inputs, options=options, report=_join_report)
            return
        folder = folder / "state"
        folder.mkdir()
        checkpoint = _ReportedCheckpoint(
            folder, group, interval_seconds=shipment.checkpoint_seconds
        )
        options = replace(options, checkpoint=checkpoint, progress=_make_sender(config["messages"]))
        _lead(student, inputs, options=options, group=group, folder=folder)


def _open_store(shipment: _Shipment, scratch: Path) -> TeacherStore | None:
    """Open the store of the teacher's outputs: in the run folder, where this node has that."""
    if not shipment.store_bytes:
        return None
    folder = shipment.store_folder
    if not folder.parent.is_dir():
        folder = scratch / "teacher"
    return TeacherStore(folder=folder, max_bytes=shipment.store_bytes)


def _join_report() -> None:
    """Take part in a report of the leader."""
    ray.train.report({})


def _lead(
    student: Models,
    inputs: TrainingInputs,
    *,
    options: TrainingOptions,
    group: WorkerGroup,
    folder: Path,
) -> None:
    """Train as the leader of the group, from the last checkpoint on, and report the result."""
    earlier = ray.train.get_checkpoint()
    if earlier is not None:
        with earlier.as_directory() as saved:
            shutil.copytree(saved, folder, dirs_exist_ok=True)
    if not (folder / CURVE_FILE).exists():
        history = None if options.history is None else folder / options.history.name
        curve = distill_models_(student, inputs, options=replace(options, history=history))
        save_weights(student, folder)
        (folder / CURVE_FILE).write_text(json.dumps(curve), encoding="utf-8")
        (folder / STATE_FILE).unlink(missing_ok=True)
        _report(group, folder, step=int(curve[-1]["step"]) if curve else 0)
    group.send(StepRequest(is_end=True))


def _make_sender(messages: Queue) -> Callable[[str, float | None], None]:
    """Return a progress listener that sends its messages to the process of the run."""

    def send(message: str, share: float | None) -> None:
        messages.put((message, share))

    return send
