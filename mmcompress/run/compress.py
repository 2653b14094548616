"""Stage: prune with proof, refit, distill, export, quantize."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.trainer import distill_
from mmcompress.export.proofs import prove_surgery, require_proofs
from mmcompress.export.weights import load_weights, save_weights
from mmcompress.graph.references import decode_steps_by_node, texts_per_request
from mmcompress.graph.structure import Candidate
from mmcompress.models.counts import count_params_and_macs
from mmcompress.models.sources import load_rewind_models, set_context_lengths
from mmcompress.prune.importance import ImportanceInputs, score_units
from mmcompress.prune.masks import sample_units
from mmcompress.prune.refit import measure_grams, refit_
from mmcompress.prune.schedule import all_units, narrow_models, plan_rounds
from mmcompress.prune.sparsity import zero_share, zero_weights_
from mmcompress.prune.surgery import copy_without_units, restore_units
from mmcompress.prune.units import choose_units
from mmcompress.registry import IMPORTANCE
from mmcompress.results.records import Proof
from mmcompress.run.fit import FittedStructure
from mmcompress.run.profile import Profile, prove_generators
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.sensitivity.store import Sensitivity, select_fp32_blocks
from mmcompress.search.short_finetune import MAX_VALIDATION_PAIRS, validation_loss
from mmcompress.storage import read_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

NodeCounts = dict[str, tuple[int, int, float]]
"""Parameters, multiply-accumulates a request, and share of zeros among the weights of the blocks, by node."""


SINGLE_TRAINING_SCHEDULES = ("one_shot", "late")
"""Schedules that train once."""


CHECKPOINT_SECONDS = 300.0
"""Seconds of training between two checkpoints."""


RESTART_BUDGET_SHARE, RESTART_MAX_LOSS_RATIO = 1 / 3, 1.2
"""The share of the training budget of what is made once more, out of what was made before; where it starts out with so
many times the loss that that one ended with, it is trained like a new one."""


def compress_pipeline(
    run: RunContext,
    ev: Sensitivity,
    fitted: FittedStructure,
    dense: Profile,
    scratch: bool = False,
    earlier: RunFolder | None = None,
) -> tuple[NodeCounts, list[Proof]]:
    """Prune with proof, refit, distill, write the bundle. Weights are kept: a resumed run does not train again.

    Gives the size of what was made, and the proofs of both sides; the models themselves are let go. `scratch`: the
    structure starts from random weights, as a control; `earlier`: from those of an artifact in that folder.
    """

    c = fitted.candidate
    models, survivors = _made(run, ev, c=c, scratch=scratch, earlier=earlier)
    with run.time_stage("prune"):
        batch = run.pipeline.collate(run.data.load("train", min(16, run.spec.data.batch), seed=3))
        known = run.pipeline.forward_in_pieces(run.models, batch)
        proofs = prove_surgery(run.pipeline, run.models, units=survivors, batch=batch, known=known)
        proofs += require_proofs(
            prove_surgery(
                run.pipeline, run.models, units=_random_units(run), batch=batch, known=known
            )
        )
        require_proofs(proofs)
    with run.time_stage("export"):
        run.on_progress("export", "ONNX, rounding, proofs", None)
        bundle, aside = run.folder.bundle, run.folder.scratch
        found = run.write_bundle(
            models,
            c.precision,
            kept=c.kept_units,
            folder=bundle,
            fp32_blocks=select_fp32_blocks(ev, c),
            fp32_folder=aside,
        )
        found += prove_generators(run, models, bundle=bundle, aside=aside)
        shutil.rmtree(aside, ignore_errors=True)
        proofs += require_proofs(found)
    steps, texts = decode_steps_by_node(run.spec, dense.calls), texts_per_request(run.spec)
    counts = {
        n: (*count_params_and_macs(m, steps[n], beams=texts[n]), zero_share(m))
        for n, m in models.items()
    }
    return counts, [*dense.proofs, *proofs]


def _made(
    run: RunContext, ev: Sensitivity, *, c: Candidate, scratch: bool, earlier: RunFolder | None
) -> tuple[dict[str, Any], Any]:
    """(trained models of a candidate, the units of the dense models that are left in them)."""
    from safetensors.torch import save_file

    weights = run.folder.weights
    if run.folder.units.exists():
        return _saved(run, ev, c=c, folder=run.folder)
    at_once = scratch or run.spec.prune.schedule in SINGLE_TRAINING_SCHEDULES
    if earlier and not (
        run.spec.prune.schedule == "one_shot" and earlier.training_history.exists()
    ):
        earlier = None
    models, survivors = (
        _at_once(run, ev, c=c, scratch=scratch, earlier=earlier)
        if at_once
        else _by_rounds(run, ev, c=c)
    )
    save_weights(models, weights)
    ahead = weights / "units.new"  # what says that all of it is there comes last, and at once
    save_file({f"{n}/{b}": u for n, by in survivors.items() for b, u in by.items()}, ahead)
    ahead.rename(run.folder.units)
    return models, survivors


def _saved(
    run: RunContext, ev: Sensitivity, *, c: Candidate, folder: RunFolder
) -> tuple[dict[str, Any], Any]:
    """The same, as it was kept in a folder."""
    from safetensors.torch import load_file

    models = build_pruned_models(run, ev, candidate=c, refit=False)
    for n, m in models.items():
        load_weights(m, folder.node_weights(n))
    flat = load_file(folder.units)
    return models, {
        n: {b.name: flat[f"{n}/{b.name}"] for b in m.blocks} for n, m in run.models.items()
    }


def _at_once(
    run: RunContext, ev: Sensitivity, *, c: Candidate, scratch: bool, earlier: RunFolder | None
) -> tuple[dict[str, Any], Any]:

    late = run.spec.prune.schedule == "late" and not scratch
    dense = _trained_first(run) if late else run.models
    with run.time_stage("prune"):
        run.on_progress("prune", "cutting and refitting", None)
        models, share = (
            build_pruned_models(
                run, ev, candidate=c, refit=run.spec.prune.refit and not scratch, dense=dense
            ),
            1.0,
        )
        if scratch:
            _forget_(models, run.spec.seed)
        if earlier:
            models, share = _better_start(run, ev, c=c, fresh=models, earlier=earlier)
        units = {
            n: choose_units(c.kept_units[n], m.blocks, scores=ev.scores[n])
            for n, m in run.models.items()
        }
        survivors = {n: {**by, **units[n]} for n, by in all_units(run.blocks).items()}
    if not late:
        _distill_(
            run,
            models,
            share=share,
            history=run.folder.training_history,
            first=count_trained_steps(earlier) if earlier else 0,
        )
    elif run.spec.prune.sparsity:
        zero_weights_(models, run.spec.prune.pattern, share=run.spec.prune.sparsity)
    return models, survivors


def _better_start(
    run: RunContext, ev: Sensitivity, *, c: Candidate, fresh: dict[str, Any], earlier: RunFolder
) -> tuple[dict[str, Any], float]:
    """Of fresh models and those with what the earlier artifact learnt (refitted or not) the ones of least loss, and the
    share of the training budget that they need."""

    inherited = _inherited(run, ev, earlier=earlier)
    learnt, mended = (
        build_pruned_models(run, ev, candidate=c, refit=False, dense=inherited) for _ in range(2)
    )
    batch = run.pipeline.collate(run.data.load("train", run.spec.data.calibration))
    refit_(run.pipeline, mended, dense=run.models, batch=batch, ridge=run.spec.prune.ridge)
    starts = [(fresh, 1.0), (learnt, RESTART_BUDGET_SHARE), (mended, RESTART_BUDGET_SHARE)]
    losses = [validation_loss(run, models) for models, _ in starts]
    best = starts[losses.index(min(losses))]
    rows = json.loads(earlier.training_history.read_text())
    if min(losses) > RESTART_MAX_LOSS_RATIO * min(
        (row["choosing"] for row in rows if "choosing" in row), default=math.inf
    ):
        best = (best[0], 1.0)
    if best[0] is not fresh:  # what the cut did is told of the first time
        shutil.copyfile(earlier.training_history, run.folder.round_history(0))
    return best


def _inherited(run: RunContext, ev: Sensitivity, *, earlier: RunFolder) -> dict[str, Any]:
    """The dense models with what an earlier artifact learnt: its weights in their places, the rest as it was."""

    small, survivors = _saved(
        run, ev, c=read_record(FittedStructure, earlier.fitted).candidate, folder=earlier
    )
    models = {n: restore_units(m, small[n], kept=survivors[n]) for n, m in run.models.items()}
    set_context_lengths(run.spec, models)
    return models


def _trained_first(run: RunContext) -> dict[str, Any]:
    """The dense models after the training that the pruned ones would have got."""
    import copy

    models = {n: copy.deepcopy(m) for n, m in run.models.items()}
    set_context_lengths(run.spec, models)
    _distill_(run, models, share=1.0, history=run.folder.training_history)
    return models


def _by_rounds(run: RunContext, ev: Sensitivity, *, c: Candidate) -> tuple[dict[str, Any], Any]:
    """Prune and train in turn, units scored anew in each round; to rewind, the survivors start again as they were."""

    p, rewind = run.spec.prune, run.spec.prune.schedule == "rewind"
    criterion, calibration = (
        IMPORTANCE.get(p.importance),
        run.data.load("train", run.spec.data.calibration),
    )
    batch, models, survivors, scores = (
        run.pipeline.collate(calibration),
        run.models,
        all_units(run.blocks),
        ev.scores,
    )
    share, done = 1 / (p.rounds + rewind), 0
    for i, kept in enumerate(plan_rounds(run.blocks, c.kept_units, rounds=p.rounds)):
        with run.time_stage("prune"):
            run.on_progress("prune", f"round {i + 1} of {p.rounds}", None)
            if i:
                grams = measure_grams(run.pipeline, models, batch=batch)
                scores = score_units(
                    criterion,
                    ImportanceInputs(
                        pipeline=run.pipeline,
                        models=models,
                        batch=batch,
                        grams=grams,
                        seed=run.spec.seed,
                    ),
                )
            models, survivors = narrow_models(models, survivors, kept=kept, scores=scores)
            set_context_lengths(run.spec, models)
            if p.refit:
                refit_(run.pipeline, models, dense=run.models, batch=batch, ridge=p.ridge)
        done += _distill_(
            run, models, share=share, history=run.folder.round_history(i + 1), first=done
        )
    if rewind:
        with run.time_stage("prune"):
            models = {
                n: copy_without_units(m, survivors[n]).eval()
                for n, m in load_rewind_models(run.spec, run.models).items()
            }
            set_context_lengths(run.spec, models)
            if p.refit:
                refit_(run.pipeline, models, dense=run.models, batch=batch, ridge=p.ridge)
        _distill_(run, models, share=share, history=run.folder.training_history, first=done)
    return models, survivors


def count_trained_steps(folder: RunFolder) -> int:
    """The steps of all training that left a record in a folder."""
    return sum(_steps(json.loads(p.read_text())) for p in folder.list_training_histories())


def _steps(curve: Sequence[Mapping[str, float]]) -> int:
    return max((int(row["step"]) for row in curve), default=0)


def _distill_(
    run: RunContext, models: dict[str, Any], *, share: float, history: Path, first: int = 0
) -> int:
    """Train for a share of the spec's budget, after single weights were set to zero where the spec asks for it.

    `first`: steps that were trained before, on other pairs. Returns how many these were.
    """

    d, p = run.spec.distill, run.spec.prune
    hold_ = zero_weights_(models, p.pattern, share=p.sparsity) if p.sparsity else lambda: None
    options = replace(d, steps=round(d.steps * share), minutes=d.minutes * share)
    with run.time_stage("distill"):
        choosing = run.pipeline.collate(
            run.data.load("val", min(run.spec.data.validation_pairs, MAX_VALIDATION_PAIRS))
        )
        say = lambda what, done: run.on_progress("distill", what, done)
        given = (options, run.spec.seed, say, history, choosing, hold_)
        # of training in rounds the rounds before would have to be kept as well
        kept = (
            Checkpoint(path=run.folder.training_checkpoint, interval_seconds=CHECKPOINT_SECONDS)
            if p.schedule in SINGLE_TRAINING_SCHEDULES
            else None
        )
        return _steps(
            distill_(
                run.pipeline, models, run.models, run.data, *given, kept, first, clock=run.clock
            )
        )


def _forget_(models: dict[str, Any], seed: int) -> None:
    """Random weights in place of all that was learnt: matrices of unit gain, norms and scales of one, biases of zero.

    What no training changes (fixed positions of an audio encoder) stays.
    """
    import torch

    g = torch.Generator().manual_seed(seed)
    for p, name in (
        (p, n) for m in models.values() for n, p in m.named_parameters() if p.requires_grad
    ):
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=g) * p[0].numel() ** -0.5
        else:
            last = name.rpartition(".")[2]
            p.data.fill_(
                1.0 if any(k in last for k in ("weight", "scale", "gamma", "lambda")) else 0.0
            )
    for m in models.values():
        for layer in m.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.reset_running_stats()


def _random_units(run: RunContext) -> dict[str, dict[str, Any]]:
    """A random mixture of cuts, dropped sub-layers among them: surgery must be right for any structure."""
    import torch

    g = torch.Generator().manual_seed(run.spec.seed + 17)
    out: dict[str, dict[str, Any]] = {}
    for n, m in run.models.items():
        out[n] = {}
        for b in m.blocks:
            share = float(torch.rand(1, generator=g))
            keep = (
                b.min_units
                if share < 0.15
                else max(b.granularity, int(share * b.units) // b.granularity * b.granularity)
            )
            out[n][b.name] = sample_units(b, keep, generator=g)
    return out
