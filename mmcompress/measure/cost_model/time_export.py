"""Time a whole export on this device. No torch here."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from mmcompress.measure.cost_model.plan import Export
from mmcompress.runtime.providers import CPU_PROVIDER
from mmcompress.runtime.sessions import open_session
from mmcompress.runtime.timing import find_lowest_median
from mmcompress.runtime.token_scores import choose_fetched_outputs

EXPORT_WARMUP_CALLS = 5
"""Calls before an export is timed: the first ones allocate its memory."""

EXPORT_CALLS = 100
"""Calls of one short measurement of an export. There are few exports, and the fit depends on
each."""

EXPORT_SECONDS = 0.4
"""Seconds of all short measurements of one graph."""


def time_export(
    export: Export, folder: Path, *, threads: int, provider: str = CPU_PROVIDER
) -> float:
    """Measure the time that one request spends in the sessions of an export.

    Args:
        export: The export.
        folder: The folder that its files are relative to.
        threads: Threads of a session.
        provider: What sessions run on.

    Returns:
        Milliseconds per request, over all calls of all graphs.
    """
    total_ms = 0.0
    for call in export.graphs.values():
        session = open_session(folder / call.file, threads, provider=provider)
        output_names = choose_fetched_outputs([output.name for output in session.get_outputs()])
        input_names = {graph_input.name for graph_input in session.get_inputs()}
        with np.load(folder / call.feed, allow_pickle=False) as arrays:
            # an optimized graph may have lost an input that it did not use
            feed = {name: arrays[name] for name in arrays.files if name in input_names}
        call_ms = find_lowest_median(
            partial(session.run, output_names, feed),
            EXPORT_WARMUP_CALLS,
            rounds=EXPORT_CALLS,
            limit=EXPORT_SECONDS,
        )
        total_ms += call.calls * call_ms
    return total_ms
