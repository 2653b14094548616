"""Distillation: losses vanish for the teacher itself, and training lowers them for a pruned student."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import math

import pytest
import torch

from mmcompress import storage
from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill import learning_rate, losses
from mmcompress.distill.best_weights import BestWeights
from mmcompress.distill.checkpoint import Checkpoint
from mmcompress.distill.learning_rate import RATE_TRIAL_STEPS, WARMUP_STEPS
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import Training, TrainingInputs, TrainingOptions, compute_losses
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.prune.sparsity import measure_zero_share, zero_weights_
from mmcompress.prune.surgery import copy_without_units
from mmcompress.spec.schema import Distill


@pytest.fixture()
def inputs(spec, pipeline, models):
    """What a student of the dense pipeline learns from."""
    return TrainingInputs(
        pipeline=pipeline, teacher=Teacher(pipeline, models), data=open_dataset(spec.data)
    )


def with_validation(inputs, batch):
    return dataclasses.replace(inputs, validation=batch)


def test_losses_vanish_when_student_is_teacher(pipeline, models, batch):
    out = pipeline.forward(models, batch)
    weights = {
        "embedding": 1.0,
        "tokens": 1.0,
        "affinity": 1.0,
        "logits": 1.0,
        "contrast": 0.0,
        "caption": 0.0,
    }
    parts = losses.weigh_losses(pipeline, out, teacher=out, batch=batch, weights=weights)
    assert {p.split(".")[0] for p in parts} == {
        "embedding",
        "tokens",
        "affinity",
        "logits",
        "contrast",
        "caption",
    }
    assert all(abs(v.item()) < 1e-5 for v in parts.values())


def test_affinity_is_a_divergence():
    g = torch.Generator().manual_seed(0)
    unit = lambda: torch.nn.functional.normalize(torch.randn(6, 8, generator=g), dim=-1)
    a, b = (unit(), unit()), (unit(), unit())
    assert (
        float(losses.compute_affinity_loss(a, b))
        > 0.1
        > abs(float(losses.compute_affinity_loss(a, a)))
    )


def test_logits_ignore_padding():
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    changed = s.clone()
    changed[~keep] += 100
    assert torch.equal(
        losses.compute_logit_loss(s, t, keep=keep), losses.compute_logit_loss(changed, t, keep=keep)
    )


def test_a_pruned_student_learns(inputs, pipeline, models, batch, tmp_path):
    student = {
        n: copy_without_units(m, {b.name: torch.arange(0, b.units, 2) for b in m.blocks})
        for n, m in models.items()
    }
    teacher = losses.drop_cut_positions(pipeline.forward_in_pieces(models, batch), student)

    def total():
        weights = {
            "embedding": 1.0,
            "tokens": 1.0,
            "affinity": 1.0,
            "logits": 1.0,
            "contrast": 0.2,
            "caption": 1.0,
        }
        with torch.no_grad():
            return float(
                sum(
                    losses.weigh_losses(
                        pipeline,
                        pipeline.forward(student, batch),
                        teacher=teacher,
                        batch=batch,
                        weights=weights,
                    ).values()
                )
            )

    before = total()
    settings = Distill(steps=25, minutes=2, batch=8, learning_rate=3e-3)
    curve = distill_models_(
        student,
        inputs,
        options=TrainingOptions(settings=settings, history=tmp_path / "d.json"),
    )
    assert total() < 0.9 * before
    assert (tmp_path / "d.json").exists() and curve[0]["step"] == 1
    assert not any(m.training for m in student.values())


def test_no_steps_is_no_training(inputs):
    assert distill_models_({}, inputs, options=TrainingOptions(settings=Distill(steps=0))) == []


@pytest.mark.parametrize("harm", [0.0, 3.0])
def test_training_that_does_harm_is_taken_back(inputs, pipeline, models, batch, harm):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    loss = lambda: pipeline.compute_loss(student, batch)
    before = loss()
    best = BestWeights(student, with_validation(inputs, batch), count=2)
    best.validate(0.0, 0)
    g = torch.Generator().manual_seed(0)
    for p in (p for m in student.values() for p in m.parameters()):
        p.data += harm * torch.randn(p.shape, generator=g)
    best.validate(0.6, 1)
    after = loss()
    assert [row["validation_loss"] for row in best.validations] == pytest.approx([before, after])
    assert (after > 1.05 * before) == bool(harm)
    best.restore_()
    assert loss() == pytest.approx(before, rel=1e-5)


def test_weights_that_are_hardly_worse_stay(inputs, models, batch):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    best = BestWeights(student, with_validation(inputs, batch), count=2)
    best.validate(0.0, 0)
    weight = next(student["text"].parameters())
    weight.data *= 1 + 1e-4
    changed = weight.detach().clone()
    best.validations.append(
        {"step": 1, "validation_loss": best.validations[0]["validation_loss"] * 1.04}
    )
    best.restore_()
    assert torch.equal(weight, changed)


@pytest.mark.parametrize("part", ["hidden", "cross"])
def test_what_blocks_add_to_their_streams_is_distilled(inputs, models, batch, part):
    """Nothing is lost by the teacher itself; what is left of a pruned student's blocks counts, those gone do not."""
    weights = {
        **dict.fromkeys(("embedding", "tokens", "affinity", "logits", "contrast", "caption"), 0.0)
    }
    weights |= {"hidden": 0.0, "cross": 0.0, part: 1.0}
    same = compute_losses(models, batch, inputs=inputs, loss_weights=weights)
    mine = {k: v.item() for k, v in same.items() if k.startswith(part)}
    assert set(mine) == (
        {"cross.captioner"} if part == "cross" else {f"hidden.{n}" for n in models}
    )
    assert all(v < 1e-10 for v in mine.values())
    cut = {n: {b.name: torch.arange(0, b.units, 2) for b in m.blocks} for n, m in models.items()}
    cut["captioner"]["0.ffn"] = torch.arange(0)
    student = {n: copy_without_units(m, cut[n]) for n, m in models.items()}
    parts = compute_losses(student, batch, inputs=inputs, loss_weights=weights)
    assert all(parts[k].item() > 1e-3 for k in mine)
    sum(parts[k] for k in mine).backward()
    block = student["captioner"].get_block("1.cross_attention" if part == "cross" else "1.ffn")
    assert student["captioner"].get_linear(block.reader).weight.grad.abs().sum() > 0


