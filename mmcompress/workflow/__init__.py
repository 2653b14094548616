"""The order of the stages, and nothing else: each is a function that leaves a record in the run folder.

profile -> evidence -> search -> fit -> compress -> measure -> summary
                         ^        |                    |
                         +--------+--------------------+  a measured miss corrects the prediction, the search goes on

Several targets share profile, predictor and evidence; the rest has a folder for each.
"""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from typing import Any

from mmcompress.errors import SpecError
from mmcompress.records import Summary, read
from mmcompress.spec.loader import targets
from mmcompress.workflow.conclude import summarize
from mmcompress.workflow.dense import Profile, predictor, prepared, profile, write_kit
from mmcompress.workflow.fit import fit
from mmcompress.workflow.make import compress
from mmcompress.workflow.state import SILENT, Run, Say, default_space, open_run

__all__ = ["default_space", "open_run", "predictor", "profile", "run", "run_targets", "write_kit"]
NEAR = 0.95
"""A finished artifact faster than this share of its target has lost more than it needed, unless it was meant to be:
nothing slower within the target was better."""
ARTIFACTS = ("bundle", "weights", "fitted.json", "distill.json", "outcomes.json", "summary.json")


def run(
    spec_path: str | Path,
    out: str | Path,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    say: Say = SILENT,
) -> Summary:
    """Compress a pipeline to its one target: the whole way. Returns the summary; the report is in `out`.

    Raises `SpecError`, `DataError`, `ModelError` for bad input and `ProofFailed` when an artifact is wrong. A target
    that is not met is no exception: `summary.target.met` says so.
    """
    found = run_targets(spec_path, out, space, overrides, resume, say)
    if len(found) > 1:
        raise SpecError("several targets: use run_targets")
    return found[0]


def run_targets(
    spec_path: str | Path,
    out: str | Path,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    say: Say = SILENT,
) -> tuple[Summary, ...]:
    """`run` for every target of the spec; several have a folder each in `out`, and a front beside them."""
    r = open_run(spec_path, out, space, overrides, resume, say)
    dense, predict, ev = prepared(r)
    wanted = targets(r.spec)
    found = tuple(_reach(r.aimed_at(t) if len(wanted) > 1 else r, dense, predict, ev) for t in wanted)
    if len(found) > 1:
        from mmcompress.report.several import write_front

        write_front({t.replace(" ", "-"): s for t, s in zip(wanted, found, strict=True)}, r.folder)
    return found


def _reach(r: Run, dense: Profile, predict: Any, ev: Any) -> Summary:
    """One target: search, make, measure; when the finished artifact misses, once more with what was learnt."""
    from mmcompress.report import write_report

    bias, kept = 1.0, r.folder / "earlier"
    finished = (r.folder / "summary.json").exists() and not kept.exists()
    rounds = r.spec.search.rounds
    for done in count(1):
        fitted = fit(r, ev, predict, dense, bias)
        summary = summarize(r, fitted, dense, *compress(r, ev, fitted, dense))
        reached, meant = _share(summary), fitted.predicted_ms / fitted.target_ms
        out_of_reach = reached > 1 and summary.target.floor_ms > summary.target.latency_ms
        tries = 1 if finished else rounds if reached <= 1 else max(rounds, 2)  # a miss is always tried once more
        if NEAR <= reached <= 1 or max(reached, meant) < NEAR or out_of_reach or done >= tries:
            break
        bias *= reached / (fitted.measured_ms / fitted.target_ms)
        r.say("fit", f"the finished artifact lies at {reached:.1%} of its target: once more", None)
        _move(r.folder, kept)
    if kept.exists():
        earlier = read(Summary, kept / "summary.json")
        if _worth(earlier) > _worth(summary):
            _move(kept, r.folder)
            summary = earlier
        shutil.rmtree(kept)
    write_report(summary, r.folder)
    return summary


def _share(s: Summary) -> float:
    return float(getattr(s.compressed.latency_ms, s.target.statistic)) / s.target.latency_ms


def _worth(s: Summary) -> tuple[bool, bool, float]:
    """Met, and not much faster than asked, first; then what was kept, or how near it came."""
    return s.target.met, _share(s) >= NEAR, s.quality_retained if s.target.met else -_share(s)


def _move(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in ARTIFACTS:
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        if (source / name).exists():
            (source / name).replace(target / name)
