"""Begins a run: what is wrong with this machine ends it in the first second, not after an hour."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Unpack

from mmcompress.errors import DataError
from mmcompress.graph.load_spec import load_spec
from mmcompress.runtime.cache import find_cache_fault
from mmcompress.runtime.progress import ignore_progress
from mmcompress.search.ray_folder import choose_ray_folder
from mmcompress.spec.schema import Spec
from mmcompress.workspace.context import RunContext, open_run
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.hold_folder import hold_folder
from mmcompress.workspace.progress_log import ProgressLog
from mmcompress.workspace.run_options import RunOptions


@contextmanager
def begin_run(
    spec_path: str | Path,
    out: str | Path,
    **options: Unpack[RunOptions],
) -> Iterator[RunContext]:
    """Open a run that this process alone works on until the block ends.

    Args: as `open_run` takes them.

    Raises:
        DataError: Another process works on the folder, or it can't be written, nor can the cache.
            Or what `open_run` raises.
        ClusterError: Ray can't be started on this machine.
    """
    spec = load_spec(spec_path, options.get("overrides"))
    listener = options.get("on_progress", ignore_progress)
    options["on_progress"] = ProgressLog(RunFolder(path=Path(out)), listener)
    with hold_folder(out):
        _check_before_loading(spec)
        yield open_run(spec_path, out, **options)


def _check_before_loading(spec: Spec) -> None:
    """Check what fails in a second and costs nothing. Raises `ClusterError` or `DataError`."""
    if spec.search.executor == "ray" and not spec.search.ray_address:
        choose_ray_folder()
    fault = find_cache_fault()
    if fault:
        raise DataError(fault)
