"""The executor that runs trials on Ray, on this machine or a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from concurrent.futures import Executor, Future
from functools import partial

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, WorkerCrashedError

from mmcompress.errors import ClusterError
from mmcompress.search.executors import (
    Evaluate,
    TaskResult,
    TrialTimeout,
    WorkerDied,
    call_task,
    describe_ended_worker,
    get_watchdog_seconds,
)
from mmcompress.search.ray_folder import choose_ray_folder
from mmcompress.version import PACKAGE_FOLDER


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
    return WorkerDied(
        "the worker process ended (killed, or out of memory); another one takes its place"
    )


class RayExecutor(Executor):
    """Runs tasks of one CPU each on Ray, spread over the nodes of a cluster.

    The context is put into the object store once.

    Args:
        context: First argument of every task.
        workers: Tasks at a time; the CPUs of a local Ray.
        address: Address of the cluster; without one a local Ray is started.

    Raises:
        ClusterError: No cluster answers at the address, or no local Ray starts.
    """

    def __init__(self, context: object, workers: int = 2, *, address: str | None = None):
        self.workers = workers
        self.started_ray = not ray.is_initialized()
        if self.started_ray:
            self._start_ray(workers, address)
        self.context = ray.put(context)
        # By default Ray runs a crashing task four times; the search decides what is tried again.
        self.remote_task = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(
            _call_task_on_ray
        )

    def _start_ray(self, workers: int, address: str | None) -> None:
        """Connect to a cluster, or start a Ray of this machine."""
        # Otherwise Ray hides the accelerators of tasks that ask for none.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        package = {"py_modules": [str(PACKAGE_FOLDER)]}
        # A Ray job already brings the package along, and so does this machine.
        is_job = bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))
        try:
            ray.init(
                address=address or "local",
                num_cpus=None if address else workers,
                include_dashboard=None if address else False,
                runtime_env=package if address and not is_job else None,
                log_to_driver=False,
                _temp_dir=None if address else choose_ray_folder(),
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            place = address or "this machine"
            raise ClusterError(f"no Ray cluster at {place}: {error}") from error

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

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop Ray if this executor started it."""
        if self.started_ray:
            with contextlib.suppress(Exception):
                ray.shutdown()
