"""What each part of the recipe brings: cells that differ in one thing, tables of them, and a sentence for each claim.

Cells share profile, predictor and evidence. Each is fitted to the same measured latency where its structure is free;
only cells whose claim is about training are trained. A done cell is not done again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmcompress.errors import DataError, SpecError, suggest_nearest
from mmcompress.experiments.baselines import BASELINES, Baseline, propose_by_knapsack
from mmcompress.experiments.compare import (
    TEACHER_LOSSES,
    judge_claim,
    make_cell,
    require_same_effort,
)
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.references import find_unjoined_encoders
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.registry import IMPORTANCE
from mmcompress.report.comparison_pages import write_ablation
from mmcompress.results.records import Summary
from mmcompress.run.compress.training import count_trained_steps
from mmcompress.run.fit import Propose
from mmcompress.run.predictor import build_predictor
from mmcompress.run.profile import Profile
from mmcompress.run.stages import prepare_run
from mmcompress.runtime.timing import Clock
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.spec.overrides import apply_overrides
from mmcompress.spec.schema import Spec
from mmcompress.spec.space import Space
from mmcompress.spec.target import require_one_target
from mmcompress.storage import build_record, read_record, to_plain, write_record
from mmcompress.workspace.context import OnProgress, RunContext, ignore_progress, open_run

UNTRAINED = {"distill.steps": 0}


REFERENCE_CHANGES = {"prune.schedule": "one_shot", "prune.refit": True, "prune.sparsity": 0.0}
"""What the cells differ from."""


REFERENCE_CELL = "order-prune__refit__distil__int8"
"""The folder of the recipe as it is: most cells take their structure from it."""


CRITERIA = (
    "fisher",
    "reconstruction",
    "taylor",
    "magnitude",
    "activation",
    "fluctuation",
    "movement",
    "random",
)


TABLES = (
    "order",
    "allocation",
    "protection",
    "importance",
    "zeros",
    "schedule",
    "losses",
)
"""The tables of an ablation, as `--tables` names them."""

PLACEBO_DRAWS = 3
"""Random sets of blocks that are protected in place of the cross-modal ones."""


@dataclass(frozen=True)
class Cell:
    """One row of a table: a method, with a few keys of the spec changed; `like`: the cell whose structure it takes."""

    table: str
    name: str
    method: Baseline
    changes: Mapping[str, Any] = field(default_factory=dict)
    like: str = ""

    @property
    def folder(self) -> str:
        return f"{self.table}-{self.name}".replace(" ", "_").replace("+", "").replace("/", "_")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`better` keeps more than `worse` (cells by folder; several are averaged); `apart`: at whatever latency."""

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    at_any_latency: bool = False


def make_placebo(seed: int) -> Baseline:
    """The knapsack with as much latency protected as the cross-modal blocks have, but of unimodal blocks by lot."""

    @contextmanager
    def propose(run: RunContext, ev: Sensitivity) -> Iterator[Propose]:
        predict = build_predictor(run, read_record(Profile, run.shared.profile))
        rows = predict.table.index_rows()
        inside = lambda n, p: predict.block_ms(n, p, units=p.units, precision="fp32", rows=rows)
        ms = {(n, p.name): inside(n, p) for n, row in predict.deployed.items() for p in row}
        mass = sum(v for (n, b), v in ms.items() if b in run.cross_modal[n])
        free = [at for at in ms if at[1] not in run.cross_modal[at[0]]]
        cross: dict[str, dict[str, str]] = {n: {} for n in run.blocks}
        for i in np.random.default_rng([run.spec.seed, seed]).permutation(len(free)):
            n, b = free[i]
            if (
                2 * mass > ms[n, b]
            ):  # what would overshoot by more than is missing is left to a smaller one
                cross[n][b], mass = "by lot", mass - ms[n, b]
        with propose_by_knapsack(dataclasses.replace(run, cross_modal=cross), ev) as inner:
            yield inner

    return Baseline(about=f"as much latency protected, by lot (draw {seed})", propose=propose)


