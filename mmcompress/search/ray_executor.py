"""The executor that runs trials on Ray, on this machine or a cluster."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from functools import partial
from types import FrameType
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError
from ray.experimental import get_object_locations

from mmcompress.errors import ClusterError
from mmcompress.runtime.addresses import hide_password
from mmcompress.runtime.environment import BYTES_PER_GB
from mmcompress.search.cluster_nodes import check_nodes, list_missing_in_job, list_runtime_env
from mmcompress.search.executors import (
    Evaluate,
    ExecutorSettings,
    TaskResult,
    TrialTimeout,
    WorkerDied,
    call_task,
    describe_ended_worker,
    get_watchdog_seconds,
)
from mmcompress.search.ray_folder import choose_ray_folder
from mmcompress.spec.schema import RuntimeEnv, TaskResources
from mmcompress.version import PACKAGE_FOLDER

MAX_LOCAL_STARTS = 3
"""Times that a Ray of this machine is started before that counts as failed."""

CONNECT_SECONDS = 5.0
"""Seconds that the head of a cluster may take to accept a connection."""

JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray gives the process of a job: what the job brings along."""

LOOPBACK = "127.0.0.1"
"""Where a local Ray listens: nobody else can reach it."""

LOOPBACK_SETTING = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Environment variable of Ray: with 0 it takes the loopback address for that of the machine."""


def _call_task_on_ray(
    evaluate: Evaluate, context: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> TaskResult:
    """Call a task; the worker is named by the node of the cluster, since machines share names."""
    result = call_task(evaluate, context, args=args, kwargs=kwargs)
    node_id = ray.get_runtime_context().get_node_id()
    return {**result, "worker": f"{node_id[:8]}/{os.getpid()}"}


def _pass_on(
    future: Future[TaskResult],
    answer: Future[TaskResult],
    *,
    evaluate: Evaluate,
    start: float,
) -> None:
    """Give a future what another one has; the end of a worker is told in words of this project.

    Args:
        future: Receives the result or the error.
        answer: Ray's own future; it is done.
        evaluate: What the task called.
        start: When it was submitted, in seconds of the monotonic clock.
    """
    error = answer.exception()
    if isinstance(error, WorkerCrashedError | OutOfMemoryError | NodeDiedError):
        reason = _explain_ended_worker(error, evaluate=evaluate, seconds=time.monotonic() - start)
        reason.__cause__ = error
        future.set_exception(reason)
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(answer.result())


def _explain_ended_worker(
    error: RayError, *, evaluate: Evaluate, seconds: float
) -> TrialTimeout | WorkerDied:
    """Return why a worker ended: its trial hung, or something else took the process away.

    A process that its watchdog ends leaves no word. It is known by its time, which includes the
    wait for a free CPU. Ray tells where memory ran out or a machine was lost.
    """
    watchdog_seconds = get_watchdog_seconds(evaluate)
    is_crash = isinstance(error, WorkerCrashedError)
    if is_crash and 0 < watchdog_seconds <= seconds:
        return TrialTimeout(describe_ended_worker(evaluate))
    if isinstance(error, OutOfMemoryError):
        return WorkerDied(
            "Ray ended the worker process, since the memory of its node ran out; have a trial "
            "reserve more (resources.trial.memory_gb), or take fewer workers"
        )
    if isinstance(error, NodeDiedError):
        return WorkerDied("the node of the worker was lost; another worker takes its place")
    return WorkerDied(
        "the worker process ended (killed, or out of memory); another one takes its place"
    )


class RayExecutor(Executor):
    """Runs tasks on Ray, spread over the nodes of a cluster.

    The context is put into the object store once.

    Args:
        context: First argument of every task.
        workers: Tasks at a time.
        settings: The address of the cluster, what a task reserves, and what nodes need. Without an
            address a local Ray is started.

    Raises:
        ClusterError: No cluster answers at the address, one of its nodes has other packages than
            this process, or no local Ray starts.
    """

    def __init__(
        self,
        context: object,
        workers: int = 2,
        settings: ExecutorSettings | None = None,
    ):
        self.workers = workers
        self.settings = settings or ExecutorSettings()
        self.resources = self.settings.resources
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            start_ray(self.settings, cpus=workers * self.resources.cpu)
        self.context = ray.put(context)
        # By default Ray runs a crashing task four times; the search decides what is tried again.
        options: dict[str, Any] = {
            "num_cpus": self.resources.cpu,
            "num_gpus": self.resources.gpu,
            "resources": self.resources.custom,
            "max_retries": 0,
        }
        if self.settings.address:
            # Over nodes. On one machine Ray would ask for a new worker at every task all the same.
            options["scheduling_strategy"] = "SPREAD"
        if self.resources.memory_gb:
            options["memory"] = self.resources.memory_gb * BYTES_PER_GB
        self.remote_task = ray.remote(**options)(_call_task_on_ray)

    def submit(  # type: ignore[override]
        self, evaluate: Evaluate, /, *args: object, **kwargs: object
    ) -> Future[TaskResult]:
        start = time.monotonic()
        reference = self.remote_task.remote(evaluate, self.context, args, kwargs)
        answer: Future[TaskResult] = reference.future()
        future: Future[TaskResult] = Future()
        # What waits for it can't be stopped: Ray runs it, or it ends with Ray.
        future.set_running_or_notify_cancel()
        answer.add_done_callback(partial(_pass_on, future, evaluate=evaluate, start=start))
        return future

    def explain_wait(self) -> str:
        """Return what a task reserves and what the nodes have, for a task that does not begin."""
        wanted = describe_resources(self.resources)
        nodes: list[str] = []
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                nodes.append(_describe_node(node))
        sent_gb = self._measure_context() / BYTES_PER_GB
        return (
            f"a trial reserves {wanted}, and {sent_gb:.2f} GB of the object store of its node; the "
            f"nodes have {'; '.join(nodes) or 'nothing'}"
        )

    def _measure_context(self) -> float:
        """Return the bytes of the context in the object store; 0 where Ray does not know them."""
        try:
            places = get_object_locations([self.context])
        except RayError:
            return 0.0
        return float(places.get(self.context, {}).get("object_size") or 0.0)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop Ray if this executor started it."""
        if self.started_ray:
            stop_ray()


