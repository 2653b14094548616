"""TODO."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from mmcompress.measure.cost_model.plan import Export
from mmcompress.runtime.sessions import open_session
from mmcompress.runtime.timing import min_of_medians


def time_export(e: Export, folder: Path, *, threads: int) -> float:
    """Milliseconds one request spends in the sessions of an export."""
    total = 0.0
    for call in e.graphs.values():
        run = open_session(folder / call.file, threads)
        used = {i.name for i in run.get_inputs()}
        with np.load(folder / call.feed, allow_pickle=False) as given:
            feed = {k: given[k] for k in given.files if k in used}
        total += call.calls * min_of_medians(partial(run.run, None, feed), 5, rounds=100, limit=0.4)
    return total