def list_cells(spec: Spec) -> list[Cell]:
    """Every cell, those first that others take their structure from."""
    m, found = BASELINES, []
    add: Callable[..., None] = lambda *a, **k: found.append(Cell(*a, **k))
    add("order", "prune + refit + distil + int8", m["searched"])
    for name in (
        "uniform",
        "ranking",
        "knapsack",
        "relinearized",
        "searched",
        "random",
        "separate",
    ):
        add("allocation", name, m[name], UNTRAINED, REFERENCE_CELL if name == "searched" else "")
    knap = m["knapsack"]
    add(
        "protection",
        "protected",
        knap,
        {**UNTRAINED, "prune.protection": max(2.0, spec.prune.protection)},
    )
    add("protection", "unprotected", knap, {**UNTRAINED, "prune.protection": 1.0})
    for draw in range(PLACEBO_DRAWS):
        changes = {**UNTRAINED, "prune.protection": max(2.0, spec.prune.protection)}
        add("protection", f"placebo {draw}", make_placebo(draw), changes)
    alone = find_unjoined_encoders(spec)  # what no loss sees has no gradient
    for criterion in (c for c in CRITERIA if not (alone and IMPORTANCE.fact(c, "takes_gradients"))):
        for refit in (True, False):
            method = replace(
                m["uniform"], importance="" if criterion == spec.prune.importance else criterion
            )
            changes = {**UNTRAINED, "prune.refit": refit}
            add(
                "importance",
                criterion + (" + refit" if refit else ""),
                method,
                changes,
                "allocation-uniform",
            )
    like, fp32 = REFERENCE_CELL, {f"nodes.{n}.precision": "fp32" for n in spec.model_nodes()}
    bare = {"prune.refit": False}
    orders: dict[str, dict[str, Any]] = {
        "prune": {**UNTRAINED, **fp32, **bare},
        "prune + refit": {**UNTRAINED, **fp32},
        "prune + refit + distil": fp32,
        "prune + distil + int8": bare,
        "prune + refit + int8": UNTRAINED,
        "distil + prune + refit + int8": {"prune.schedule": "late"},
    }
    for name, changes in orders.items():
        add("order", name, m["searched"], changes, like)
    for pattern in ("unstructured", "2:4"):
        zeros = {**UNTRAINED, "prune.sparsity": 0.5, "prune.pattern": pattern}
        add("zeros", pattern.replace(":", " of "), m["searched"], zeros, like)
    add("schedule", "gradual", m["searched"], {"prune.schedule": "gradual"}, like)
    add("schedule", "rewind", m["searched"], {"prune.schedule": "rewind"}, like)
    task = ("contrast", "caption")
    losses = {
        "no task loss": task,
        "no logits": ("logits",),
        "no features": ("embedding", "tokens"),
    }
    losses |= {"no affinity": ("affinity",), "task loss alone": TEACHER_LOSSES}
    add(
        "losses",
        "what blocks add too",
        m["searched"],
        {"distill.hidden": 1.0, "distill.cross": 1.0},
        like,
    )
    for name, off in losses.items():
        rest = any(getattr(spec.distill, k) for k in (*TEACHER_LOSSES, *task) if k not in off)
        if off == TEACHER_LOSSES and alone:
            continue
        if rest and any(
            getattr(spec.distill, k) for k in off
        ):  # else it is the reference, or nothing is learnt
            changes = {f"distill.{k}": 0.0 for k in off}
            if off == TEACHER_LOSSES:  # a generator needs a loss of its own then
                changes["distill.caption"] = spec.distill.caption or 1.0
            add("losses", name, m["searched"], changes, like)
    return found


CLAIMS = (
    Claim(
        text="Searching finds better structures than a uniform ratio",
        better=("allocation-searched",),
        worse=("allocation-uniform",),
    ),
    Claim(
        text="Searching finds better structures than the knapsack alone",
        better=("allocation-searched",),
        worse=("allocation-knapsack",),
    ),
    Claim(
        text="Guided search beats as many random trials",
        better=("allocation-searched",),
        worse=("allocation-random",),
    ),
    Claim(
        text="Damage measured among the other cuts makes a better split",
        better=("allocation-relinearized",),
        worse=("allocation-knapsack",),
    ),
    Claim(
        text="One joint budget beats a budget for each model, by the same evidence",
        better=("allocation-knapsack",),
        worse=("allocation-separate",),
    ),
    Claim(
        text="Searching finds better structures than a budget for each model",
        better=("allocation-searched",),
        worse=("allocation-separate",),
    ),
    Claim(
        text="Protecting cross-modal layers helps at equal latency",
        better=("protection-protected",),
        worse=("protection-unprotected",),
    ),
    Claim(
        text="Protecting them helps more than protecting as much by lot",
        better=("protection-protected",),
        worse=tuple(f"protection-placebo_{i}" for i in range(PLACEBO_DRAWS)),
    ),
    *(
        Claim(
            text=f"Reconstruction scores beat {what}",
            better=("importance-reconstruction__refit",),
            worse=(f"importance-{of}__refit",),
        )
        for of, what in (
            ("fisher", "Fisher scores"),
            ("magnitude", "the norms of weights"),
            ("random", "chance"),
        )
    ),
    Claim(
        text="Refit helps without training", better=("order-prune__refit",), worse=("order-prune",)
    ),
    Claim(
        text="Refit helps with training",
        better=(REFERENCE_CELL,),
        worse=("order-prune__distil__int8",),
    ),
    Claim(
        text="Distillation helps after refit",
        better=("order-prune__refit__distil",),
        worse=("order-prune__refit",),
    ),
    Claim(
        text="Distillation helps what is rounded as well",
        better=(REFERENCE_CELL,),
        worse=("order-prune__refit__int8",),
    ),
    Claim(
        text="Pruning before training beats training before pruning",
        better=(REFERENCE_CELL,),
        worse=("order-distil__prune__refit__int8",),
    ),
    Claim(
        text="The same structure keeps more in fp32 than rounded",
        better=("order-prune__refit__distil",),
        worse=(REFERENCE_CELL,),
        at_any_latency=True,
    ),
    Claim(
        text="Gradual pruning beats one shot at the same budget",
        better=("schedule-gradual",),
        worse=(REFERENCE_CELL,),
    ),
    Claim(
        text="Rewinding the survivors beats one shot",
        better=("schedule-rewind",),
        worse=(REFERENCE_CELL,),
    ),
    Claim(
        text="Distilling adds to the task loss",
        better=(REFERENCE_CELL,),
        worse=("losses-task_loss_alone",),
    ),
    Claim(
        text="Matching what blocks add helps",
        better=("losses-what_blocks_add_too",),
        worse=(REFERENCE_CELL,),
    ),
)


