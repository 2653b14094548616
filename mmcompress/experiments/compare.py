"""Methods side by side: one pipeline and target, and the same sensitivity, effort and training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from mmcompress.errors import SpecError, suggest_nearest
from mmcompress.experiments.baselines import BASELINES
from mmcompress.experiments.claims import Claim, judge_claim
from mmcompress.experiments.make_cell import make_cell, make_missing_cells, require_same_effort
from mmcompress.graph.load_spec import load_spec
from mmcompress.report.comparison_pages import write_comparison
from mmcompress.results.records import Summary
from mmcompress.run.begin_run import begin_run
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.stages import prepare_run
from mmcompress.spec.target import require_one_target
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.run_options import RunOptions


def compare(
    spec_path: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str] = tuple(BASELINES),
    **options: Unpack[RunOptions],
) -> dict[str, Summary]:
    """Make the artifact of each method, and write `compare.html` into `out`.

    Args:
        spec_path: The spec file, with one target.
        out: The folder; each method gets one of its own in it.
        methods: Names in `BASELINES`.
        options: See `RunOptions`. Of a folder to go on in, methods that are done are kept.

    Returns:
        The summary of each method, and of those whose structures they take.

    Raises:
        SpecError: A method is unknown, unsuitable or impossible in this space, or there are
            several targets.
        DataError: The comparison was begun with another search effort.
    """
    for name in methods:
        if name not in BASELINES:
            raise SpecError(f"compare: unknown method '{name}'; {suggest_nearest(name, BASELINES)}")
    require_one_target(load_spec(spec_path, options.get("overrides")))
    with begin_run(spec_path, out, **options) as run:
        require_same_effort(run)
        suitable_methods = _choose_methods(run, methods)
        return _make_methods(prepare_run(run), suitable_methods)


def _choose_methods(run: RunContext, methods: Sequence[str]) -> list[str]:
    """Return the suitable methods, each after the one whose structure it takes."""
    for name in methods:
        make_candidate = BASELINES[name].make_candidate
        if make_candidate is not None:
            # This raises now, before hours of work, where the space does not allow the structure.
            make_candidate(run)
    suitable_methods = [name for name in methods if BASELINES[name].is_suitable(run)]
    if methods and not suitable_methods:
        reason = BASELINES[methods[0]].why_unsuitable
        raise SpecError(f"compare: '{methods[0]}' is of no use here: {reason}")
    ordered_methods: dict[str, None] = {}
    for name in suitable_methods:
        if BASELINES[name].structure_of:
            ordered_methods[BASELINES[name].structure_of] = None
        ordered_methods[name] = None
    return list(ordered_methods)


def _make_methods(prepared: PreparedRun, methods: Sequence[str]) -> dict[str, Summary]:
    """Make what is missing, and write the pages after each method."""
    run = prepared.run
    summaries: dict[str, Summary] = {}

    def make_method(name: str, steps: int) -> None:
        run.on_progress("compare", name, None)
        make_cell(run, name, method=BASELINES[name], prepared=prepared, steps=steps)

    for summaries in make_missing_cells(run, methods, make=make_method):
        claims = [
            judge_claim(run, claim, dense=prepared.dense) for claim in _list_claims(summaries)
        ]
        write_comparison(
            summaries,
            {method: BASELINES[method].about for method in summaries},
            claims=claims,
            folder=run.folder,
        )
    return summaries


def _list_claims(summaries: dict[str, Summary]) -> list[Claim]:
    """Claim of every other finished method that the search keeps more."""
    if "searched" not in summaries:
        return []
    return [
        Claim(text=f"The search keeps more than '{name}'", better=("searched",), worse=(name,))
        for name in summaries
        if name != "searched"
    ]