@pytest.mark.parametrize("much", [True, False])
@pytest.mark.slow
def test_the_rate_is_one_that_a_structure_can_bear(inputs, models, much):
    """What lost half of its units keeps the rate; what lost nothing gets a lower one, and starts where it was."""
    cut = {
        n: {b.name: torch.arange(0, b.units, 2) for b in m.blocks} if much else {}
        for n, m in models.items()
    }
    student = {n: copy_without_units(m, cut[n]) for n, m in models.items()}
    first = [p.detach().clone() for m in student.values() for p in m.parameters()]
    said = []
    settings = Distill(
        steps=160,
        minutes=5,
        batch=4,
        learning_rate=2e-3,
        validations=0,
        losses={"contrast": 0, "caption": 0},
    )
    options = TrainingOptions(
        settings=settings,
        progress=lambda message, share: said.append(message),
        hold_weights_=_Enough(said),
    )
    with contextlib.suppress(StopIteration):
        distill_models_(student, inputs, options=options)
    rate = float(said[0].removeprefix("the learning rate is "))
    lowest = 2e-3 / 2**learning_rate.MAX_RATE_HALVINGS
    assert rate == 2e-3 if much else lowest <= rate < 2e-3
    now = [p for m in student.values() for p in m.parameters()]
    moved = max((p - q).abs().max().item() for p, q in zip(now, first, strict=True))
    assert 0 < moved <= rate / learning_rate.WARMUP_STEPS * 1.1  # one step of the warm-up


class _Enough:
    """Ends a training with its first step after the rate was found."""

    def __init__(self, said):
        self.said = said

    def __call__(self):
        if self.said:
            raise StopIteration


