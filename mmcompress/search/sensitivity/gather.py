"""Everything the search stands on, measured once per run on training pairs and kept in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from safetensors.torch import save_file

from mmcompress.data.base import Dataset
from mmcompress.models.base import Model
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.importance import ImportanceInputs, score_units
from mmcompress.prune.refit import measure_grams
from mmcompress.quantize.simulation import simulate_precision
from mmcompress.registry import IMPORTANCE
from mmcompress.search.sensitivity.estimate import estimate_sensitivity
from mmcompress.search.sensitivity.measure import NO_LIMIT, measure_sensitivity
from mmcompress.search.sensitivity.store import Fp32Blocks, Sensitivity, _read
from mmcompress.spec.schema import Spec
from mmcompress.storage import to_plain, write_record
from mmcompress.workspace.folder import RunFolder


def gather_sensitivity(
    spec: Spec,
    pipeline: TorchPipeline,
    *,
    models: Mapping[str, Model],
    data: Dataset,
    folder: RunFolder,
    progress: Callable[[str, float], None],
    precisions: Mapping[str, Sequence[str]] = MappingProxyType({}),
    shortest: Mapping[str, float] = NO_LIMIT,
) -> Sensitivity:
    """Input moments, importance, damage of every (block, level), damage of the `precisions` of each node.

    `shortest`: see `damage.measure`.
    """
    record, tensors = folder.sensitivity, folder.sensitivity_tensors
    if record.exists() and tensors.exists():
        return _read(models, record, tensors=tensors)
    progress("input statistics", 0.0)
    batch = pipeline.collate(data.load("train", spec.data.calibration))
    measured = spec.prune.sensitivity == "measured"
    trials_run = spec.search.evaluator == "measured" and spec.prune.refit
    # of a large model they are larger than its weights
    grams = (
        measure_grams(pipeline, models, batch=batch)
        if measured or trials_run
        else {n: {} for n in models}
    )
    progress(spec.prune.importance, 0.1)
    criterion = IMPORTANCE.get(spec.prune.importance)
    scores = score_units(
        criterion,
        ImportanceInputs(
            pipeline=pipeline, models=models, batch=batch, grams=grams, seed=spec.seed
        ),
    )
    some = batch[slice(0, spec.data.sensitivity_pairs)]
    anchors = pipeline.reference_outputs(models, some)
    base = pipeline.loss_of_models(models, some, dense=anchors)
    spared: Fp32Blocks = {n: {} for n in models}
    rounding = {n: dict.fromkeys(precisions.get(n, ("fp32", "int8")), 0.0) for n in models}
    if measured:
        say = lambda what, share: progress(f"damage of {what}", 0.2 + 0.8 * share)
        curves = measure_sensitivity(
            pipeline,
            models,
            batch=some,
            scores=scores,
            grams=grams,
            ridge=spec.prune.ridge,
            progress=say,
            shortest=shortest,
        )
    else:
        curves = estimate_sensitivity(models, scores, pairs=len(batch), shortest=shortest)
    loss = lambda: max(pipeline.loss_of_models(models, some, dense=anchors) - base, 0.0)
    for n, m in models.items():
        for p in (p for p in rounding[n] if p != "fp32"):
            if spec.quantize.max_loss_increase:
                progress(f"sensitivity of {n} to {p}", 1.0)
                spared[n][p] = find_sensitive_blocks(
                    m, p, loss=loss, bound=spec.quantize.max_loss_increase
                )
            with simulate_precision(m, p, spared=m.list_linear_layers(spared[n].get(p, ()))):
                rounding[n][p] = loss()
    flat = {f"score/{n}/{b}": s.contiguous() for n, by in scores.items() for b, s in by.items()}
    for n, by in grams.items():
        for b, g in by.items():
            flat |= {f"xx/{n}/{b}": g.xx, f"x/{n}/{b}": g.x, f"n/{n}/{b}": torch.tensor(g.n)}
    save_file(flat, tensors)
    write_record(
        record,
        {"curves": to_plain(curves), "rounding": rounding, "base_loss": base, "spared": spared},
    )
    return Sensitivity(
        scores=scores,
        grams=grams,
        curves=curves,
        rounding=rounding,
        base_loss=base,
        fp32_blocks=spared,
    )


def find_sensitive_blocks(
    model: Model, precision: str, *, loss: Callable[[], float], bound: float
) -> tuple[str, ...]:
    """The blocks whose rounding alone raises the loss by more than `bound`."""
    found = []
    for b in model.weighted_blocks:
        with simulate_precision(model, precision, only=model.list_linear_layers((b.name,))):
            if loss() > bound:
                found.append(b.name)
    return tuple(found)
