"""The cells of an ablation, each one change of the recipe, and the claims they decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mmcompress.experiments.baselines import BASELINES, Baseline
from mmcompress.experiments.claims import Claim
from mmcompress.experiments.make_cell import list_weights_without_teacher
from mmcompress.experiments.proposals import propose_with_placebo
from mmcompress.graph.losses import TEACHER_LOSSES, list_task_losses, resolve_loss_weights
from mmcompress.graph.references import find_unjoined_encoders
from mmcompress.registry import IMPORTANCE
from mmcompress.spec.schema import Spec

UNTRAINED = {"distill.steps": 0}
"""Changes of a cell whose claim is not about training."""

REFERENCE_CELL = "order-prune__refit__distil__int8"
"""Folder of the recipe as it is; most cells take their structure from it."""

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
"""Importance criteria that are compared, by their registry names."""

ALLOCATIONS_COMPARED = (
    "uniform",
    "ranking",
    "knapsack",
    "linearized",
    "searched",
    "random",
    "separate",
)
"""Methods that are compared without training, by their names in `BASELINES`."""

PLACEBO_DRAWS = 3
"""Random sets of blocks that are protected in place of the cross-modal ones."""

MIN_PROTECTION = 2.0
"""Factor on the loss increase of protected blocks; a smaller one would hardly show in a table."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of a table: a method, with a few keys of the spec changed."""

    table: str
    """Name of the table."""
    name: str
    """Name of the row."""
    method: Baseline
    """How the structure is chosen and trained."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the spec and their values in this cell."""
    structure_of: str = ""
    """Folder of the cell whose structure this one takes. Empty: it fits one of its own."""

    @property
    def folder(self) -> str:
        """Name of the folder of the cell."""
        name = f"{self.table}-{self.name}"
        return name.replace(" ", "_").replace("+", "").replace("/", "_")


def list_cells(spec: Spec) -> list[Cell]:
    """List every cell; those that others take their structure from come first.

    Args:
        spec: The spec of the reference. Cells that would not differ from it are left out.
    """
    reference = Cell(
        table="order", name="prune + refit + distil + int8", method=BASELINES["searched"]
    )
    return [
        reference,
        *_list_allocation_cells(),
        *_list_protection_cells(spec),
        *_list_importance_cells(spec),
        *_list_order_cells(spec),
        *_list_zeros_cells(),
        *_list_schedule_cells(),
        *_list_loss_cells(spec),
    ]


def make_placebo(draw: int) -> Baseline:
    """Make the knapsack that protects random unimodal blocks; `draw` numbers the choice."""
    return Baseline(
        about=f"as much latency protected, by lot (draw {draw})",
        open_proposals=partial(propose_with_placebo, draw=draw),
    )


def _list_allocation_cells() -> list[Cell]:
    """List ways to split the budget, none of them trained."""
    cells = []
    for name in ALLOCATIONS_COMPARED:
        structure_of = REFERENCE_CELL if name == "searched" else ""
        cells.append(
            Cell(
                table="allocation",
                name=name,
                method=BASELINES[name],
                changes=UNTRAINED,
                structure_of=structure_of,
            )
        )
    return cells


def _list_protection_cells(spec: Spec) -> list[Cell]:
    """List the knapsack with cross-modal, no or random blocks protected."""
    protection = max(MIN_PROTECTION, spec.prune.protection)
    protected = {**UNTRAINED, "prune.protection": protection}
    unprotected = {**UNTRAINED, "prune.protection": 1.0}
    knapsack = BASELINES["knapsack"]
    cells = [
        Cell(table="protection", name="protected", method=knapsack, changes=protected),
        Cell(table="protection", name="unprotected", method=knapsack, changes=unprotected),
    ]
    for draw in range(PLACEBO_DRAWS):
        cells.append(
            Cell(
                table="protection",
                name=f"placebo {draw}",
                method=make_placebo(draw),
                changes=protected,
            )
        )
    return cells


def _list_importance_cells(spec: Spec) -> list[Cell]:
    """List importance criteria on one uniform structure, with and without refit."""
    # A criterion that takes gradients has none where no loss sees an encoder.
    has_unjoined_encoder = bool(find_unjoined_encoders(spec))
    cells = []
    for criterion in CRITERIA:
        if has_unjoined_encoder and IMPORTANCE.get_fact(criterion, "takes_gradients"):
            continue
        importance = "" if criterion == spec.prune.importance else criterion
        method = replace(BASELINES["uniform"], importance=importance)
        for has_refit in (True, False):
            cells.append(
                Cell(
                    table="importance",
                    name=f"{criterion} + refit" if has_refit else criterion,
                    method=method,
                    changes={**UNTRAINED, "prune.refit": has_refit},
                    structure_of="allocation-uniform",
                )
            )
    return cells


