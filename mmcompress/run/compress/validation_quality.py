"""What the metrics that people know say on validation pairs, before a training and after it.

A loss tells nobody whether a structure still finds and writes what it should. Here texts are given
token by token, so these figures lie above those of free writing on the test split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmcompress.kinds.base import Batch
from mmcompress.models.base import Model
from mmcompress.results.records import ValidationFigure, ValidationQuality
from mmcompress.storage import write_record
from mmcompress.workspace.context import RunContext

NOTABLE_QUALITY_SHARE = 0.9
"""Figure after training / dense figure, below which the run says at once what was lost."""


def begin_validation_quality(
    run: RunContext, models: Mapping[str, Model], *, validation: Batch
) -> tuple[ValidationFigure, ...]:
    """Measure the dense and the untrained models on validation pairs, tell and record it."""
    dense = _compute_figures(run, run.models, validation=validation)
    before = _compute_figures(run, models, validation=validation)
    figures = tuple(
        ValidationFigure(name=name, dense=dense[name], before=before[name]) for name in before
    )
    parts = [f"{f.name} {f.before:.0%} (dense {f.dense:.0%})" for f in figures]
    _tell(run, f"before training, on {len(validation)} validation pairs: {', '.join(parts)}")
    write_record(run.folder.validation_quality, ValidationQuality(figures=figures))
    return figures


def end_validation_quality(
    run: RunContext,
    models: Mapping[str, Model],
    *,
    validation: Batch,
    begun: tuple[ValidationFigure, ...],
) -> None:
    """Measure the trained models on the same pairs, tell and record it."""
    after = _compute_figures(run, models, validation=validation)
    figures = tuple(replace(figure, after=after[figure.name]) for figure in begun)
    parts = [f"{f.name} {after[f.name]:.0%} (dense {f.dense:.0%})" for f in figures]
    _tell(run, f"after training, on {len(validation)} validation pairs: {', '.join(parts)}")
    lost = [f.name for f in figures if after[f.name] < NOTABLE_QUALITY_SHARE * f.dense]
    if lost:
        _tell(
            run,
            f"less than {NOTABLE_QUALITY_SHARE:.0%} of the dense {', '.join(lost)} is left: "
            "a slower target or more steps keep more",
        )
    write_record(run.folder.validation_quality, ValidationQuality(figures=figures))


def _compute_figures(
    run: RunContext, models: Mapping[str, Model], *, validation: Batch
) -> dict[str, float]:
    """Return every figure of quality on the pairs, higher is better."""
    outputs = run.pipeline.forward_in_pieces(dict(models), validation)
    return run.pipeline.compute_quality(outputs, validation)


def _tell(run: RunContext, message: str) -> None:
    """Tell a message of the training."""
    run.on_progress("distill", message, None)