def start_ray(settings: ExecutorSettings, *, cpus: float) -> None:
    """Connect to a cluster and compare its nodes with this process, or start a Ray of this machine.

    Args:
        settings: The address of the cluster, if there is one, and what nodes need.
        cpus: CPUs of a Ray of this machine.

    Raises:
        ClusterError: No cluster answers at the address, one of its nodes has other packages than
            this process, or no local Ray starts.
    """
    # Otherwise Ray hides the accelerators of tasks that ask for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray tells its makers what it is used for, unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.address
    try:
        with _keep_signal_handler():
            if address:
                _connect_to_cluster(address, settings.cluster.runtime_env)
            else:
                _start_local_ray(math.ceil(cpus))
    except ClusterError:
        raise
    except Exception as error:  # Ray raises plain ones, too: "timed out during startup"
        place = hide_password(address) if address else "this machine"
        raise ClusterError(f"no Ray cluster at {place}: {hide_password(str(error))}") from error
    if address:
        try:
            check_nodes(settings.cluster)
        except BaseException:
            # Nobody else lets the connection go: the next try must not find it.
            stop_ray()
            raise


def stop_ray() -> None:
    """Leave the cluster, or stop the Ray of this machine that `start_ray` started."""
    with contextlib.suppress(Exception), _keep_signal_handler():
        ray.shutdown()


@contextlib.contextmanager
def use_ray(settings: ExecutorSettings, *, cpus: float) -> Iterator[None]:
    """Have Ray for the length of a block; see `start_ray`. One that runs already is taken as it
    is."""
    if ray.is_initialized():
        yield
        return
    start_ray(settings, cpus=cpus)
    try:
        yield
    finally:
        stop_ray()


