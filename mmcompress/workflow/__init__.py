"""The order of the stages, and nothing else: each is a function that leaves a record in the run folder.

profile -> evidence -> search -> fit -> compress -> measure -> summary
                         ^        |
                         +--------+  a measured miss corrects the prediction and the search goes on
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.records import Summary
from mmcompress.workflow.choose import fit
from mmcompress.workflow.conclude import summarize
from mmcompress.workflow.dense import evidence, predictor, profile
from mmcompress.workflow.make import compress
from mmcompress.workflow.state import SILENT, Say, default_space, open_run

__all__ = ["default_space", "open_run", "predictor", "profile", "run"]


def run(
    spec_path: str | Path,
    out: str | Path,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    say: Say = SILENT,
) -> Summary:
    """Compress a pipeline to its target: the whole way. Returns the summary; the report is in `out`.

    Raises `SpecError`, `DataError`, `ModelError` for bad input and `ProofFailed` when an artifact is wrong. A target
    that is not met is no exception: `summary.target.met` says so.
    """
    r = open_run(spec_path, out, space, overrides, resume, say)
    dense = profile(r)
    predict = predictor(r, dense)
    ev = evidence(r)
    fitted = fit(r, ev, predict, dense)
    models, proofs = compress(r, ev, fitted)
    summary = summarize(r, fitted, models, [*dense.proofs, *proofs])
    from mmcompress.report import write_report

    write_report(summary, r.folder)
    return summary
