"""Distillation: losses vanish for the teacher itself, and training lowers them for a pruned student."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill import losses, trainer
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.trainer import distill_
from mmcompress.prune.surgery import copy_without_units
from mmcompress.runtime.timing import SystemClock
from mmcompress.spec.schema import Distill


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
    parts = losses.weighted_losses(pipeline, out, teacher=out, batch=batch, weights=weights)
    assert {p.split(".")[0] for p in parts} == {
        "embedding",
        "tokens",
        "affinity",
        "logits",
        "contrast",
        "caption",
    }
    assert all(abs(float(v)) < 1e-5 for v in parts.values())


def test_affinity_is_a_divergence():
    g = torch.Generator().manual_seed(0)
    unit = lambda: torch.nn.functional.normalize(torch.randn(6, 8, generator=g), dim=-1)
    a, b = (unit(), unit()), (unit(), unit())
    assert float(losses.affinity_loss(a, b)) > 0.1 > abs(float(losses.affinity_loss(a, a)))


def test_logits_ignore_padding():
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    changed = s.clone()
    changed[~keep] += 100
    assert torch.equal(losses.logit_loss(s, t, keep=keep), losses.logit_loss(changed, t, keep=keep))


def test_a_pruned_student_learns(spec, pipeline, models, batch, tmp_path):
    student = {
        n: copy_without_units(m, {b.name: torch.arange(0, b.units, 2) for b in m.blocks})
        for n, m in models.items()
    }
    teacher = losses.drop_cut_positions(pipeline.run(models, batch), student)

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
                    losses.weighted_losses(
                        pipeline,
                        pipeline.forward(student, batch),
                        teacher=teacher,
                        batch=batch,
                        weights=weights,
                    ).values()
                )
            )

    before = total()
    curve = distill_(
        pipeline,
        student,
        models,
        open_dataset(spec.data),
        Distill(steps=25, minutes=2, batch=8, learning_rate=3e-3),
        0,
        history=tmp_path / "d.json",
    )
    assert total() < 0.9 * before
    assert (tmp_path / "d.json").exists() and curve[0]["step"] == 1
    assert not any(m.training for m in student.values())


def test_no_steps_is_no_training(spec, pipeline, models):
    assert distill_(pipeline, {}, models, None, Distill(steps=0), 0) == []


@pytest.mark.parametrize("harm", [0.0, 3.0])
def test_training_that_does_harm_is_taken_back(pipeline, models, batch, harm):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    loss = lambda: pipeline.loss_of_models(student, batch)
    before, best = (
        loss(),
        trainer._Best(pipeline, student, teacher=models, choosing=batch, checks=2),
    )
    best.look(0.0, 0)
    g = torch.Generator().manual_seed(0)
    for p in (p for m in student.values() for p in m.parameters()):
        p.data += harm * torch.randn(p.shape, generator=g)
    best.look(0.6, 1)
    after = loss()
    assert [s["choosing"] for s in best.seen] == pytest.approx([before, after]) and (
        after > 1.05 * before
    ) == bool(harm)
    best.restore_()
    assert loss() == pytest.approx(before, rel=1e-5)


def test_weights_that_are_hardly_worse_stay(pipeline, models, batch):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    best = trainer._Best(pipeline, student, teacher=models, choosing=batch, checks=2)
    best.look(0.0, 0)
    weight = next(student["text"].parameters())
    weight.data *= 1 + 1e-4
    changed = weight.detach().clone()
    best.seen.append({"step": 1, "choosing": best.seen[0]["choosing"] * 1.04})
    best.restore_()
    assert torch.equal(weight, changed)


@pytest.mark.parametrize("part", ["hidden", "cross"])
def test_what_blocks_add_to_their_streams_is_distilled(pipeline, models, batch, part):
    """Nothing is lost by the teacher itself; what is left of a pruned student's blocks counts, those gone do not."""
    weights = {
        **dict.fromkeys(("embedding", "tokens", "affinity", "logits", "contrast", "caption"), 0.0)
    }
    weights |= {"hidden": 0.0, "cross": 0.0, part: 1.0}
    teacher = Teacher(pipeline, models)
    same = trainer._losses(pipeline, models, teacher=teacher, batch=batch, weights=weights)
    mine = {k: float(v) for k, v in same.items() if k.startswith(part)}
    assert set(mine) == (
        {"cross.captioner"} if part == "cross" else {f"hidden.{n}" for n in models}
    )
    assert all(v < 1e-10 for v in mine.values())
    cut = {n: {b.name: torch.arange(0, b.units, 2) for b in m.blocks} for n, m in models.items()}
    cut["captioner"]["0.ffn"] = torch.arange(0)
    student = {n: copy_without_units(m, cut[n]) for n, m in models.items()}
    parts = trainer._losses(pipeline, student, teacher=teacher, batch=batch, weights=weights)
    assert all(float(parts[k]) > 1e-3 for k in mine)
    sum(parts[k] for k in mine).backward()
    block = student["captioner"].get_block("1.cross_attention" if part == "cross" else "1.ffn")
    assert student["captioner"].get_linear(block.reader).weight.grad.abs().sum() > 0


