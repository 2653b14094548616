"""Executors of trials, each a `concurrent.futures.Executor`. Only plain data goes to a worker."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from dataclasses import dataclass, field
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

from mmcompress.errors import ClusterError
from mmcompress.graph.structure import Candidate
from mmcompress.spec.schema import Cluster, Spec, TaskResources
from mmcompress.storage import to_plain


class TaskResult(TypedDict):
    """What evaluating one candidate gives."""

    loss: float
    """The pipeline's loss on validation pairs; lower is better."""
    seconds: NotRequired[float]
    """Wall seconds on the worker."""
    quality: NotRequired[dict[str, float]]
    """Shares from 0 to 1 by name; missing where only the loss is measured."""
    worker: NotRequired[str]
    """Machine and process that ran the task; the executor adds it."""


class TrialTimeout(Exception):
    """A trial took longer than it may."""


class WorkerDied(Exception):
    """The process of a worker ended in the middle of a trial; another one takes its place."""


Evaluate = Callable[..., TaskResult]
"""(context, candidate as plain data) -> result. The executor supplies the context."""


def get_watchdog_seconds(evaluate: Evaluate) -> float:
    """Return the seconds after which the watchdog of an evaluation ends its process; 0: never."""
    seconds: float = getattr(evaluate, "seconds", 0.0)
    grace_seconds: float = getattr(evaluate, "grace_seconds", 0.0)
    return seconds + grace_seconds if seconds else 0.0


def describe_ended_worker(evaluate: Evaluate) -> str:
    """Return what is told of a trial that the watchdog ended together with its worker."""
    seconds: float = getattr(evaluate, "seconds", 0.0)
    return (
        f"it took more than {seconds:g} s (search.trial_seconds) and did not stop, so its worker"
        " was ended; another one was started"
    )


def call_task(
    evaluate: Evaluate, context: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> TaskResult:
    """Call `evaluate(context, ...)` and add the machine and the process to its result."""
    worker = f"{os.uname().nodename}/{os.getpid()}"
    result = evaluate(context, *args, **kwargs)
    if "loss" not in result:
        # An evaluation of a plug-in: its trial fails, and the search goes on.
        raise TypeError(f"{describe_function(evaluate)} gives no loss")
    return {**result, "worker": worker}


def describe_function(function: Callable[..., object]) -> str:
    """Return the name of a function, for a message."""
    return str(getattr(function, "__name__", function))


@runtime_checkable
class ExplainsWait(Protocol):
    """An executor that can say why a task does not begin."""

    def explain_wait(self) -> str:
        """Return what a task needs and what there is."""
        ...


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

    Args:
        candidate: What is evaluated, as plain data.
        evaluate: The function that a worker calls.
        executor: Runs it on a worker.
        retries: How often a failed try is submitted again.

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
        Whether it was submitted again; `task.future` is then the new try. A trial that took too
        long is not: it would do so again.

    Raises:
        ClusterError: A worker process died and took the executor with it.
    """
    error = task.future.exception()
    if error is None or task.retries_left == 0 or isinstance(error, TrialTimeout):
        return False
    task.retries_left -= 1
    task.future = _submit(task.candidate, task.evaluate, executor=task.executor)
    return True


def make_broken_executor_error() -> ClusterError:
    """Make the error for an executor that lost a worker process."""
    return ClusterError(
        "a worker process died (out of memory, or far beyond search.trial_seconds?); "
        "finished trials are kept: use --resume"
    )


def _submit(candidate: Candidate, evaluate: Evaluate, *, executor: Executor) -> Future[TaskResult]:
    """Submit a candidate as plain data."""
    try:
        return executor.submit(evaluate, to_plain(candidate))
    except BrokenExecutor as error:
        raise make_broken_executor_error() from error


def answer_from_worker(context: object, number: int) -> TaskResult:
    """Return a result at once: the task that every kind of worker is tried with.

    It looks for torch and does not import it: that takes seconds on each worker.

    Raises:
        ModuleNotFoundError: The worker has no torch.
    """
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'")
    return {"loss": float(number), "seconds": 0.0}


@dataclass(frozen=True, kw_only=True)
class ExecutorSettings:
    """What a spec says of the place where trials run. Every executor receives it."""

    address: str | None = None
    """Address of a running cluster; None: this machine."""
    resources: TaskResources = field(default_factory=TaskResources)
    """What a trial reserves."""
    cluster: Cluster = field(default_factory=Cluster)
    """What the nodes of a cluster need."""

    @classmethod
    def from_spec(cls, spec: Spec) -> ExecutorSettings:
        """Return what a spec says."""
        return cls(
            address=spec.search.ray_address,
            resources=spec.resources.trial,
            cluster=spec.cluster,
        )


class InlineExecutor(Executor):
    """Runs each task at once, in this process."""

    workers = 1
    """Tasks at a time, whatever the spec asks for."""

    def __init__(
        self,
        context: object,
        workers: int = 1,
        settings: ExecutorSettings | None = None,
    ):
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


class _ProcessExecutor(Executor):
    """Worker processes that end one by one: where one dies, its trial fails, and another starts.

    A pool of several processes is lost as a whole when one of them dies. So every worker is a pool
    of one process. A thread waits for each.
    """

    def __init__(self, context: object, workers: int):
        self.context = context
        self.workers = workers
        self.threads = ThreadPoolExecutor(workers)
        self.idle_pools: queue.SimpleQueue[ProcessPoolExecutor] = queue.SimpleQueue()
        self.pools: set[ProcessPoolExecutor] = set()
        for _ in range(workers):
            self._start_worker()

    def submit(  # type: ignore[override]
        self, evaluate: Evaluate, /, *args: object, **kwargs: object
    ) -> Future[TaskResult]:
        return self.threads.submit(self._run_task, evaluate, args=args, kwargs=kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the workers go; those at work end their trial first."""
        self.threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        for pool in list(self.pools):
            pool.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _start_worker(self) -> None:
        """Start a worker; its process begins with its first task."""
        pool = ProcessPoolExecutor(
            1,
            # A forked child would inherit the locks of this process's threads.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_keep_context,
            initargs=(self.context,),
        )
        self.pools.add(pool)
        self.idle_pools.put(pool)

    def _run_task(
        self, evaluate: Evaluate, *, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> TaskResult:
        """Run a task on an idle worker.

        Raises:
            TrialTimeout: The process was ended since the task did not stop in time.
            WorkerDied: The process of the worker ended before the task did.
        """
        # There are as many threads as workers.
        pool = self.idle_pools.get()
        start = time.monotonic()
        try:
            future = pool.submit(_call_with_kept_context, evaluate, args=args, kwargs=kwargs)
            result = future.result()
        except BrokenExecutor as error:
            self.pools.discard(pool)
            pool.shutdown(wait=False)
            self._start_worker()
            seconds = time.monotonic() - start
            if 0 < get_watchdog_seconds(evaluate) <= seconds:
                # It would do so again, so it is not tried again.
                raise TrialTimeout(describe_ended_worker(evaluate)) from error
            raise WorkerDied(
                f"the worker process ended after {seconds:.0f} s (killed, or out of memory); "
                "another one was started"
            ) from error
        except BaseException:
            self.idle_pools.put(pool)
            raise
        self.idle_pools.put(pool)
        return result


def make_process_executor(
    context: object,
    workers: int = 2,
    settings: ExecutorSettings | None = None,
) -> Executor:
    """Start worker processes on this machine; each receives the context once.

    Args:
        context: First argument of every task.
        workers: Processes.
        settings: Not used; every executor takes them.
    """
    return _ProcessExecutor(context, workers)