@pytest.mark.slow
def test_products_in_bfloat16_teach_the_same(inputs, pipeline, models, batch, monkeypatch):
    """Weights stay fp32, and after some steps the loss is that of fp32 within what rounding does."""
    cut = {n: {b.name: torch.arange(0, b.units, 2) for b in m.blocks} for n, m in models.items()}
    found = {}
    for precision in ("fp32", "bf16"):
        student = {n: copy_without_units(m, cut[n]) for n, m in models.items()}
        before = pipeline.compute_loss(student, batch)
        settings = Distill(steps=20, minutes=5, batch=8, validations=0)
        compute = dataclasses.replace(pipeline.spec.compute, precision=precision)
        monkeypatch.setattr(pipeline, "spec", dataclasses.replace(pipeline.spec, compute=compute))
        distill_models_(student, inputs, options=TrainingOptions(settings=settings))
        assert all(p.dtype == torch.float32 for m in student.values() for p in m.parameters())
        found[precision] = pipeline.compute_loss(student, batch)
        assert found[precision] < before
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.1)


def test_training_ends_when_it_stops_helping(inputs, models, batch):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    settings = Distill(steps=40, minutes=2, batch=4, learning_rate=0.05, validations=20, patience=2)
    curve = distill_models_(
        student, with_validation(inputs, batch), options=TrainingOptions(settings=settings)
    )
    assert curve[-1]["step"] < 36


def test_another_training_goes_on_with_other_pairs(inputs, models):
    def draw(step, *, first_step=0, distinct_pairs=0):
        settings = Distill(batch=4, distinct_pairs=distinct_pairs)
        options = TrainingOptions(settings=settings, first_step=first_step)
        return Training(models, inputs, options=options).draw_batch(step).inputs["vision"]

    assert torch.equal(draw(0, first_step=7), draw(7))
    assert not torch.equal(draw(0, first_step=7), draw(0))
    # The same few pairs, in the mix of the step.
    assert torch.equal(draw(0, first_step=7, distinct_pairs=8), draw(7, distinct_pairs=8))