def _list_order_cells(spec: Spec) -> list[Cell]:
    """List steps of the recipe left out or moved."""
    fp32 = {f"nodes.{node_name}.precision": "fp32" for node_name in spec.list_model_nodes()}
    no_refit = {"prune.refit": False}
    changes_by_name: dict[str, dict[str, Any]] = {
        "prune": {**UNTRAINED, **fp32, **no_refit},
        "prune + refit": {**UNTRAINED, **fp32},
        "prune + refit + distil": {**fp32},
        "prune + distil + int8": no_refit,
        "prune + refit + int8": {**UNTRAINED},
        "distil + prune + refit + int8": {"prune.schedule": "late"},
    }
    return [
        _change_reference("order", name, changes=changes)
        for name, changes in changes_by_name.items()
    ]


def _list_zeros_cells() -> list[Cell]:
    """List patterns of zeros in the weights that are kept."""
    cells = []
    for pattern in ("unstructured", "2:4"):
        changes = {**UNTRAINED, "prune.sparsity": 0.5, "prune.pattern": pattern}
        name = pattern.replace(":", " of ")
        cells.append(_change_reference("zeros", name, changes=changes))
    return cells


def _list_schedule_cells() -> list[Cell]:
    """List the other ways to reach one structure."""
    return [
        _change_reference("schedule", name, changes={"prune.schedule": name})
        for name in ("gradual", "rewind")
    ]


def _list_loss_cells(spec: Spec) -> list[Cell]:
    """List losses of training left out or added."""
    every_block = {"distill.losses.hidden": 1.0, "distill.losses.cross": 1.0}
    cells = [_change_reference("losses", "what blocks add too", changes=every_block)]
    losses_left_out = {
        "no task loss": tuple(list_task_losses(spec)),
        "no logits": ("logits",),
        "no features": ("embedding", "tokens"),
        "no affinity": ("affinity",),
        "task loss alone": tuple(TEACHER_LOSSES),
    }
    has_unjoined_encoder = bool(find_unjoined_encoders(spec))
    for name, left_out in losses_left_out.items():
        # Such an encoder has no task loss, so it learns nothing without a teacher.
        leaves_no_teacher = left_out == tuple(TEACHER_LOSSES)
        if leaves_no_teacher and has_unjoined_encoder:
            continue
        if not _has_other_training(spec, left_out):
            continue
        weights = dict.fromkeys(left_out, 0.0)
        if leaves_no_teacher:
            weights = list_weights_without_teacher(spec)
        changes = {f"distill.losses.{loss}": weight for loss, weight in weights.items()}
        cells.append(_change_reference("losses", name, changes=changes))
    return cells


def _has_other_training(spec: Spec, left_out: tuple[str, ...]) -> bool:
    """Return whether leaving losses out changes the training, and leaves one to learn from."""
    weights = resolve_loss_weights(spec.distill)
    used_losses = [loss for loss in (*TEACHER_LOSSES, *list_task_losses(spec)) if weights[loss]]
    is_changed = any(loss in left_out for loss in used_losses)
    is_taught = any(loss not in left_out for loss in used_losses)
    return is_changed and is_taught


def _change_reference(table: str, name: str, *, changes: Mapping[str, Any]) -> Cell:
    """Make a cell that differs from the reference in a few keys, on the same structure."""
    return Cell(
        table=table,
        name=name,
        method=BASELINES["searched"],
        changes=changes,
        structure_of=REFERENCE_CELL,
    )


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
        text="Loss increases measured among the other cuts make a better split",
        better=("allocation-linearized",),
        worse=("allocation-knapsack",),
    ),
    Claim(
        text="One joint budget beats a budget for each model, by the same sensitivity",
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
        worse=tuple(f"protection-placebo_{draw}" for draw in range(PLACEBO_DRAWS)),
    ),
    Claim(
        text="Reconstruction scores beat Fisher scores",
        better=("importance-reconstruction__refit",),
        worse=("importance-fisher__refit",),
    ),
    Claim(
        text="Reconstruction scores beat the norms of weights",
        better=("importance-reconstruction__refit",),
        worse=("importance-magnitude__refit",),
    ),
    Claim(
        text="Reconstruction scores beat chance",
        better=("importance-reconstruction__refit",),
        worse=("importance-random__refit",),
    ),
    Claim(
        text="Refit helps without training",
        better=("order-prune__refit",),
        worse=("order-prune",),
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
        text="Distillation helps quantized models as well",
        better=(REFERENCE_CELL,),
        worse=("order-prune__refit__int8",),
    ),
    Claim(
        text="Pruning before training beats training before pruning",
        better=(REFERENCE_CELL,),
        worse=("order-distil__prune__refit__int8",),
    ),
    Claim(
        text="The same structure keeps more in fp32 than quantized",
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
"""The claims of an ablation, in the order of the report."""
