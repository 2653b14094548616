"""Pairs that come again within a training: how often, in which mix, and what the teacher is asked."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcompress.data.open_dataset import open_dataset
from mmcompress.distill.pair_plan import (
    MIN_DISTINCT_DRAWS,
    count_distinct_draws,
    plan_pairs,
)
from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.training import Training, TrainingInputs, TrainingOptions
from mmcompress.spec.schema import Distill

BATCH = 4
DRAWS = 6


class CountingPipeline:
    """A pipeline that counts the pairs that the teacher runs on."""

    def __init__(self, pipeline, models):
        self._pipeline = pipeline
        self._models = models
        self.taught_pairs = 0

    def forward(self, models, batch):
        self.taught_pairs += len(batch) * (models is self._models)
        return self._pipeline.forward(models, batch)

    def __getattr__(self, name):
        return getattr(self._pipeline, name)


@pytest.fixture()
def make_training(spec, pipeline, models, tmp_path):
    """`make_training(store_bytes)`: a training of scenes that are drawn, and its pipeline."""

    def make(store_bytes=10**9, **settings):
        counting = CountingPipeline(pipeline, models)
        store = TeacherStore(folder=tmp_path / "store", max_bytes=store_bytes)
        inputs = TrainingInputs(
            pipeline=counting,
            teacher=Teacher(counting, models, store=store),
            data=open_dataset(spec.data),
        )
        student = {name: copy.deepcopy(model) for name, model in models.items()}
        options = TrainingOptions(settings=Distill(batch=BATCH, **settings))
        return Training(student, inputs, options=options), counting

    return make


@given(
    steps=st.integers(1, 400),
    passes=st.integers(1, 6),
    batch=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_no_pair_comes_too_often_and_a_step_has_no_pair_twice(steps, passes, batch, seed):
    draws = count_distinct_draws(steps, passes)
    counts = Counter()
    for step in range(steps):
        pairs = plan_pairs(step, draws, batch=batch, seed=seed)
        assert len(set(pairs)) == batch
        counts.update(pairs)
    assert max(counts.values()) <= passes
    assert len({draw for draw, _ in counts}) <= draws


def test_every_pass_has_all_pairs_in_a_mix_of_its_own():
    mixes = []
    for pass_number in range(3):
        steps = range(DRAWS * pass_number, DRAWS * (pass_number + 1))
        mix = [plan_pairs(step, DRAWS, batch=BATCH, seed=0) for step in steps]
        assert len({pair for pairs in mix for pair in pairs}) == DRAWS * BATCH
        mixes.append(mix)
    assert mixes[0] == [[(draw, place) for place in range(BATCH)] for draw in range(DRAWS)]
    assert mixes[1] != mixes[2]
    assert any(len({draw for draw, _ in pairs}) > 1 for pairs in mixes[1])


def test_a_short_training_sees_every_pair_once():
    assert count_distinct_draws(MIN_DISTINCT_DRAWS, 3) == MIN_DISTINCT_DRAWS
    assert count_distinct_draws(10 * MIN_DISTINCT_DRAWS, 2) == 5 * MIN_DISTINCT_DRAWS


def test_the_teacher_is_asked_once_for_a_pair_and_says_the_same_in_a_mix(make_training):
    training, counting = make_training()
    teacher = training.inputs.teacher
    answers = {}
    for step in range(DRAWS):
        batch = training.draw_batch(step, distinct_draws=DRAWS)
        answers[batch.draw] = (batch, teacher(batch))
    assert counting.taught_pairs == DRAWS * BATCH
    for step in range(DRAWS, 3 * DRAWS):
        batch = training.draw_batch(step, distinct_draws=DRAWS)
        outputs = teacher(batch)
        computed = counting._pipeline.forward(teacher.models, batch)
        for pair, (draw, place) in enumerate(batch.sources):
            source_batch, source_outputs = answers[draw]
            for node, values in batch.inputs.items():
                source = source_batch.inputs[node][place]
                length = min(len(source), len(values[pair]))
                assert torch.equal(values[pair][:length], source[:length])
            for node, node_outputs in outputs.items():
                for name, tensor in node_outputs.items():
                    if name == "logits":
                        count = int(batch.keep[node][pair].sum())
                        expected = source_outputs[node][name][place][:count]
                        assert torch.equal(tensor[pair][:count], expected)
                        continue
                    assert torch.equal(tensor[pair], source_outputs[node][name][place])
                    # Kept in half precision, they are about what would be computed.
                    assert torch.allclose(
                        tensor[pair], computed[node][name][pair], atol=2e-2, rtol=1e-2
                    )
    assert counting.taught_pairs == DRAWS * BATCH


def test_draws_that_nobody_has_seen_are_learned_first(make_training):
    """A training that goes on from a checkpoint, with a store that is gone."""
    training, counting = make_training()
    learned = set()
    for step in (DRAWS, DRAWS + 1):
        batch = training.draw_batch(step, distinct_draws=DRAWS)
        training.inputs.teacher(batch)
        learned |= {draw for draw, _ in batch.sources}
        assert counting.taught_pairs == len(learned) * BATCH


def test_without_room_the_teacher_is_asked_for_the_mix_itself(make_training):
    training, counting = make_training(0)
    training.inputs.teacher(training.draw_batch(DRAWS, distinct_draws=DRAWS))
    assert counting.taught_pairs == BATCH


def test_pairs_of_files_are_drawn_anew_for_each_step(make_training):
    training, _ = make_training()

    class Named:
        def load(self, split, count, *, seed):
            pairs = open_dataset_pairs(split, count, seed=seed)
            return replace(pairs, names=tuple(f"{seed}-{i}" for i in range(len(pairs))))

    open_dataset_pairs = training.inputs.data.load
    training.inputs = replace(training.inputs, data=Named())
    batch = training.draw_batch(DRAWS, distinct_draws=DRAWS)
    assert not batch.sources and batch.draw


def test_a_round_of_an_open_ended_training_takes_fresh_pairs(make_training):
    training, _ = make_training()
    round_pairs = training.draw_batch(0, distinct_draws=DRAWS, first_draw=9)
    assert torch.equal(round_pairs.inputs["vision"], training.draw_batch(9).inputs["vision"])
    mixed = training.draw_batch(DRAWS, distinct_draws=DRAWS, first_draw=9)
    own_draws = {training.draw_batch(step).draw for step in range(9, 9 + DRAWS)}
    assert {draw for draw, _ in mixed.sources} <= own_draws