def test_weights_held_at_zero_stay_there(inputs, models):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    hold_ = zero_weights_(student, "2:4", share=0.5)
    options = TrainingOptions(settings=Distill(steps=3, batch=4), hold_weights_=hold_)
    distill_models_(student, inputs, options=options)
    assert measure_zero_share(student["text"]) >= 0.5


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(inputs, models, batch, tmp_path):
    made = lambda: {
        n: copy_without_units(m, {b.name: torch.arange(0, b.units, 2) for b in m.blocks})
        for n, m in models.items()
    }
    settings = Distill(steps=12, minutes=5, batch=4, learning_rate=3e-3, validations=3)

    def train(student, history, kept=None, progress=lambda *_: None):
        options = TrainingOptions(
            settings=settings, progress=progress, history=tmp_path / history, checkpoint=kept
        )
        distill_models_(student, with_validation(inputs, batch), options=options)

    class Killed(Exception):
        pass

    def killed(what, share):
        if what.startswith("step 6,"):
            raise Killed

    whole, first, second = made(), made(), made()
    train(whole, "whole.json")
    kept = Checkpoint(path=tmp_path / "state.safetensors", interval_seconds=0.0)
    with pytest.raises(Killed):
        train(first, "cut.json", kept, killed)
    assert (tmp_path / "state.safetensors").exists() and not (tmp_path / "cut.json").exists()
    train(second, "cut.json", Checkpoint(path=tmp_path / "state.safetensors", interval_seconds=0.0))
    for n in models:
        for a, b in zip(whole[n].parameters(), second[n].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    steps = lambda name: [row["step"] for row in json.loads((tmp_path / name).read_text())]
    assert steps("whole.json") == steps("cut.json")
    # It stays until the weights are on disk.
    assert (tmp_path / "state.safetensors").exists()


def test_a_disk_that_is_full_during_a_training_costs_no_step(
    inputs, models, batch, tmp_path, monkeypatch
):
    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_create_file", fail)
    messages = []
    options = TrainingOptions(
        settings=Distill(steps=6, minutes=5, batch=4, learning_rate=1e-3, validations=1),
        progress=lambda message, share: messages.append(message),
        history=tmp_path / "distill.json",
        checkpoint=Checkpoint(path=tmp_path / "state.safetensors", interval_seconds=0.0),
    )
    student = {n: copy.deepcopy(model) for n, model in models.items()}
    curve = distill_models_(student, with_validation(inputs, batch), options=options)
    assert curve[-1]["step"] == 6
    told = [message for message in messages if "No space left on device" in message]
    assert len(told) == 7 and "the training goes on" in told[0] and "losses" in told[-1]


def test_the_teacher_answers_pairs_that_come_again_from_memory(spec, pipeline, models, batch):
    asked, forward = [], pipeline.forward

    class CountingPipeline(TorchPipeline):
        def forward(self, models, batch, *options):
            asked.append(len(batch))
            return super().forward(models, batch, *options)

    pipeline = CountingPipeline(spec, models)
    named = dataclasses.replace(batch, names=tuple(f"{i}.png" for i in range(len(batch))))
    size = sum(v[0].nbytes for by in forward(models, batch).values() for v in by.values())
    teacher = Teacher(pipeline, models, cache_bytes=int(2.5 * size))
    teacher(named[slice(0, 1)])
    mixed, judged = (
        teacher(named[slice(0, 4)]),
        pipeline.find_target_positions(batch[slice(0, 4)], "captioner"),
    )
    again = teacher(named[slice(0, 4)])
    assert (
        asked[0] == 1 and asked[1] == 3 and 1 <= asked[2] <= 2 and len(asked) == 3
    )  # there is room for two or three
    want = forward(models, batch[slice(0, 4)])
    for found in (mixed, again):
        for n, by in want.items():
            for k, v in by.items():
                a, b = (x[judged] if k == "logits" else x for x in (found[n][k], v))
                assert torch.allclose(a, b, atol=1e-5), (n, k)
    teacher(batch)
    assert asked[-1] == len(batch)  # without names nothing is taken for known


class NoSteps(Training):
    """A training that takes no step."""

    def advance_(self, *steps, **options):
        raise AssertionError("a step was taken")


@pytest.mark.parametrize(
    ("steps", "loss_ratio", "finds", "rate"),
    [
        (160, None, True, 2e-3),
        (160, 1.4, True, 2.5e-4),
        (160, 1.6, True, 2e-3),
        (100, 1.4, True, 2.5e-4),
        (100, 1.4, False, 2e-3),
    ],
)
def test_where_steps_are_slow_or_few_what_lost_little_is_trained_gently(
    inputs, models, steps, loss_ratio, finds, rate
):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    settings = Distill(minutes=1, batch=4, learning_rate=2e-3, find_learning_rate=finds)
    training = NoSteps(student, inputs, options=TrainingOptions(settings=settings))
    chosen = learning_rate.choose_learning_rate(
        training, steps=steps, loss_ratio=loss_ratio, deadline=0.0
    )
    assert chosen == pytest.approx(rate)


def test_a_trial_of_a_rate_ends_when_it_is_known_to_do_harm(inputs, models):
    rates = []

    class HarmfulTraining(Training):
        """A training whose loss is ten times as high as before, at every rate above 5e-4."""

        def compute_losses(self, batch):
            return {"loss": torch.tensor(1.0)}

        def advance_(self, optimizer, batch, *, rate):
            rates.append(rate)
            return {"loss": 10.0 if rate > 5e-4 else 1.0}

    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    settings = Distill(steps=160, minutes=1, batch=4, learning_rate=2e-3, validations=0)
    training = HarmfulTraining(student, inputs, options=TrainingOptions(settings=settings))
    assert learning_rate.find_learning_rate(training, deadline=math.inf) == 5e-4
    # Two rates that do harm are left after the first step behind the warm-up.
    assert len(rates) == 2 * (WARMUP_STEPS + 1) + RATE_TRIAL_STEPS


def test_a_training_that_was_cut_off_after_its_last_step_just_ends(
    inputs, models, batch, tmp_path, monkeypatch
):
    """The checkpoint of the last step leaves nothing to train: only the weights are chosen."""
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    path = tmp_path / "state.safetensors"
    settings = Distill(steps=3, minutes=5, batch=4, validations=1)

    def train():
        options = TrainingOptions(
            settings=settings,
            history=tmp_path / "history.json",
            checkpoint=Checkpoint(path=path, interval_seconds=0.0),
        )
        return distill_models_(student, with_validation(inputs, batch), options=options)

    with monkeypatch.context() as patch:
        patch.setattr(BestWeights, "restore_", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            train()
    assert path.exists()
    curve = train()
    assert [row["step"] for row in curve] == [1]
    assert (tmp_path / "history.json").exists()


def _interrupt(*_):
    raise KeyboardInterrupt
