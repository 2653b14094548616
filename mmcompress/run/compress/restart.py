"""Where a training starts: from freshly cut weights, an earlier artifact's, or random ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mmcompress.graph.structure import Candidate
from mmcompress.models.base import Model
from mmcompress.models.device import CPU
from mmcompress.run.compress.inherit_weights import inherit_weights
from mmcompress.run.compress.trained import (
    TrainedModels,
    load_finetuned_models,
    load_trained_models,
)
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.training_history import count_trained_steps
from mmcompress.search.sensitivity.store import Sensitivity
from mmcompress.search.short_finetune import (
    FINETUNE_BUDGET_SHARE,
    FinetunedStructures,
    ValidationLoss,
)
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

RESTART_BUDGET_SHARE = 1 / 3
"""Share of the training budget of an artifact that starts from the weights of an earlier one."""

TRIMMED_RATE_SHARE = 1 / 3
"""Learning rate of a trimmed structure / that of the artifact it was taken off. The structure is
nearly trained; the full rate would throw it far from where it is."""

RESTART_MAX_LOSS_RATIO = 1.2
"""Loss at the start / best loss of the earlier training. Above it the full training budget is
needed."""

EARLIER_ARTIFACT = "the earlier artifact"
"""Where weights come from, for a person."""

SHORT_TRAINING = "the short training"
"""Where weights come from, for a person."""

SCALE_NAMES = ("weight", "scale", "gamma", "lambda")
"""Parts of the names of vectors that multiply. A model without training has them at 1, other
vectors at 0."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a training starts from."""

    models: dict[str, Model]
    """The pruned models by node."""
    budget_share: float
    """The share of the training budget that they need."""
    is_inherited: bool
    """The models hold what an earlier artifact learned."""
    learning_rate: float | None = None
    """The highest learning rate; None: that of the spec, or a lower one where it does harm."""
    tolerates_full_rate: bool = False
    """The weights were trained at the full rate before. Then no lower one is looked for: what
    seems to do harm at first is where a longer training gains."""
    steps_before: int = 0
    """Steps that the weights were trained; their pairs are not drawn again."""


@dataclass(frozen=True, kw_only=True)
class StartChoice:
    """Which one of several starts is taken."""

    index: int
    """Its place among the candidates."""
    is_near_earlier: bool
    """Its loss is near the best one of the earlier training: a share of the budget is enough."""


def choose_start(losses: Sequence[float], *, earlier_best: float) -> StartChoice:
    """Choose the start with the least loss.

    Args:
        losses: The loss on validation pairs of every start.
        earlier_best: The best loss of the earlier artifact's training; infinite where it was
            not measured.
    """
    least_loss = min(losses)
    is_near_earlier = not least_loss > RESTART_MAX_LOSS_RATIO * earlier_best
    return StartChoice(index=losses.index(least_loss), is_near_earlier=is_near_earlier)


def find_best_start(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    candidate: Candidate,
    fresh: dict[str, Model],
    earlier: RunFolder,
) -> Start:
    """Return the start with the least loss: fresh models, or an earlier artifact's weights.

    Args:
        run: The run.
        sensitivity: The importance scores that units are chosen by.
        candidate: The structure to train.
        fresh: Its models as they were cut from the dense ones.
        earlier: The folder of an earlier artifact with a training history.
    """
    fitted = read_record(FittedStructure, earlier.fitted)
    trained = load_trained_models(run, sensitivity, candidate=fitted.candidate, folder=earlier)
    ranked = _rank_starts(
        run, sensitivity, candidate=candidate, fresh=fresh, trained=trained, source=EARLIER_ARTIFACT
    )
    rows = json.loads(earlier.training_history.read_text(encoding="utf-8"))
    earlier_losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    choice = choose_start(ranked.losses, earlier_best=min(earlier_losses, default=math.inf))
    is_inherited = choice.index > 0
    if is_inherited:
        # The loss right after the cut is in the first history; the report shows it.
        shutil.copyfile(earlier.training_history, run.folder.round_history(0))
    needs_less = is_inherited and choice.is_near_earlier
    return Start(
        models=ranked.models[choice.index],
        budget_share=RESTART_BUDGET_SHARE if needs_less else 1.0,
        is_inherited=is_inherited,
        steps_before=count_trained_steps(earlier),
    )


