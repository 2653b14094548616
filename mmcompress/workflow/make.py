"""Stage: prune with proof, refit, distill, export, quantize."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcompress.records import Candidate, Proof, read
from mmcompress.workflow.choose import pruned, spared
from mmcompress.workflow.dense import Profile, generation_proofs
from mmcompress.workflow.fit import Fitted
from mmcompress.workflow.state import Run
from mmcompress.workflow.tryout import CHECKED, choosing_loss

if TYPE_CHECKING:  # it takes torch
    from mmcompress.prune.evidence import Evidence

Counts = dict[str, tuple[int, int, float]]
"""Parameters, multiply-accumulates a request, and share of zeros among the weights of the blocks, by node."""


AT_ONCE = ("one_shot", "late")
"""Schedules that train once."""
EVERY, STATE = 300.0, "training.safetensors"
"""Seconds of training between two checkpoints, and their file."""
AGAIN, WORSE = 1 / 3, 1.2
"""The share of the training budget of what is made once more, out of what was made before; where it starts out with so
many times the loss that that one ended with, it is trained like a new one."""


def compress(
    run: Run, ev: Evidence, fitted: Fitted, dense: Profile, scratch: bool = False, earlier: Path | None = None
) -> tuple[Counts, list[Proof]]:
    """Prune with proof, refit, distill, write the bundle. Weights are kept: a resumed run does not train again.

    Gives the size of what was made, and the proofs of both sides; the models themselves are let go. `scratch`: the
    structure starts from random weights, as a control; `earlier`: from those of an artifact in that folder.
    """
    from mmcompress.export.proofs import require, surgery
    from mmcompress.graph.topology import decode_steps, texts_read
    from mmcompress.measure.counts import count
    from mmcompress.prune.sparse import sparsity

    c = fitted.candidate
    models, survivors = _made(run, ev, c, scratch, earlier)
    with run.timed("prune"):
        batch = run.pipeline.batch(run.data.load("train", min(16, run.spec.data.batch), seed=3))
        known = run.pipeline.run(run.models, batch)
        proofs = surgery(run.pipeline, run.models, survivors, batch, known)
        proofs += require(surgery(run.pipeline, run.models, _random_units(run), batch, known))
        require(proofs)
    with run.timed("export"):
        run.say("export", "ONNX, rounding, proofs", None)
        bundle, aside = run.folder / "bundle", run.folder / "scratch"
        found = run.bundle(models, c.precision, c.kept, bundle, spared=spared(ev, c), aside=aside)
        found += generation_proofs(run, models, bundle, aside)
        shutil.rmtree(aside, ignore_errors=True)
        proofs += require(found)
    steps, texts = decode_steps(run.spec, dense.calls), texts_read(run.spec)
    counts = {n: (*count(m, steps[n], texts[n]), sparsity(m)) for n, m in models.items()}
    return counts, [*dense.proofs, *proofs]


def _made(run: Run, ev: Evidence, c: Candidate, scratch: bool, earlier: Path | None) -> tuple[dict[str, Any], Any]:
    """(trained models of a candidate, the units of the dense models that are left in them)."""
    from safetensors.torch import save_file

    from mmcompress.export.bundle import save_weights

    weights = run.folder / "weights"
    if (weights / "units.safetensors").exists():
        return _saved(run, ev, c, run.folder)
    at_once = scratch or run.spec.prune.schedule in AT_ONCE
    if earlier and not (run.spec.prune.schedule == "one_shot" and (earlier / "distill.json").exists()):
        earlier = None
    models, survivors = _at_once(run, ev, c, scratch, earlier) if at_once else _by_rounds(run, ev, c)
    save_weights(models, weights)
    ahead = weights / "units.new"  # what says that all of it is there comes last, and at once
    save_file({f"{n}/{b}": u for n, by in survivors.items() for b, u in by.items()}, ahead)
    ahead.rename(weights / "units.safetensors")
    return models, survivors


def _saved(run: Run, ev: Evidence, c: Candidate, folder: Path) -> tuple[dict[str, Any], Any]:
    """The same, as it was kept in a folder."""
    from safetensors.torch import load_file

    from mmcompress.export.bundle import load_weights

    models = pruned(run, ev, c, refit=False)
    for n, m in models.items():
        load_weights(m, folder / "weights" / f"{n}.safetensors")
    flat = load_file(folder / "weights" / "units.safetensors")
    return models, {n: {b.name: flat[f"{n}/{b.name}"] for b in m.blocks} for n, m in run.models.items()}


def _at_once(run: Run, ev: Evidence, c: Candidate, scratch: bool, earlier: Path | None) -> tuple[dict[str, Any], Any]:
    from mmcompress.prune.allocation import choose_units
    from mmcompress.prune.schedule import whole
    from mmcompress.prune.sparse import thin_

    late = run.spec.prune.schedule == "late" and not scratch
    dense = _trained_first(run) if late else run.models
    with run.timed("prune"):
        run.say("prune", "cutting and refitting", None)
        models, share = pruned(run, ev, c, run.spec.prune.refit and not scratch, dense), 1.0
        if scratch:
            _forget_(models, run.spec.seed)
        if earlier:
            models, share = _better_start(run, ev, c, models, earlier)
        units = {n: choose_units(c.kept[n], m.blocks, ev.scores[n]) for n, m in run.models.items()}
        survivors = {n: {**by, **units[n]} for n, by in whole(run.blocks).items()}
    if not late:
        _distill_(run, models, share, run.folder / "distill.json", trained(earlier) if earlier else 0)
    elif run.spec.prune.sparsity:
        thin_(models, run.spec.prune.pattern, run.spec.prune.sparsity)
    return models, survivors


def _better_start(
    run: Run, ev: Evidence, c: Candidate, fresh: dict[str, Any], earlier: Path
) -> tuple[dict[str, Any], float]:
    """Of fresh models and those with what the earlier artifact learnt (refitted or not) the ones of least loss, and the
    share of the training budget that they need."""
    from mmcompress.prune.refit import refit_

    inherited = _inherited(run, ev, earlier)
    learnt, mended = (pruned(run, ev, c, False, inherited) for _ in range(2))
    batch = run.pipeline.batch(run.data.load("train", run.spec.data.calibration))
    refit_(run.pipeline, mended, run.models, batch, run.spec.prune.ridge)
    starts = [(fresh, 1.0), (learnt, AGAIN), (mended, AGAIN)]
    losses = [choosing_loss(run, models) for models, _ in starts]
    best = starts[losses.index(min(losses))]
    rows = json.loads((earlier / "distill.json").read_text())
    if min(losses) > WORSE * min((row["choosing"] for row in rows if "choosing" in row), default=math.inf):
        best = (best[0], 1.0)
    if best[0] is not fresh:  # what the cut did is told of the first time
        shutil.copyfile(earlier / "distill.json", run.folder / "distill-0.json")
    return best


def _inherited(run: Run, ev: Evidence, earlier: Path) -> dict[str, Any]:
    """The dense models with what an earlier artifact learnt: its weights in their places, the rest as it was."""
    from mmcompress.models.sources import connect
    from mmcompress.prune.surgery import restored

    small, survivors = _saved(run, ev, read(Fitted, earlier / "fitted.json").candidate, earlier)
    models = {n: restored(m, small[n], survivors[n]) for n, m in run.models.items()}
    connect(run.spec, models)
    return models


def _trained_first(run: Run) -> dict[str, Any]:
    """The dense models after the training that the pruned ones would have got."""
    import copy

    from mmcompress.models.sources import connect

    models = {n: copy.deepcopy(m) for n, m in run.models.items()}
    connect(run.spec, models)
    _distill_(run, models, 1.0, run.folder / "distill.json")
    return models


def _by_rounds(run: Run, ev: Evidence, c: Candidate) -> tuple[dict[str, Any], Any]:
    """Prune and train in turn, units scored anew in each round; to rewind, the survivors start again as they were."""
    from mmcompress.models.sources import connect, earlier
    from mmcompress.prune.importance import Material, scored
    from mmcompress.prune.refit import measure_grams, refit_
    from mmcompress.prune.schedule import narrowed, plan, whole
    from mmcompress.prune.surgery import sliced
    from mmcompress.registry import IMPORTANCE

    p, rewind = run.spec.prune, run.spec.prune.schedule == "rewind"
    criterion, calibration = IMPORTANCE.get(p.importance), run.data.load("train", run.spec.data.calibration)
    batch, models, survivors, scores = run.pipeline.batch(calibration), run.models, whole(run.blocks), ev.scores
    share, done = 1 / (p.rounds + rewind), 0
    for i, kept in enumerate(plan(run.blocks, c.kept, p.rounds)):
        with run.timed("prune"):
            run.say("prune", f"round {i + 1} of {p.rounds}", None)
            if i:
                grams = measure_grams(run.pipeline, models, batch)
                scores = scored(criterion, Material(run.pipeline, models, batch, grams, run.spec.seed))
            models, survivors = narrowed(models, survivors, kept, scores)
            connect(run.spec, models)
            if p.refit:
                refit_(run.pipeline, models, run.models, batch, p.ridge)
        done += _distill_(run, models, share, run.folder / f"distill-{i + 1}.json", done)
    if rewind:
        with run.timed("prune"):
            models = {n: sliced(m, survivors[n]).eval() for n, m in earlier(run.spec, run.models).items()}
            connect(run.spec, models)
            if p.refit:
                refit_(run.pipeline, models, run.models, batch, p.ridge)
        _distill_(run, models, share, run.folder / "distill.json", done)
    return models, survivors


def trained(folder: Path) -> int:
    """The steps of all training that left a record in a folder."""
    return sum(_steps(json.loads(p.read_text())) for p in folder.glob("distill*.json"))


def _steps(curve: Sequence[Mapping[str, float]]) -> int:
    return max((int(row["step"]) for row in curve), default=0)


def _distill_(run: Run, models: dict[str, Any], share: float, history: Path, first: int = 0) -> int:
    """Train for a share of the spec's budget, after single weights were set to zero where the spec asks for it.

    `first`: steps that were trained before, on other pairs. Returns how many these were.
    """
    from mmcompress.distill.checkpoint import Checkpoint
    from mmcompress.distill.trainer import distill_
    from mmcompress.prune.sparse import thin_

    d, p = run.spec.distill, run.spec.prune
    hold_ = thin_(models, p.pattern, p.sparsity) if p.sparsity else lambda: None
    options = replace(d, steps=round(d.steps * share), minutes=d.minutes * share)
    with run.timed("distill"):
        choosing = run.pipeline.batch(run.data.load("val", min(run.spec.data.choosing, CHECKED)))
        say = lambda what, done: run.say("distill", what, done)
        given = (options, run.spec.seed, say, history, choosing, hold_)
        # of training in rounds the rounds before would have to be kept as well
        kept = Checkpoint(run.folder / STATE, EVERY) if p.schedule in AT_ONCE else None
        return _steps(distill_(run.pipeline, models, run.models, run.data, *given, kept, first, clock=run.clock))


def _forget_(models: dict[str, Any], seed: int) -> None:
    """Random weights in place of all that was learnt: matrices of unit gain, norms and scales of one, biases of zero.

    What no training changes (fixed positions of an audio encoder) stays.
    """
    import torch

    g = torch.Generator().manual_seed(seed)
    for p, name in ((p, n) for m in models.values() for n, p in m.named_parameters() if p.requires_grad):
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5
        else:
            last = name.rpartition(".")[2]
            p.data.fill_(1.0 if any(k in last for k in ("weight", "scale", "gamma", "lambda")) else 0.0)
    for m in models.values():
        for layer in m.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.reset_running_stats()


def _random_units(run: Run) -> dict[str, dict[str, Any]]:
    """A random mixture of cuts, dropped sub-layers among them: surgery must be right for any structure."""
    import torch

    from mmcompress.prune.masks import some

    g = torch.Generator().manual_seed(run.spec.seed + 17)
    out: dict[str, dict[str, Any]] = {}
    for n, m in run.models.items():
        out[n] = {}
        for b in m.blocks:
            share = float(torch.rand(1, generator=g))
            keep = b.least if share < 0.15 else max(b.step, int(share * b.units) // b.step * b.step)
            out[n][b.name] = some(b, keep, g)
    return out
