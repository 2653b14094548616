"""Outputs of the teacher on disk: a draw that comes again is not asked for again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill.compact_outputs import (
    LARGEST_HALF,
    LIKELIEST_TOKENS,
    compact_outputs,
    expand_outputs,
)
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.spec.schema import Distill

SETTINGS = Distill(steps=4, minutes=5, batch=4, validations=0)


class CountingPipeline:
    """A pipeline that counts how often the teacher runs."""

    def __init__(self, pipeline, models):
        self._pipeline = pipeline
        self._models = models
        self.teacher_runs = 0

    def forward(self, models, batch):
        self.teacher_runs += models is self._models
        return self._pipeline.forward(models, batch)

    def __getattr__(self, name):
        return getattr(self._pipeline, name)


@pytest.fixture()
def train(spec, pipeline, models, tmp_path):
    """`train(max_bytes)`: train a copy of the models; returns its losses and the teacher's runs."""

    def train_copy(max_bytes=10**9, *, settings=SETTINGS):
        store = TeacherStore(folder=tmp_path / "store", max_bytes=max_bytes)
        counting = CountingPipeline(pipeline, models)
        inputs = TrainingInputs(
            pipeline=counting,
            teacher=Teacher(counting, models, store=store),
            data=open_dataset(spec.data),
        )
        student = {name: copy.deepcopy(model) for name, model in models.items()}
        with torch.no_grad():
            for model in student.values():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
        options = TrainingOptions(settings=settings)
        curve = distill_models_(student, inputs, options=options)
        return [row["loss"] for row in curve], counting.teacher_runs

    return train_copy


def test_a_second_training_asks_the_teacher_nothing_and_ends_the_same(train):
    losses, runs = train()
    assert runs == SETTINGS.steps
    again, runs_again = train()
    assert runs_again == 0 and again == losses
    longer = replace(SETTINGS, steps=6)
    assert train(settings=longer)[1] == 2  # only what was not drawn before


def test_rounding_to_half_precision_changes_little(train, tmp_path):
    rounded, _ = train()
    exact, runs = train(0, settings=replace(SETTINGS, store_gb=0.0))
    assert runs == 0  # what is there is read, but nothing is added
    for file in (tmp_path / "store").iterdir():
        file.unlink()
    exact, runs = train(0)
    assert runs == SETTINGS.steps and not list((tmp_path / "store").iterdir())
    assert rounded == pytest.approx(exact, rel=1e-3)


def test_the_store_is_no_larger_than_it_may_be(train, tmp_path):
    train()
    files = list((tmp_path / "store").iterdir())
    size = files[0].stat().st_size
    for file in files:
        file.unlink()
    _, runs = train(int(2.5 * size))
    assert runs == SETTINGS.steps and len(list((tmp_path / "store").iterdir())) == 2
    assert train(int(2.5 * size))[1] == SETTINGS.steps - 2


def test_a_damaged_file_is_made_again(train, tmp_path):
    losses, _ = train()
    file = sorted((tmp_path / "store").iterdir())[0]
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    again, runs = train()
    assert runs == 1 and again == losses
    assert file.read_bytes() == content


def test_values_beyond_half_precision_are_kept_whole(tmp_path):
    store = TeacherStore(folder=tmp_path, max_bytes=10**6)
    large = torch.tensor([[2 * LARGEST_HALF, 1.0]])
    ids = torch.tensor([[3, 70_000]])
    store.write("1-2", compact_outputs({"vision": {"tokens": large}, "writer": {"ids": ids}}))
    outputs = expand_outputs(store.read("1-2"))
    assert torch.equal(outputs["vision"]["tokens"], large)
    assert torch.equal(outputs["writer"]["ids"], ids)
    assert store.read("2-2") is None


def test_of_a_large_vocabulary_the_likeliest_tokens_are_kept():
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(5, 50_000, generator=generator)
    tensors = compact_outputs({"writer": {"logits": logits}})
    kept_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert kept_bytes < logits.nbytes / 400
    expanded = expand_outputs(tensors)["writer"]["logits"]
    assert expanded.shape == logits.shape
    probabilities = logits.softmax(-1)
    kept = expanded.softmax(-1)
    assert torch.allclose(kept.sum(-1), torch.ones(5), atol=1e-3)
    likely = probabilities.topk(LIKELIEST_TOKENS, dim=-1)
    assert torch.allclose(kept.gather(-1, likely.indices), likely.values, rtol=5e-3)
    # The mass of the others is kept too, spread evenly.
    mass = 1 - likely.values.sum(-1)
    kept_mass = 1 - kept.gather(-1, likely.indices).sum(-1)
    assert torch.allclose(kept_mass, mass, rtol=2e-2, atol=1e-3)
    small = compact_outputs({"writer": {"logits": logits[:, :4096]}})
    assert list(small) == ["writer/logits"]


@pytest.mark.parametrize("max_bytes", [10**9, 0])
def test_named_pairs_are_kept_from_training_to_training(
    pipeline, models, batch, tmp_path, max_bytes
):
    names = [f"folder/clip {i}.wav" for i in range(len(batch))]
    named = replace(batch, names=tuple(names), draw="")
    counting = CountingPipeline(pipeline, models)

    def ask():
        store = TeacherStore(folder=tmp_path / "store", max_bytes=max_bytes)
        return Teacher(counting, models, store=store)(named)

    first = ask()
    assert counting.teacher_runs == 1
    again = ask()
    assert counting.teacher_runs == (1 if max_bytes else 2)
    exact = pipeline.forward(models, named)
    for node_name, outputs in first.items():
        for output_name, tensor in outputs.items():
            assert torch.equal(again[node_name][output_name], tensor)
            if output_name != "logits":
                assert torch.allclose(tensor, exact[node_name][output_name], rtol=2e-3, atol=2e-3)