def continue_short_finetuning(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    candidate: Candidate,
    fresh: dict[str, Model],
) -> Start | None:
    """Return a start from the weights of the best short training, if they have the least loss.

    Its steps count: they are the first ones of the training.

    Args:
        run: The run; its folder keeps the short trainings.
        sensitivity: The importance scores that units are chosen by.
        candidate: The structure to train: the best one of them, fitted to the budget.
        fresh: Its models as they were cut from the dense ones.

    Returns:
        The start; None where there was no short training, or where it does not help.
    """
    folder = run.folder
    weight_files = [folder.short_finetuned.locate_node_weights(name) for name in run.models]
    has_weights = all(file.exists() for file in weight_files)
    if not folder.short_finetunings.exists() or not has_weights:
        return None
    best = read_record(FinetunedStructures, folder.short_finetunings).find_best()
    trained = load_finetuned_models(run, sensitivity, best=best)
    ranked = _rank_starts(
        run, sensitivity, candidate=candidate, fresh=fresh, trained=trained, source=SHORT_TRAINING
    )
    choice = choose_start(ranked.losses, earlier_best=best.loss)
    if choice.index == 0:
        return None
    # The loss right after the cut is in the first history; the report shows it.
    loss_after_cut = {
        "step": 0,
        "validation_loss": ranked.losses[0],
        "dense": ranked.dense_loss,
    }
    write_record(folder.round_history(0), [loss_after_cut, {"step": best.steps}])
    return Start(
        models=ranked.models[choice.index],
        budget_share=1 - FINETUNE_BUDGET_SHARE,
        is_inherited=True,
        tolerates_full_rate=True,
        steps_before=best.steps,
    )


@dataclass(frozen=True, kw_only=True)
class _RankedStarts:
    """Several starts of one training, with their losses."""

    models: tuple[dict[str, Model], ...]
    """Fresh models, those with trained weights, and these refitted to what was trained."""
    losses: tuple[float, ...]
    """The loss of each on validation pairs."""
    dense_loss: float
    """The loss of the dense pipeline on the same pairs."""


def _rank_starts(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    candidate: Candidate,
    fresh: dict[str, Model],
    trained: TrainedModels,
    source: str,
) -> _RankedStarts:
    """Measure the losses of fresh models, of trained weights, and of these refitted.

    Args:
        run: The run.
        sensitivity: The importance scores that units are chosen by.
        candidate: The structure to train.
        fresh: Its models as they were cut from the dense ones.
        trained: Trained models of another structure.
        source: Where these come from, for a person.
    """
    inherited = inherit_weights(run, sensitivity, candidate=candidate, trained=trained)
    candidates = [fresh, inherited.cut]
    sources = ["from the dense models", f"from {source}"]
    if inherited.refitted is not None:
        candidates.append(inherited.refitted)
        sources.append("from it and refitted")
    validation_loss = ValidationLoss(run)
    losses = [validation_loss.measure(models) for models in candidates]
    parts = [f"{loss:.3f} {origin}" for loss, origin in zip(losses, sources, strict=True)]
    run.on_progress("prune", f"loss before training: {', '.join(parts)}", None)
    return _RankedStarts(
        models=tuple(candidates),
        losses=tuple(losses),
        dense_loss=validation_loss.measure(run.models),
    )


def shorten_training(start: Start, earlier: RunFolder) -> Start:
    """Return a start that is trained for less time and at a lower rate than the earlier artifact.

    Args:
        start: A start with the weights of the earlier artifact, less a few units.
        earlier: The folder of that artifact.
    """
    rows = json.loads(earlier.training_history.read_text(encoding="utf-8"))
    rates = [row["rate"] for row in rows if "rate" in row]
    return replace(
        start,
        budget_share=RESTART_BUDGET_SHARE,
        learning_rate=TRIMMED_RATE_SHARE * rates[0] if rates else None,
    )


def reset_weights_(models: dict[str, Model], seed: int) -> None:
    """Put random weights in place of everything that was learned, as a control.

    Matrices get unit gain, scales become 1 and biases 0. What no training changes stays, such as
    the fixed positions of an audio encoder.
    """
    generator = torch.Generator(CPU).manual_seed(seed)
    for model in models.values():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = _draw_initial_values(name, parameter, generator=generator)
    for model in models.values():
        for layer in model.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.reset_running_stats()


def _draw_initial_values(
    name: str, parameter: nn.Parameter, *, generator: torch.Generator
) -> torch.Tensor:
    """Return initial values in the shape of a parameter."""
    if parameter.ndim > 1:
        inputs = parameter[0].numel()
        values = torch.randn(parameter.shape, generator=generator, device=CPU)
        return values.to(parameter.device) * float(inputs**-0.5)
    last_name = name.rpartition(".")[2]
    is_scale = any(part in last_name for part in SCALE_NAMES)
    return torch.full_like(parameter.data, 1.0 if is_scale else 0.0)