@pytest.mark.parametrize("much", [True, False])
def test_the_rate_is_one_that_a_structure_can_bear(spec, pipeline, models, much):
    """What lost half of its units keeps the rate; what lost nothing gets a lower one, and starts where it was."""
    cut = {
        n: {b.name: torch.arange(0, b.units, 2) for b in m.blocks} if much else {}
        for n, m in models.items()
    }
    student = {n: copy_without_units(m, cut[n]) for n, m in models.items()}
    first = [p.detach().clone() for m in student.values() for p in m.parameters()]
    said = []
    options = Distill(
        steps=160, minutes=5, batch=4, learning_rate=2e-3, validations=0, contrast=0, caption=0
    )
    tell = lambda what, done: said.append(what)
    with contextlib.suppress(StopIteration):
        distill_(
            pipeline,
            student,
            models,
            open_dataset(spec.data),
            options,
            0,
            tell,
            hold_=_Enough(said),
        )
    rate = float(said[0].removeprefix("rate "))
    assert rate == 2e-3 if much else 2e-3 / 2**trainer.MAX_RATE_HALVINGS <= rate < 2e-3
    now = [p for m in student.values() for p in m.parameters()]
    moved = max(float((p - q).abs().max()) for p, q in zip(now, first, strict=True))
    assert 0 < moved <= rate / trainer.WARMUP_STEPS * 1.1  # one step of the warm-up


class _Enough:
    """Ends a training with its first step after the rate was found."""

    def __init__(self, said):
        self.said = said

    def __call__(self):
        if self.said:
            raise StopIteration


def test_products_in_bfloat16_teach_the_same(spec, pipeline, models, batch):
    """Weights stay fp32, and after some steps the loss is that of fp32 within what rounding does."""
    cut = {n: {b.name: torch.arange(0, b.units, 2) for b in m.blocks} for n, m in models.items()}
    found = {}
    for precision in ("fp32", "bf16"):
        student = {n: copy_without_units(m, cut[n]) for n, m in models.items()}
        before = pipeline.loss_of_models(student, batch)
        options = Distill(steps=20, minutes=5, batch=8, validations=0, precision=precision)
        distill_(pipeline, student, models, open_dataset(spec.data), options, 0)
        assert all(p.dtype == torch.float32 for m in student.values() for p in m.parameters())
        found[precision] = pipeline.loss_of_models(student, batch)
        assert found[precision] < before
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.1)


def test_training_ends_when_it_stops_helping(spec, pipeline, models, batch):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    options = Distill(steps=40, minutes=2, batch=4, learning_rate=0.05, validations=20, patience=2)
    curve = distill_(pipeline, student, models, open_dataset(spec.data), options, 0, choosing=batch)
    assert curve[-1]["step"] < 36


def test_another_training_goes_on_with_other_pairs(spec, pipeline, models):
    data, options = open_dataset(spec.data), Distill(batch=4)
    drawn = lambda step, first=0, o=options: trainer._Training(
        pipeline, models, teacher=Teacher(pipeline, models), data=data, options=o, seed=0, hold_=lambda: None, first=first, clock=SystemClock()
    ).drawn(step).inputs["vision"]  # fmt: skip
    assert torch.equal(drawn(0, first=7), drawn(7)) and not torch.equal(drawn(0, first=7), drawn(0))
    few = Distill(batch=4, distinct_pairs=8)
    assert torch.equal(drawn(0, 7, few), drawn(1, 0, few))  # a cycle stays one


def test_weights_held_at_zero_stay_there(spec, pipeline, models):
    from mmcompress.prune.sparsity import zero_share, zero_weights_

    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    hold_ = zero_weights_(student, "2:4", share=0.5)
    distill_(
        pipeline,
        student,
        models,
        open_dataset(spec.data),
        Distill(steps=3, batch=4),
        0,
        hold_=hold_,
    )
    assert zero_share(student["text"]) >= 0.5


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(
    spec, pipeline, models, batch, tmp_path
):
    from mmcompress.distill.checkpoint import Checkpoint

    made = lambda: {
        n: copy_without_units(m, {b.name: torch.arange(0, b.units, 2) for b in m.blocks})
        for n, m in models.items()
    }
    data, options = (
        open_dataset(spec.data),
        Distill(steps=12, minutes=5, batch=4, learning_rate=3e-3, validations=3),
    )

    def train(student, history, kept=None, progress=lambda *_: None):
        distill_(
            pipeline,
            student,
            models,
            data,
            options,
            0,
            progress,
            tmp_path / history,
            batch,
            checkpoint=kept,
        )

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
    assert not (tmp_path / "state.safetensors").exists()


def test_the_teacher_answers_pairs_that_come_again_from_memory(
    pipeline, models, batch, monkeypatch
):
    from dataclasses import replace

    asked, forward = [], pipeline.forward
    monkeypatch.setattr(
        pipeline, "forward", lambda m, b, *a: asked.append(len(b)) or forward(m, b, *a)
    )
    named = replace(batch, names=tuple(f"{i}.png" for i in range(len(batch))))
    size = sum(v[0].nbytes for by in forward(models, batch).values() for v in by.values())
    teacher = Teacher(pipeline, models, room=int(2.5 * size))
    teacher(named[slice(0, 1)])
    mixed, judged = (
        teacher(named[slice(0, 4)]),
        pipeline.target_positions(batch[slice(0, 4)], "captioner"),
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


def test_a_rate_is_not_looked_for_where_steps_are_too_slow(spec, pipeline, models):
    student = {n: copy_without_units(m, {}) for n, m in models.items()}
    data, options = (
        open_dataset(spec.data),
        Distill(steps=160, minutes=1, batch=4, learning_rate=2e-3, validations=0),
    )
    training = trainer._Training(
        pipeline,
        student,
        teacher=Teacher(pipeline, models),
        data=data,
        options=options,
        seed=0,
        hold_=lambda: None,
        first=0,
        clock=SystemClock(),
    )
    training.advance_ = None  # type: ignore[method-assign]
    assert training.bearable(limit=0.0) == 2e-3
