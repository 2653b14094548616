"""Begins a run: what is wrong with this machine ends it in the first second, not after an hour."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Unpack

from mmcompress.errors import DataError
from mmcompress.graph.load_spec import load_spec
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.registry import resolve_entry
from mmcompress.runtime.cache import find_cache_fault
from mmcompress.runtime.progress import ProgressListener, ignore_progress
from mmcompress.runtime.providers import find_provider
from mmcompress.search.ray_folder import choose_ray_folder
from mmcompress.spec.schema import Spec
from mmcompress.spec.storage_urls import is_remote
from mmcompress.workspace.context import RunContext, open_run
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import hold_folder
from mmcompress.workspace.mirror_run import keep_run, locate_run_folder
from mmcompress.workspace.progress_log import ProgressLog
from mmcompress.workspace.run_options import RunOptions

CHECK_DATABASE = "mmcompress.search.database_study:check_database"
"""Checks that the database of the trials answers; it takes its driver."""

OPEN_NODE_BENCHMARKER = "mmcompress.run.measure_on_ray:open_node_benchmarker"
"""Gives a benchmarker that measures on a node of a cluster; it takes Ray."""


@contextmanager
def begin_run(
    spec_path: str | Path,
    out: str | Path,
    **options: Unpack[RunOptions],
) -> Iterator[RunContext]:
    """Open a run that this process alone works on until the block ends.

    Args: as `open_run` takes them; `out` may be a storage URL, too.

    Raises:
        DataError: Another process works on the folder, or it can't be written, nor can the cache.
            Or what `open_run` raises.
        ClusterError: Ray can't be started on this machine.
    """
    spec = load_spec(spec_path, options.get("overrides"))
    listener = options.get("on_progress", ignore_progress)
    folder = locate_run_folder(out)
    log = ProgressLog(RunFolder(path=folder), listener)
    options["on_progress"] = log
    resume = options.get("resume", False)
    tell = partial(_tell_storage, listener)
    with keep_run(out, resume=resume, tell=tell), hold_folder(folder):
        RunFolder(path=folder).require_free(resume=resume)
        _check_before_loading(spec)
        with open_benchmarker(spec) as bench:
            options["bench"] = options.get("bench") or bench
            run = open_run(spec_path, folder, **options)
            run.storage_url = str(out) if is_remote(str(out)) else ""
            log.begin()
            try:
                yield run
            finally:
                remove_scratch(RunFolder(path=folder))


def remove_scratch(folder: RunFolder) -> None:
    """Remove what a run was making for a while when it was stopped, of all its targets."""
    for place in (folder, *folder.list_inner_folders()):
        shutil.rmtree(place.scratch, ignore_errors=True)


def _tell_storage(listener: ProgressListener, message: str) -> None:
    """Tell a person of the storage that a run is kept at."""
    listener("storage", message, None)


@contextmanager
def open_benchmarker(spec: Spec) -> Iterator[Benchmarker]:
    """Give what measures latencies: this machine, or the node that `resources.measure` names.

    Raises:
        ClusterError: No cluster answers, or no node of it carries the resources.
    """
    if not spec.resources.measure.custom:
        yield Benchmarker()
        return
    with resolve_entry(OPEN_NODE_BENCHMARKER)(spec) as bench:
        yield bench


def _check_before_loading(spec: Spec) -> None:
    """Check what fails in a second and costs nothing.

    Raises:
        ClusterError: Ray can't be started on this machine.
        MissingProvider: The provider is not installed, or finds no device.
        DataError: The cache can't be written, or the database of the trials gives no answer.
        MissingPackage: The driver of the database is not installed.
    """
    if spec.search.executor == "ray" and not spec.search.ray_address:
        choose_ray_folder()
    # It is not there, or it finds no device: that is told now, not after the profile.
    find_provider(spec.measure.provider)
    if spec.search.storage:
        resolve_entry(CHECK_DATABASE)(spec.search.storage)
    fault = find_cache_fault()
    if fault:
        raise DataError(fault)
