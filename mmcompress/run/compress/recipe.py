"""Stage: prune with proof, refit, distill, export, quantize."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass

import torch

from mmcompress.export.proofs import label_proofs, prove_surgery, require_proofs
from mmcompress.graph.blocks import Block
from mmcompress.graph.references import count_decode_steps, count_texts_per_request
from mmcompress.graph.structure import Candidate
from mmcompress.models.base import Model
from mmcompress.models.counts import FP32_BYTES, count_params, count_params_and_macs
from mmcompress.models.device import CPU
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.masks import sample_units
from mmcompress.prune.schedule import Survivors
from mmcompress.prune.sparsity import measure_zero_share, zero_weights_
from mmcompress.results.records import Proof
from mmcompress.run.assemble import NodeSize
from mmcompress.run.compress.restart import (
    Start,
    continue_short_finetuning,
    find_best_start,
    reset_weights_,
    shorten_training,
)
from mmcompress.run.compress.rounds import train_in_rounds
from mmcompress.run.compress.trained import (
    TrainedModels,
    load_trained_models,
    save_trained_models,
    select_survivors,
)
from mmcompress.run.compress.training import (
    SINGLE_TRAINING_SCHEDULES,
    train_pruned_models_,
)
from mmcompress.run.compress.training_state import discard_training_state
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.profile import Profile, prove_generators
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.search.sensitivity.store import Sensitivity, select_fp32_blocks
from mmcompress.storage import hold_room
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

DENSE_ARTIFACT = "dense"
"""`Proof.artifact` of the pipeline before it is cut."""

COMPRESSED_ARTIFACT = "compressed"
"""`Proof.artifact` of what was made of it."""

RANDOM_ARTIFACT = "a random cut"
"""`Proof.artifact` of a structure that is drawn to prove the cutting itself."""

MAX_PROOF_PAIRS = 16
"""Training pairs at most that surgery is proved on."""

WEIGHTS_HEADER_BYTES = 1_000_000
"""Bytes of the names in the files of the weights, and of the units that are left."""

MINIMAL_CUT_SHARE = 0.15
"""Probability that a block of a random structure keeps as few units as it may, for many drop out
whole then."""


@dataclass(frozen=True, kw_only=True)
class CompressedPipeline:
    """What is known of a bundle that was just written. The models themselves are let go."""

    sizes: dict[str, NodeSize]
    """Parameters, operations and zeros, by node."""
    proofs: list[Proof]
    """Proofs of both sides."""


def compress_pipeline(
    run: RunContext,
    prepared: PreparedRun,
    *,
    fitted: FittedStructure,
    from_scratch: bool = False,
    earlier: RunFolder | None = None,
) -> CompressedPipeline:
    """Prune with proof, refit, distill and write the bundle.

    Trained weights are kept: a resumed run does not train again.

    Args:
        run: The run with one target.
        prepared: The profile and the sensitivity that the targets share.
        fitted: The structure to make.
        from_scratch: Start from random weights, as a control.
        earlier: The folder of an earlier artifact. What it learned is used where it helps.

    Raises:
        ProofFailed: A proof of the artifact fails.
    """
    candidate = fitted.candidate
    sensitivity = prepared.sensitivity
    planned_units = select_survivors(run, sensitivity, candidate=candidate)
    # Surgery does not depend on the weights: it is proved before anything is trained.
    proofs = _prove_structures(run, planned_units)
    trained = _make_models(
        run, sensitivity, fitted=fitted, from_scratch=from_scratch, earlier=earlier
    )
    if not _has_equal_survivors(planned_units, trained.survivors):
        # Rounds of pruning and training choose units anew.
        proofs = _prove_structures(run, trained.survivors)
    bundle_proofs = _write_proved_bundle(
        run, sensitivity, candidate=candidate, models=trained.models
    )
    proofs += label_proofs(bundle_proofs, COMPRESSED_ARTIFACT)
    return CompressedPipeline(
        sizes=_measure_sizes(run, prepared.dense, models=trained.models),
        proofs=[*label_proofs(prepared.dense.proofs, DENSE_ARTIFACT), *proofs],
    )


def _make_models(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    fitted: FittedStructure,
    from_scratch: bool,
    earlier: RunFolder | None,
) -> TrainedModels:
    """Return the trained models of a structure, from the run folder where they are there.

    The room of the weights is held from before the training until they are written. The state of
    the training stays until then. So a full disk costs no training.
    """
    folder = run.folder
    if folder.units.exists():
        # A run that was cut off between the two left the state.
        discard_training_state(run)
        return load_trained_models(run, sensitivity, candidate=fitted.candidate, folder=folder)
    params = sum(count_params(model) for model in run.models.values())
    with hold_room(folder.weights_room, params * FP32_BYTES + WEIGHTS_HEADER_BYTES):
        trained = _train_models(
            run, sensitivity, fitted=fitted, from_scratch=from_scratch, earlier=earlier
        )
    save_trained_models(trained, folder)
    discard_training_state(run)
    return trained


def _train_models(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    fitted: FittedStructure,
    from_scratch: bool,
    earlier: RunFolder | None,
) -> TrainedModels:
    """Make and train the models of a structure by the schedule of the spec."""
    candidate = fitted.candidate
    schedule = run.spec.prune.schedule
    if from_scratch:
        return _train_from_scratch(run, sensitivity, candidate=candidate)
    if schedule == "late":
        return _train_then_prune(run, sensitivity, candidate=candidate)
    if schedule in SINGLE_TRAINING_SCHEDULES:
        has_history = earlier is not None and earlier.training_history.exists()
        return _prune_then_train(
            run, sensitivity, fitted=fitted, earlier=earlier if has_history else None
        )
    return train_in_rounds(run, sensitivity, candidate=candidate)


def _prune_then_train(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    fitted: FittedStructure,
    earlier: RunFolder | None,
) -> TrainedModels:
    """Cut the dense models, then train, from weights that were trained before if they are better.

    These are an earlier artifact's, or those of the best short training.
    """
    candidate = fitted.candidate
    with run.time_stage("prune"):
        run.on_progress("prune", "cutting and refitting", None)
        models = build_pruned_models(
            run, sensitivity, candidate=candidate, refit=run.spec.prune.refit, dense=run.models
        )
        fresh_start = Start(models=models, budget_share=1.0, is_inherited=False)
        if earlier is None:
            finetuned_start = continue_short_finetuning(
                run, sensitivity, candidate=candidate, fresh=models
            )
            start = finetuned_start or fresh_start
        else:
            start = find_best_start(
                run, sensitivity, candidate=candidate, fresh=models, earlier=earlier
            )
            if fitted.is_trimmed and start.is_inherited:
                start = shorten_training(start, earlier)
        survivors = select_survivors(run, sensitivity, candidate=candidate)
    train_pruned_models_(
        run,
        start.models,
        budget_share=start.budget_share,
        history=run.folder.training_history,
        steps_before=start.steps_before,
        learning_rate=start.learning_rate,
        find_learning_rate=not start.tolerates_full_rate,
    )
    return TrainedModels(models=start.models, survivors=survivors)


def _train_from_scratch(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate
) -> TrainedModels:
    """Train the structure from random weights, as a control."""
    with run.time_stage("prune"):
        run.on_progress("prune", "cutting and refitting", None)
        models = build_pruned_models(
            run, sensitivity, candidate=candidate, refit=False, dense=run.models
        )
        reset_weights_(models, run.spec.seed)
        survivors = select_survivors(run, sensitivity, candidate=candidate)
    train_pruned_models_(run, models, budget_share=1.0, history=run.folder.training_history)
    return TrainedModels(models=models, survivors=survivors)


def _train_then_prune(
    run: RunContext, sensitivity: Sensitivity, *, candidate: Candidate
) -> TrainedModels:
    """Train the dense models as pruned ones would be, then cut them (`prune.schedule: late`)."""
    prune = run.spec.prune
    dense = {node_name: copy.deepcopy(model) for node_name, model in run.models.items()}
    set_context_lengths(run.spec, dense)
    train_pruned_models_(run, dense, budget_share=1.0, history=run.folder.training_history)
    with run.time_stage("prune"):
        run.on_progress("prune", "cutting and refitting", None)
        models = build_pruned_models(
            run, sensitivity, candidate=candidate, refit=prune.refit, dense=dense
        )
        survivors = select_survivors(run, sensitivity, candidate=candidate)
    if prune.sparsity:
        zero_weights_(models, prune.pattern, share=prune.sparsity)
    return TrainedModels(models=models, survivors=survivors)


def _has_equal_survivors(one: Survivors, other: Survivors) -> bool:
    """Return whether two structures have the same units of the dense models."""
    for node_name, units_by_block in one.items():
        for block_name, units in units_by_block.items():
            if not torch.equal(units, other[node_name][block_name]):
                return False
    return True


def _prove_structures(run: RunContext, survivors: Survivors) -> list[Proof]:
    """Prove that removing units equals masking them, for this structure and for a random one.

    Raises:
        ProofFailed: The two differ.
    """
    with run.time_stage("prune"):
        count = min(MAX_PROOF_PAIRS, run.spec.data.batch)
        batch = run.pipeline.collate(run.data.load("train", count, seed=3))
        dense_outputs = run.pipeline.forward_in_pieces(run.models, batch)
        proofs: list[Proof] = []
        cuts = {COMPRESSED_ARTIFACT: survivors, RANDOM_ARTIFACT: _draw_random_units(run)}
        for artifact, units in cuts.items():
            cut_proofs = prove_surgery(
                run.pipeline, run.models, units=units, batch=batch, dense_outputs=dense_outputs
            )
            proofs += label_proofs(cut_proofs, artifact)
        return require_proofs(proofs)


def _write_proved_bundle(
    run: RunContext,
    sensitivity: Sensitivity,
    *,
    candidate: Candidate,
    models: dict[str, Model],
) -> list[Proof]:
    """Write the bundle of trained models and prove it.

    Raises:
        ProofFailed: An export differs from its model, or generation from that of the library.
    """
    with run.time_stage("export"):
        run.on_progress("export", "ONNX, rounding, proofs", None)
        fp32_folder = run.folder.scratch
        # A run that was cut off, or whose proof failed, left the files of another structure.
        shutil.rmtree(fp32_folder, ignore_errors=True)
        proofs = run.write_bundle(
            models,
            candidate.precision,
            kept=candidate.kept_units,
            folder=run.folder.bundle,
            fp32_blocks=select_fp32_blocks(sensitivity, candidate),
            fp32_folder=fp32_folder,
        )
        proofs += prove_generators(
            run.pipeline,
            models,
            data=run.data,
            bundle=run.folder.bundle,
            fp32_folder=fp32_folder,
        )
        shutil.rmtree(fp32_folder, ignore_errors=True)
        return require_proofs(proofs)


def _measure_sizes(
    run: RunContext, dense: Profile, *, models: dict[str, Model]
) -> dict[str, NodeSize]:
    """Return parameters, operations and zeros of every model."""
    decode_steps = count_decode_steps(run.spec, dense.calls)
    texts = count_texts_per_request(run.spec)
    sizes = {}
    for node_name, model in models.items():
        params, macs = count_params_and_macs(model, decode_steps[node_name], beams=texts[node_name])
        sizes[node_name] = NodeSize(params=params, macs=macs, zero_share=measure_zero_share(model))
    return sizes


def _draw_random_units(run: RunContext) -> Survivors:
    """Return a random structure with dropped sub-layers: surgery must be right for any one."""
    generator = torch.Generator(CPU).manual_seed(run.spec.seed + 17)
    units: Survivors = {}
    for node_name, blocks in run.blocks.items():
        units[node_name] = {}
        for block in blocks:
            count = _draw_unit_count(block, generator)
            units[node_name][block.name] = sample_units(block, count, generator=generator)
    return units


def _draw_unit_count(block: Block, generator: torch.Generator) -> int:
    """Return how many units a block of a random structure keeps."""
    share = float(torch.rand(1, generator=generator, device=CPU))
    if share < MINIMAL_CUT_SHARE:
        return block.min_units
    whole_steps = int(share * block.units) // block.granularity
    return max(block.granularity, whole_steps * block.granularity)
