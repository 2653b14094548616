"""Prune and train in turn (`prune.schedule: gradual` and `rewind`)."""

from __future__ import annotations

from mmcompress.graph.structure import Candidate
from mmcompress.kinds.base import Batch
from mmcompress.models.base import Model
from mmcompress.models.sources import load_rewind_models, set_context_lengths
from mmcompress.prune.importance.inputs import ImportanceInputs, Scores, score_units
from mmcompress.prune.refit import measure_grams, refit_in_order_
from mmcompress.prune.schedule import Survivors, list_all_units, narrow_models, plan_rounds
from mmcompress.prune.surgery import copy_without_units
from mmcompress.registry import IMPORTANCE
from mmcompress.run.compress.trained import TrainedModels
from mmcompress.run.compress.training import train_pruned_models_
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.workspace.context import RunContext


def train_in_rounds(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate
) -> TrainedModels:
    """Prune and train in turn. Units are scored anew in each round.

    With the schedule `rewind`, the survivors start again from an earlier checkpoint after the last
    round and are trained once more (Renda et al. 2020).

    Args:
        run: The run; its spec names the schedule and the rounds.
        sensitivity: The importance scores of the first round.
        candidate: The structure to reach.

    Returns:
        The trained models, and the units that survived.
    """
    prune = run.spec.prune
    rewinds = prune.schedule == "rewind"
    budget_share = 1 / (prune.rounds + rewinds)
    batch = run.pipeline.collate(run.data.load("train", run.spec.data.calibration))
    models = run.models
    survivors = list_all_units(run.blocks)
    scores = sensitivity.scores
    steps = 0
    for i, kept in enumerate(plan_rounds(run.blocks, candidate.kept_units, rounds=prune.rounds)):
        with run.time_stage("prune"):
            run.on_progress("prune", f"round {i + 1} of {prune.rounds}", None)
            if i > 0:
                scores = _score_again(run, models, batch=batch)
            models, survivors = narrow_models(models, survivors, kept=kept, scores=scores)
            _adapt_pruned_models_(run, models, batch=batch)
        steps += train_pruned_models_(
            run,
            models,
            budget_share=budget_share,
            history=run.folder.round_history(i + 1),
            steps_before=steps,
        )
    if rewinds:
        with run.time_stage("prune"):
            models = _rewind_models(run, survivors)
            _adapt_pruned_models_(run, models, batch=batch)
        train_pruned_models_(
            run,
            models,
            budget_share=budget_share,
            history=run.folder.training_history,
            steps_before=steps,
        )
    return TrainedModels(models=models, survivors=survivors)


def _score_again(run: RunContext, models: dict[str, Model], *, batch: Batch) -> Scores:
    """Return the importance of the units that the models have now."""
    inputs = ImportanceInputs(
        pipeline=run.pipeline,
        models=models,
        batch=batch,
        grams=measure_grams(run.pipeline, models, batch=batch),
        seed=run.spec.seed,
    )
    return score_units(IMPORTANCE.get(run.spec.prune.importance), inputs)


def _rewind_models(run: RunContext, survivors: Survivors) -> dict[str, Model]:
    """Return the surviving units as they were at an earlier checkpoint."""
    models = {}
    for node_name, model in load_rewind_models(run.spec, run.models).items():
        # A checkpoint that was just loaded is on the processor.
        earlier = model.to(run.pipeline.device)
        models[node_name] = copy_without_units(earlier, survivors[node_name]).eval()
    return models


def _adapt_pruned_models_(run: RunContext, models: dict[str, Model], *, batch: Batch) -> None:
    """Tell generators their context lengths after a cut, and refit where the spec asks for it."""
    set_context_lengths(run.spec, models)
    if run.spec.prune.refit:
        refit_in_order_(
            run.pipeline, models, dense=run.models, batch=batch, ridge=run.spec.prune.ridge
        )
