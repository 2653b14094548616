"""All that the search needs to know of the dense models, measured once a run on training pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mmcompress.data.base import Dataset
from mmcompress.graph.structure import Fp32Blocks
from mmcompress.kinds.base import Batch
from mmcompress.models.base import Model
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.importance.inputs import ImportanceInputs, Scores, score_units
from mmcompress.prune.refit import Grams, measure_grams
from mmcompress.quantize.simulation import simulate_precision
from mmcompress.registry import IMPORTANCE
from mmcompress.runtime.progress import StageProgress, prefix_progress, scale_progress
from mmcompress.search.sensitivity.curves import SensitivityCurve
from mmcompress.search.sensitivity.estimate import estimate_sensitivity
from mmcompress.search.sensitivity.measure import NO_LIMIT, measure_sensitivity
from mmcompress.search.sensitivity.measured_curves import CurveKeeper
from mmcompress.search.sensitivity.store import (
    Sensitivity,
    is_sensitivity_stored,
    read_sensitivity,
    write_sensitivity,
)
from mmcompress.spec.schema import Spec
from mmcompress.workspace.folder import RunFolder


def gather_sensitivity(
    spec: Spec,
    pipeline: TorchPipeline,
    *,
    models: Mapping[str, Model],
    data: Dataset,
    folder: RunFolder,
    progress: StageProgress,
    precisions: Mapping[str, Sequence[str]],
    max_token_shares: Mapping[str, float] = NO_LIMIT,
) -> Sensitivity:
    """Measure input moments, importance, curves and roundings, or read them from `folder`.

    Args:
        spec: Names the importance criterion and how many pairs each measurement takes.
        pipeline: Runs the models and scores their outputs.
        models: Dense models by node.
        data: Training pairs are drawn from it.
        folder: Where the result is kept; what is there is not measured again.
        progress: Called with what is measured and the share done.
        precisions: Precisions each node may have; every one but fp32 is measured.
        max_token_shares: See `measure_sensitivity`.

    Returns:
        The record, as it stands in `folder`.
    """
    if is_sensitivity_stored(folder):
        return read_sensitivity(models, folder)
    progress("input statistics", 0.0)
    calibration_batch = pipeline.collate(data.load("train", spec.data.calibration))
    grams = _measure_needed_grams(spec, pipeline, models=models, batch=calibration_batch)
    progress(spec.prune.importance, 0.1)
    inputs = ImportanceInputs(
        pipeline=pipeline, models=models, batch=calibration_batch, grams=grams, seed=spec.seed
    )
    scores = score_units(IMPORTANCE.get(spec.prune.importance), inputs)

    batch = calibration_batch[slice(0, spec.data.sensitivity_pairs)]
    references = pipeline.compute_reference_outputs(models, batch)
    dense_loss = pipeline.compute_loss(models, batch, dense=references)
    keeper = CurveKeeper(folder)
    if spec.prune.sensitivity == "measured":
        curves = _measure_curves(
            spec,
            pipeline,
            models=models,
            batch=batch,
            scores=scores,
            grams=grams,
            progress=progress,
            max_token_shares=max_token_shares,
            keeper=keeper,
        )
    else:
        curves = estimate_sensitivity(
            models, scores, pairs=len(calibration_batch), max_token_shares=max_token_shares
        )

    def measure_loss_increase() -> float:
        loss = pipeline.compute_loss(models, batch, dense=references)
        return max(loss - dense_loss, 0.0)

    fp32_blocks: Fp32Blocks = {}
    rounding: dict[str, dict[str, float]] = {}
    for node_name, model in models.items():
        fp32_blocks[node_name] = {}
        rounding[node_name] = dict.fromkeys(precisions[node_name], 0.0)
        for precision in precisions[node_name]:
            if precision == "fp32":
                continue
            sensitive_blocks: tuple[str, ...] = ()
            if spec.quantize.max_loss_increase:
                progress(f"sensitivity of {node_name} to {precision}", 1.0)
                sensitive_blocks = find_sensitive_blocks(
                    model,
                    precision,
                    measure_loss_increase=measure_loss_increase,
                    max_loss_increase=spec.quantize.max_loss_increase,
                )
                fp32_blocks[node_name][precision] = sensitive_blocks
            fp32_layers = model.list_linear_layers(sensitive_blocks)
            with simulate_precision(model, precision, fp32_layers=fp32_layers):
                rounding[node_name][precision] = measure_loss_increase()
    sensitivity = Sensitivity(
        scores=scores,
        grams=grams,
        curves=curves,
        rounding=rounding,
        base_loss=dense_loss,
        fp32_blocks=fp32_blocks,
    )
    write_sensitivity(sensitivity, folder)
    keeper.discard()
    return sensitivity


def find_sensitive_blocks(
    model: Model,
    precision: str,
    *,
    measure_loss_increase: Callable[[], float],
    max_loss_increase: float,
) -> tuple[str, ...]:
    """Find the blocks whose rounding alone raises the loss by more than a limit.

    Args:
        model: One model of the pipeline; it is rounded in place and restored.
        precision: Name of the precision.
        measure_loss_increase: Gives the pipeline's loss increase with the model as it is now.
        max_loss_increase: The limit, in units of the loss.
    """
    sensitive_blocks = []
    for block in model.weighted_blocks:
        layers = model.list_linear_layers((block.name,))
        with simulate_precision(model, precision, selected_layers=layers):
            if measure_loss_increase() > max_loss_increase:
                sensitive_blocks.append(block.name)
    return tuple(sensitive_blocks)


def _measure_needed_grams(
    spec: Spec, pipeline: TorchPipeline, *, models: Mapping[str, Model], batch: Batch
) -> dict[str, Grams]:
    """Measure input moments where a refit needs them."""
    curves_are_measured = spec.prune.sensitivity == "measured"
    trials_are_refitted = spec.search.evaluator == "measured" and spec.prune.refit
    # The moments of a large model take more memory than its weights.
    if curves_are_measured or trials_are_refitted:
        return measure_grams(pipeline, models, batch=batch)
    return {node_name: {} for node_name in models}


def _measure_curves(
    spec: Spec,
    pipeline: TorchPipeline,
    *,
    models: Mapping[str, Model],
    batch: Batch,
    scores: Scores,
    grams: dict[str, Grams],
    progress: StageProgress,
    max_token_shares: Mapping[str, float],
    keeper: CurveKeeper,
) -> dict[str, dict[str, SensitivityCurve]]:
    """Measure all curves and report them as the last four fifths of the work."""
    curve_progress = scale_progress(progress, start=0.2, end=1.0)
    return measure_sensitivity(
        pipeline,
        models,
        batch=batch,
        scores=scores,
        grams=grams,
        ridge=spec.prune.ridge,
        progress=prefix_progress(curve_progress, "sensitivity of "),
        max_token_shares=max_token_shares,
        keeper=keeper,
    )