def ablate(
    spec_path: str | Path,
    out: str | Path,
    *,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    on_progress: OnProgress = ignore_progress,
    tables: tuple[str, ...] = (),
    bench: Benchmarker | None = None,
    clock: Clock | None = None,
) -> dict[str, Summary]:
    """Every cell's summary by its folder in `out`, and `ablation.html` beside them; of some `tables` or of all.

    Raises `SpecError` for an unknown table or several targets.
    """
    spec = _changed(require_one_target(load_spec(spec_path, overrides)), REFERENCE_CHANGES)
    every = list_cells(spec)
    known = list(dict.fromkeys(c.table for c in every))
    if unknown := [t for t in tables if t not in known]:
        raise SpecError(
            f"ablate: unknown table '{unknown[0]}'; {suggest_nearest(unknown[0], known)}"
        )
    r = replace(
        open_run(
            spec_path,
            out,
            space=space,
            overrides=overrides,
            resume=resume,
            on_progress=on_progress,
            bench=bench,
            clock=clock,
        ),
        spec=spec,
    )
    every = [c for c in every if c.method.is_suitable(r)]
    wanted = [c for c in every if not tables or c.table in tables]
    needed = {c.like for c in wanted}
    wanted = [c for c in every if c in wanted or c.folder in needed]
    require_same_effort(r)
    prepared = prepare_run(r)
    r, dense = prepared.run, prepared.dense
    found: dict[str, Summary] = {}
    steps = 0
    for i, c in enumerate(wanted):
        record, what = r.folder.subfolder(c.folder).summary, r.folder.subfolder(c.folder).cell
        meant = {"about": c.method.about, "changes": dict(c.changes), "like": c.like}
        if record.exists() and (not what.exists() or json.loads(what.read_text()) != meant):
            raise DataError(
                f"{record.parent}: this cell was made by an mmcompress that made it otherwise; use a new --out"
            )
        if not record.exists():
            on_progress("ablate", f"{c.table}: {c.name} ({i + 1} of {len(wanted)})", None)
            run = replace(r, spec=_changed(r.spec, c.changes), space=_pinned(r.space, c.changes))
            write_record(what, meant)
            tried = (
                c.table == "allocation"
                and c.like
                and r.folder.subfolder(c.like).short_finetunings.exists()
            )
            # a structure that was chosen by what training makes of it is none to be compared untrained
            make_cell(
                run,
                c.folder,
                method=replace(c.method, structure_of="" if tried else c.like),
                prepared=prepared,
                steps=steps,
            )
        found[c.folder] = read_record(Summary, record)
        steps = steps or count_trained_steps(r.folder.subfolder(c.folder))
        _tell(r, dense, wanted=wanted, found=found)
    return found


def _tell(
    r: RunContext, dense: Profile, *, wanted: Sequence[Cell], found: Mapping[str, Summary]
) -> None:
    """Write the report of the cells that are done."""

    rows: dict[str, dict[str, Summary]] = {}
    for c in wanted:
        if c.folder in found:
            rows.setdefault(c.table, {})[c.name] = found[c.folder]
    known = (c for c in CLAIMS if all(f in found for f in (*c.better, *c.worse)))
    claims = [
        judge_claim(r, dense, says=c.text, better=c.better, worse=c.worse, apart=c.at_any_latency)
        for c in known
    ]
    write_ablation(rows, claims, folder=r.folder.path)


def _pinned(space: Space, changes: Mapping[str, Any]) -> Space:
    """The space without what a cell fixes."""
    return replace(
        space, dimensions={path: d for path, d in space.dimensions.items() if path not in changes}
    )


def _changed(spec: Spec, changes: Mapping[str, Any]) -> Spec:
    return build_record(Spec, apply_overrides(to_plain(spec), changes))