def describe_resources(resources: TaskResources) -> str:
    """Return what a task reserves, in words."""
    parts = [f"{resources.cpu:g} CPU"]
    if resources.gpu:
        parts.append(f"{resources.gpu:g} GPU")
    if resources.memory_gb:
        parts.append(f"{resources.memory_gb:g} GB")
    parts += [f"{count:g} {name}" for name, count in sorted(resources.custom.items())]
    return ", ".join(parts)


def _describe_node(node: Mapping[str, Any]) -> str:
    """Return what a node of a cluster has, in words."""
    known = dict(node["Resources"])
    memory_gb = known.pop("memory", 0.0) / BYTES_PER_GB
    store_gb = known.pop("object_store_memory", 0.0) / BYTES_PER_GB
    parts = [f"{known.pop(name, 0.0):g} {name}" for name in ("CPU", "GPU")]
    parts.append(f"{memory_gb:.1f} GB")
    parts.append(f"{store_gb:.2f} GB of object store")
    for name, count in sorted(known.items()):
        if not name.startswith(("node:", "accelerator_type:")):
            parts.append(f"{count:g} {name}")
    return ", ".join(parts)


def _connect_to_cluster(address: str, runtime_env: RuntimeEnv) -> None:
    """Connect to a running cluster."""
    _require_listener(address)
    prepared = list_runtime_env(runtime_env)
    job_config = os.environ.get(JOB_CONFIG_VARIABLE)
    if job_config:
        # A Ray job already brings the package along.
        prepared = list_missing_in_job(prepared, job_config)
    else:
        prepared["py_modules"] = [str(PACKAGE_FOLDER)]
    ray.init(
        address=address,
        runtime_env=prepared or None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _require_listener(address: str) -> None:
    """Raise `ConnectionError` when nobody listens at `HOST:PORT`: Ray itself tries for minutes.

    Other addresses, such as `auto`, are left to Ray.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nobody answers there ({error})") from error


def _start_local_ray(cpus: int) -> None:
    """Start a Ray of this machine that nobody else can reach.

    On a busy machine its processes may not be up in Ray's own time: it is started again.
    """
    for tries_left in reversed(range(MAX_LOCAL_STARTS)):
        try:
            with _prefer_loopback():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=choose_ray_folder(),
                    logging_level=logging.ERROR,
                )
            return
        except ClusterError:
            # No folder for its sockets: another try finds none either.
            raise
        except Exception:
            if not tries_left:
                raise
            with contextlib.suppress(Exception):
                ray.shutdown()


@contextlib.contextmanager
def _prefer_loopback() -> Iterator[None]:
    """Let a Ray that is started in the block listen at the loopback address alone.

    By default it listens at all addresses of the machine, and turns a loopback address back into
    the machine's own. The processes that it starts read the setting from their environment, and
    this one has read it when it imported Ray.
    """
    before = (os.environ.get(LOOPBACK_SETTING), ray_constants.ENABLE_RAY_CLUSTER)
    os.environ[LOOPBACK_SETTING] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        setting, ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(LOOPBACK_SETTING)
        if setting is not None:
            os.environ[LOOPBACK_SETTING] = setting


@contextlib.contextmanager
def _keep_signal_handler() -> Iterator[None]:
    """Keep Ray from handling SIGTERM, and put one off that comes while Ray starts.

    Ray's own handler ends the process with a dump. What a handler raises may be lost in the block:
    where Python lets go of an object it ignores exceptions. A second SIGTERM is not put off.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    received: list[int] = []

    def put_off(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1 and callable(handler):
            handler(number, frame)

    if callable(handler):
        signal.signal(signal.SIGTERM, put_off)
    set_handler = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = _ignore_handler
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = set_handler
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)
        if received:
            signal.raise_signal(signal.SIGTERM)


def _ignore_handler(_: object) -> None:
    """Stand in for what gives Ray its handler of SIGTERM."""
