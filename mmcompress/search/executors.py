"""Where trials run: anything that is a `concurrent.futures.Executor`. Only plain data crosses to a worker."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any

from mmcompress.errors import ClusterError, MissingPackage
from mmcompress.version import PACKAGE_FOLDER

Task = Callable[..., Any]


def call_task(fn: Task, context: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`fn(context, ...)`, a dict, with the name of the worker added."""
    return {**fn(context, *args, **kwargs), "worker": worker_name()}


class InlineExecutor(Executor):
    """Runs each task at once, in this process."""

    workers = 1

    def __init__(self, context: Any, workers: int = 1, *, address: str | None = None):
        self.context = context

    def submit(self, fn: Task, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(call_task(fn, self.context, *args, **kwargs))
        except Exception as e:  # a failed trial is the caller's to record
            future.set_exception(e)
        return future


_shared: Any = None


def _adopt(context: Any) -> None:
    global _shared
    _shared = context


def _with_shared(fn: Task, args: tuple, kwargs: dict) -> Any:
    return call_task(fn, _shared, *args, **kwargs)


class _Processes(ProcessPoolExecutor):
    def submit(self, fn: Task, /, *args: Any, **kwargs: Any) -> Future:
        return super().submit(_with_shared, fn, args, kwargs)


def make_process_executor(
    context: Any, workers: int = 2, *, address: str | None = None
) -> Executor:
    """Worker processes of this machine, each given the context once."""
    spawn = multiprocessing.get_context("spawn")
    return _Processes(workers, mp_context=spawn, initializer=_adopt, initargs=(context,))


class RayExecutor(Executor):
    """Ray tasks of one CPU each, spread over the nodes of a cluster; without an address, a local Ray of its own.

    The context is put into the object store once. Ray's own retries are off: the search decides what to try again.
    """

    def __init__(self, context: Any, workers: int = 2, *, address: str | None = None):
        try:
            import ray
        except ImportError as e:
            raise MissingPackage("ray", "compress") from e
        self.ray, self.workers = ray, workers
        self.own = not ray.is_initialized()
        if self.own:
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if address:
                options["address"] = address
                if not os.environ.get(
                    "RAY_JOB_CONFIG_JSON_ENV_VAR"
                ):  # a job brings the package along itself
                    options["runtime_env"] = {"py_modules": [str(PACKAGE_FOLDER)]}
            else:
                options |= {"num_cpus": workers, "include_dashboard": False, "address": "local"}
            try:
                ray.init(**options)
            except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
                raise ClusterError(f"no Ray cluster at {address or 'this machine'}: {e}") from e
        self.context = ray.put(context)
        self.remote = ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")(call_task)

    def submit(self, fn: Task, /, *args: Any, **kwargs: Any) -> Future:
        return self.remote.remote(fn, self.context, *args, **kwargs).future()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self.own:
            with contextlib.suppress(Exception):
                self.ray.shutdown()


def worker_name() -> str:
    """The node and process this code runs on, for the record of a trial."""
    host, pid = os.uname().nodename, os.getpid()
    try:
        import ray

        if ray.is_initialized():
            return f"{ray.get_runtime_context().get_node_id()[:8]}/{pid}"
    except ImportError:
        pass
    return f"{host}/{pid}"
