"""Executors of trials, each a `concurrent.futures.Executor`. Only plain data goes to a worker."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from mmcompress.errors import ClusterError, MissingPackage
from mmcompress.graph.structure import Candidate
from mmcompress.storage import to_plain
from mmcompress.version import PACKAGE_FOLDER


class TaskResult(TypedDict):
    """What evaluating one candidate gives."""

    loss: float
    """The pipeline's loss on validation pairs; lower is better."""
    seconds: float
    """Wall seconds on the worker."""
    quality: NotRequired[dict[str, float]]
    """Shares from 0 to 1 by name; missing where only the loss is measured."""
    worker: NotRequired[str]
    """Node and process that ran the task; the executor adds it."""


Evaluate = Callable[..., TaskResult]
"""(context, candidate as plain data) -> result. The executor supplies the context."""


def call_task(
    evaluate: Evaluate, context: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> TaskResult:
    """Call `evaluate(context, ...)` and add the name of the worker to its result."""
    return {**evaluate(context, *args, **kwargs), "worker": name_worker()}


def name_worker() -> str:
    """Return the node and process this code runs on, for the record of a trial."""
    process_id = os.getpid()
    # ray is optional: without it the process belongs to this machine.
    with contextlib.suppress(ImportError):
        import ray

        if ray.is_initialized():
            return f"{ray.get_runtime_context().get_node_id()[:8]}/{process_id}"
    return f"{os.uname().nodename}/{process_id}"


@dataclass(kw_only=True)
class SubmittedTask:
    """One candidate in the hands of an executor."""

    candidate: Candidate
    """What is evaluated."""
    evaluate: Evaluate
    """The function that runs on the worker."""
    executor: Executor
    """Where it runs."""
    retries_left: int
    """Times it may still be submitted again after an error."""
    future: Future[TaskResult]
    """The current try; a retry replaces it."""


def submit_candidate(
    candidate: Candidate, evaluate: Evaluate, *, executor: Executor, retries: int
) -> SubmittedTask:
    """Submit a candidate for the first time.

    Raises:
        ClusterError: A worker process died and took the executor with it.
    """
    return SubmittedTask(
        candidate=candidate,
        evaluate=evaluate,
        executor=executor,
        retries_left=retries,
        future=_submit(candidate, evaluate, executor=executor),
    )


def retry_failed_task(task: SubmittedTask) -> bool:
    """Submit a finished task again if it failed and has retries left.

    Returns:
        Whether it was submitted again; `task.future` is then the new try.

    Raises:
        ClusterError: A worker process died and took the executor with it.
    """
    if task.future.exception() is None or task.retries_left == 0:
        return False
    task.retries_left -= 1
    task.future = _submit(task.candidate, task.evaluate, executor=task.executor)
    return True


def make_broken_executor_error() -> ClusterError:
    """Make the error for an executor that lost a worker process."""
    return ClusterError(
        "a worker process died (out of memory?); finished trials are kept: use --resume"
    )


def _submit(candidate: Candidate, evaluate: Evaluate, *, executor: Executor) -> Future[TaskResult]:
    """Submit a candidate as plain data."""
    try:
        return executor.submit(evaluate, to_plain(candidate))
    except BrokenExecutor as error:
        raise make_broken_executor_error() from error


class InlineExecutor(Executor):
    """Runs each task at once, in this process."""

    workers = 1
    """Tasks at a time, whatever the spec asks for."""

    def __init__(self, context: object, workers: int = 1, *, address: str | None = None):
        self.context = context

    def submit(  # type: ignore[override]
        self, evaluate: Evaluate, /, *args: object, **kwargs: object
    ) -> Future[TaskResult]:
        future: Future[TaskResult] = Future()
        try:
            future.set_result(call_task(evaluate, self.context, args=args, kwargs=kwargs))
        except Exception as error:  # the caller records a failed trial
            future.set_exception(error)
        return future


_process_context: object = None
"""The context of this worker process, set once when it starts."""


def _keep_context(context: object) -> None:
    """Keep the context for every task of this worker process."""
    global _process_context
    _process_context = context


def _call_with_kept_context(
    evaluate: Evaluate, *, args: tuple[object, ...], kwargs: dict[str, object]
) -> TaskResult:
    """Call a task with the context of this worker process."""
    return call_task(evaluate, _process_context, args=args, kwargs=kwargs)


class _ProcessExecutor(ProcessPoolExecutor):
    """A process pool whose tasks get the context that their process keeps."""

    def submit(  # type: ignore[override]
        self, evaluate: Evaluate, /, *args: object, **kwargs: object
    ) -> Future[TaskResult]:
        return super().submit(_call_with_kept_context, evaluate, args=args, kwargs=kwargs)


def make_process_executor(
    context: object, workers: int = 2, *, address: str | None = None
) -> Executor:
    """Start worker processes on this machine; each receives the context once.

    Args:
        context: First argument of every task.
        workers: Processes.
        address: Not used; every executor takes one.
    """
    return _ProcessExecutor(
        workers,
        # A forked child would inherit the locks of this process's threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_keep_context,
        initargs=(context,),
    )


class RayExecutor(Executor):
    """Runs tasks of one CPU each on Ray, spread over the nodes of a cluster.

    The context is put into the object store once.

    Args:
        context: First argument of every task.
        workers: Tasks at a time; the CPUs of a local Ray.
        address: Address of the cluster; without one a local Ray is started.

    Raises:
        MissingPackage: ray is not installed.
        ClusterError: No cluster answers at the address, or no local Ray starts.
    """

    def __init__(self, context: object, workers: int = 2, *, address: str | None = None):
        try:
            import ray
        except ImportError as error:
            raise MissingPackage("ray", "compress") from error
        self.ray = ray
        self.workers = workers
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            self._start_ray(workers, address)
        self.context = ray.put(context)
        # By default Ray runs a crashing task four times; the search decides what is tried again.
        self.remote_task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(
            call_task
        )

    def _start_ray(self, workers: int, address: str | None) -> None:
        """Connect to a cluster, or start a Ray of this machine."""
        # Otherwise Ray hides the accelerators of tasks that ask for none.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        package = {"py_modules": [str(PACKAGE_FOLDER)]}
        # A Ray job already brings the package along, and so does this machine.
        is_job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
        try:
            self.ray.init(
                address=address or "local",
                num_cpus=None if address else workers,
                include_dashboard=None if address else False,
                runtime_env=package if address and not is_job else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
            place = address or "this machine"
            raise ClusterError(f"no Ray cluster at {place}: {error}") from error

    def submit(  # type: ignore[override]
        self, evaluate: Evaluate, /, *args: object, **kwargs: object
    ) -> Future[TaskResult]:
        reference = self.remote_task.remote(evaluate, self.context, args, kwargs)
        future: Future[TaskResult] = reference.future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop Ray if this executor started it."""
        if self.started_ray:
            with contextlib.suppress(Exception):
                self.ray.shutdown()
