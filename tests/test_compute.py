"""Where torch computes: on another device, a run gives what it gives on the processor.

The other device is one of `accelerator.py`: its tensors mix with no others. Tests that need a real
GPU are skipped where there is none.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import golden_run
import pytest
import torch
from accelerator import use_accelerator
from families import FAMILIES

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import Training, TrainingInputs, TrainingOptions
from mmcompress.errors import SpecError
from mmcompress.export import family_contract as contract
from mmcompress.export.proofs import compute_outputs
from mmcompress.models import device as devices
from mmcompress.models.device import CPU, choose_device, copy_to_device, get_device
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.importance.inputs import ImportanceInputs, score_units
from mmcompress.prune.refit import measure_grams, refit_in_order_
from mmcompress.prune.surgery import copy_without_units
from mmcompress.prune.units import choose_units
from mmcompress.registry import IMPORTANCE
from mmcompress.search.sensitivity.measure import measure_sensitivity
from mmcompress.search.worker import prune_node
from mmcompress.spec.schema import Distill

ALL_CRITERIA = IMPORTANCE.list_names()
STEPS = Distill(steps=3, minutes=5, batch=4, validations=1)
FAST_FAMILIES = ("open_clip ViT", "own fusion encoder")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of Nvidia or AMD")


@pytest.fixture()
def accelerator():
    """Another device."""
    with use_accelerator() as device:
        yield device


@pytest.fixture()
def move(spec, models):
    """`move(device)`: (models, pipeline) on a device."""

    def move_models(device):
        moved = {name: copy_to_device(model, device) for name, model in models.items()}
        return moved, TorchPipeline(spec, moved)

    return move_models


def score(spec, models, pipeline, criterion):
    """Return the importance of every unit on 8 pairs."""
    batch = pipeline.collate(open_dataset(spec.data).load("train", 8))
    inputs = ImportanceInputs(
        pipeline=pipeline,
        models=models,
        batch=batch,
        grams=measure_grams(pipeline, models, batch=batch),
        seed=3,
    )
    return score_units(IMPORTANCE.get(criterion), inputs)


def list_weights(models):
    """Return all weights of some models on the processor."""
    weights = []
    for model in models.values():
        weights += [parameter.detach().to(CPU) for parameter in model.parameters()]
    return weights


@pytest.mark.parametrize("criterion", ALL_CRITERIA)
@pytest.mark.examples(1)
def test_every_criterion_scores_alike_and_gives_scores_to_the_processor(
    spec, move, accelerator, criterion
):
    here = score(spec, *move(CPU), criterion)
    there = score(spec, *move(accelerator), criterion)
    for node_name, node_scores in here.items():
        for block_name, block_scores in node_scores.items():
            found = there[node_name][block_name]
            assert found.device == CPU
            torch.testing.assert_close(found, block_scores, rtol=1e-4, atol=1e-7)


@pytest.mark.very_slow
def test_refit_and_sensitivity_are_the_same(spec, move, accelerator):
    curves = {}
    refitted_weights = {}
    for device in (CPU, accelerator):
        models, pipeline = move(device)
        batch = pipeline.collate(open_dataset(spec.data).load("train", 8))
        scores = score(spec, models, pipeline, "magnitude")
        grams = measure_grams(pipeline, models, batch=batch)
        curves[device] = measure_sensitivity(
            pipeline, models, batch=batch, scores=scores, grams=grams, ridge=0.01
        )
        pruned = {}
        for node_name, model in models.items():
            kept = {block.name: max(1, block.units // 2) for block in model.weighted_blocks}
            units = choose_units(kept, model.blocks, scores=scores[node_name])
            pruned[node_name] = copy_without_units(model, units)
        refit_in_order_(pipeline, pruned, dense=models, batch=batch, ridge=0.01)
        refitted_weights[device] = list_weights(pruned)
        assert {get_device(model) for model in pruned.values()} == {device}
    for node_name, node_curves in curves[CPU].items():
        for block_name, curve in node_curves.items():
            found = curves[accelerator][node_name][block_name]
            assert found.kept_units == curve.kept_units
            assert found.loss_increases == pytest.approx(curve.loss_increases, rel=1e-3, abs=1e-5)
    for one, other in zip(refitted_weights[CPU], refitted_weights[accelerator], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_moments_of_a_file_serve_on_any_device(spec, move, accelerator):
    models, pipeline = move(accelerator)
    batch = pipeline.collate(open_dataset(spec.data).load("train", 8))
    scores = score(spec, models, pipeline, "magnitude")
    grams = measure_grams(pipeline, models, batch=batch)
    stored = {name: gram.move(CPU) for name, gram in grams["vision"].items()}
    kept = {models["vision"].weighted_blocks[0].name: 2}
    one, other = (
        prune_node(models["vision"], kept, scores=scores["vision"], grams=moments, ridge=0.01)
        for moments in (grams["vision"], stored)
    )
    for left, right in zip(list_weights({"": one}), list_weights({"": other}), strict=True):
        assert torch.equal(left, right)


@pytest.mark.examples(1)
@pytest.mark.parametrize("stores_outputs", [False, True])
def test_training_learns_the_same(spec, move, accelerator, tmp_path, stores_outputs):
    losses = {}
    for device in (CPU, accelerator):
        models, pipeline = move(device)
        folder = tmp_path / device.type
        store = TeacherStore(folder=folder, max_bytes=10**9) if stores_outputs else None
        inputs = TrainingInputs(
            pipeline=pipeline,
            teacher=Teacher(pipeline, models, store=store),
            data=open_dataset(spec.data),
            validation=pipeline.collate(open_dataset(spec.data).load("val", 8)),
        )
        student = {name: copy.deepcopy(model) for name, model in models.items()}
        history = tmp_path / f"{device.type}.json"
        distill_models_(student, inputs, options=TrainingOptions(settings=STEPS, history=history))
        rows = json.loads(history.read_text())
        losses[device] = [row["loss"] for row in rows if "loss" in row]
        losses[device] += [row["validation_loss"] for row in rows if "validation_loss" in row]
        assert {get_device(model) for model in student.values()} == {device}
    assert losses[accelerator] == pytest.approx(losses[CPU], rel=1e-3)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in FAST_FAMILIES else pytest.mark.slow) for f in FAMILIES],
)
def test_every_family_has_its_loss_and_gradient_there(family, accelerator):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    inputs = contract.make_random_inputs(model, 2)
    kept = contract.sample_cuts(model)["mixture"]
    found = {}
    for device in (CPU, accelerator):
        student = copy_without_units(copy_to_device(model, device), kept)
        outputs = compute_outputs(student, [x.to(device) for x in inputs])
        loss = torch.stack([output.square().mean() for output in outputs]).sum()
        loss.backward()
        gradients = {}
        for name, parameter in student.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.device == device
                gradients[name] = parameter.grad.to(CPU)
        found[device] = (float(loss.detach()), gradients)
    assert found[accelerator][0] == pytest.approx(found[CPU][0], rel=1e-4)
    assert found[accelerator][1].keys() == found[CPU][1].keys()
    for name, gradient in found[CPU][1].items():
        torch.testing.assert_close(found[accelerator][1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.very_slow
@pytest.mark.parametrize("name", ["image", "speech"])
def test_a_whole_run_there_gives_what_it_gives_on_the_processor(
    name, tmp_path, accelerator, monkeypatch
):
    folder = golden_run.spec_folders(tmp_path)[name]
    here, weights = golden_run.run_pipeline(name, folder, tmp_path / "here")
    monkeypatch.setattr(devices, "choose_device", lambda name: accelerator)
    there, weights_there = golden_run.run_pipeline(name, folder, tmp_path / "there")
    assert list(golden_run.differences(here, there, tolerance=1e-3)) == []
    assert list(golden_run.weight_differences(weights, weights_there, tolerance=1e-3)) == []


def test_a_device_that_is_not_there_is_refused_by_name():
    with pytest.raises(SpecError, match=r"compute.device: torch finds no 'mps' .*finds: cpu"):
        choose_device("mps")
    assert choose_device("cpu") == CPU


class ScarceMemory:
    """A function whose memory runs out on batches above a size."""

    def __init__(self, work, largest):
        self.work = work
        self.largest = largest
        self.sizes = []

    def __call__(self, models, batch, **options):
        self.sizes.append(len(batch))
        if len(batch) > self.largest:
            raise torch.OutOfMemoryError("out of memory")
        return self.work(models, batch, **options)


def test_fewer_pairs_run_at_once_when_memory_runs_out_told_once(spec, move, monkeypatch):
    models, pipeline = move(CPU)
    pipeline.batch_size = 8
    batch = pipeline.collate(open_dataset(spec.data).load("train", 8))
    whole = pipeline.compute_loss(models, batch)
    told = []
    monkeypatch.setattr(pipeline, "tell_memory", told.append)
    monkeypatch.setattr(pipeline, "forward", ScarceMemory(pipeline.forward, 2))
    assert pipeline.compute_loss(models, batch) == pytest.approx(whole, rel=1e-5)
    assert pipeline.batch_size == 2 and len(told) == 1 and "fewer pairs run at once" in told[0]
    scored = score(spec, models, pipeline, "fisher")
    assert set(scored) == set(models)
    monkeypatch.setattr(pipeline, "forward", ScarceMemory(pipeline.forward, 0))
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.compute_loss(models, batch)


def test_a_step_takes_its_pairs_in_parts_when_memory_runs_out(spec, move, monkeypatch):
    models, pipeline = move(CPU)
    # Losses that compare pairs of a batch see fewer of them in a part.
    settings = replace(STEPS, batch=4, losses={"contrast": 0.0, "affinity": 0.0})
    told = []
    inputs = TrainingInputs(
        pipeline=pipeline, teacher=Teacher(pipeline, models), data=open_dataset(spec.data)
    )
    options = TrainingOptions(settings=settings, progress=lambda message, _: told.append(message))
    student = {name: copy.deepcopy(model) for name, model in models.items()}
    training = Training(student, inputs, options=options)
    batch = training.draw_batch(0)
    whole = training.compute_losses(batch)
    scarce = ScarceMemory(pipeline.forward, 2)
    monkeypatch.setattr(pipeline, "forward", scarce)
    for _ in range(2):
        found = training.advance_(training.make_optimizer(), batch, rate=0.0)
    assert training.parts_per_step == 2
    assert len(told) == 1 and "in 2 parts (distill.batch)" in told[0]
    assert max(scarce.sizes[2:]) == 2
    for name in ("embedding.vision", "embedding.text"):
        assert found[name] == pytest.approx(float(whole[name].detach()), rel=1e-4, abs=1e-9)


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("criterion", ALL_CRITERIA)
def test_scores_on_a_gpu_rank_as_those_on_the_processor(spec, move, criterion):
    from scipy.stats import spearmanr

    from mmcompress.models.device import forbid_tf32

    forbid_tf32()
    here = score(spec, *move(CPU), criterion)
    there = score(spec, *move(torch.device("cuda")), criterion)
    for node_name, node_scores in here.items():
        for block_name, block_scores in node_scores.items():
            found = there[node_name][block_name]
            assert spearmanr(found, block_scores).statistic >= 0.99
