"""Several requests answered together: each gets the answer that it would get alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_fusion import deploy_blip_matching

from mmcompress.errors import DataError
from mmcompress.measure.latency.bench import BenchmarkOptions, bench_pipelines, group_requests
from mmcompress.measure.latency.bench_with_replay import select_requests
from mmcompress.runtime.beam_search import BeamSearch, Generation, beam_search, search_together
from mmcompress.runtime.graph import answer_together, load_bundle
from mmcompress.runtime.sessions import split_rows
from mmcompress.runtime.token_scores import TokenScores

GENERATION = Generation(bos=0, eos=1, pad=2, beams=3, max_tokens=14)
WORDS = 12


def list_best(scores, count):
    """All scores of a step, or as many of the best as the graph of a bundle lists."""
    if not count:
        return TokenScores(scores)
    ids = np.argsort(-scores, axis=1)[:, :count]
    return TokenScores(np.take_along_axis(scores, ids, 1), ids)


class FakeModel:
    """A model whose scores depend on the item and on all tokens before, and on nothing else."""

    def __init__(self, items, best_tokens=0, beams=GENERATION.beams):
        self.best_tokens = best_tokens
        self.rows = np.repeat(np.array(items, np.float32), beams)
        self.calls = []

    def make_past(self):
        return [np.zeros((len(self.rows), 0), np.float32)]

    def keep_rows(self, rows):
        self.rows = self.rows[rows]

    def take_step(self, ids, position, past):
        trail = np.concatenate([past[0], ids.astype(np.float32)], 1)
        assert trail.shape[1] == position + ids.shape[1]
        self.calls.append(len(ids))
        scores = np.zeros((len(ids), WORDS), np.float32)
        for row, tokens in enumerate(trail):
            seed = [int(self.rows[row]), *tokens.astype(int).tolist()]
            scores[row] = np.random.default_rng(seed).normal(size=WORDS)
        scores[:, 1] += 0.3 * position
        log_probabilities = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        return list_best(log_probabilities, self.best_tokens), [trail]


def write_alone(item, generation, best_tokens=0, **how):
    model = FakeModel([item], best_tokens, generation.beams)
    found = beam_search(model.take_step, model.make_past(), generation=generation, **how)
    return found, len(model.calls)


@pytest.mark.parametrize(
    "changes",
    [{}, {"no_repeat_ngram_size": 2}, {"min_tokens": 5, "early_stopping": True}, {"guard": True}],
)
def test_searches_together_find_what_each_finds_alone(changes):
    generation = replace(GENERATION, **changes)
    items = [3, 4, 5, 6, 7]
    alone = [write_alone(item, generation) for item in items]
    assert len({steps for _, steps in alone}) > 1
    model = FakeModel(items)
    searches = [BeamSearch(generation) for _ in items]
    search_together(
        model.take_step, model.make_past(), searches=searches, drop_rows=model.keep_rows
    )
    for search, (found, _) in zip(searches, alone, strict=True):
        assert [ids for _, ids in search.finished] == [ids for _, ids in found]
        assert [s for s, _ in search.finished] == pytest.approx([s for s, _ in found])
    # One call a step; what has ended is not computed any more.
    steps = [count for _, count in alone]
    assert model.calls == [
        GENERATION.beams * sum(count > step for count in steps) for step in range(max(steps))
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beams": 1},
        {"other_ends": (5, 6)},
        {"min_tokens": 5, "other_ends": (5,)},
        {"suppress": (3, 4, 7), "begin_suppress": (1, 9)},
    ],
)
@pytest.mark.parametrize("item", [3, 4, 5, 6])
def test_the_best_tokens_of_each_beam_write_what_all_scores_write(item, changes):
    generation = replace(GENERATION, **changes)
    expected = write_alone(item, generation)
    count = generation.count_best_tokens()
    assert not generation.needs_all_scores
    found = write_alone(item, generation, best_tokens=count)
    assert found[1] == expected[1]
    assert [ids for _, ids in found[0]] == [ids for _, ids in expected[0]]
    assert [s for s, _ in found[0]] == pytest.approx([s for s, _ in expected[0]], abs=1e-5)


def test_rules_that_read_the_text_ask_for_all_scores():
    for changes in (
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 2},
        {"bad_words": ((3,),)},
        {"forced_end": 1},
        {"raw_scores": True},
    ):
        assert replace(GENERATION, **changes).needs_all_scores, changes


def test_replayed_together_each_search_takes_its_own_steps_and_moves():
    items = [3, 4, 5]
    moves_by_item = []
    for item in items:
        moves = []
        write_alone(item, GENERATION, made_moves=moves)
        moves_by_item.append(moves)
    made = [[] for _ in items]
    searches = [
        BeamSearch(GENERATION.set_pace(len(moves) + 1), made_moves=own, moves_to_follow=moves)
        for moves, own in zip(moves_by_item, made, strict=True)
    ]
    # Another model, which would write something else.
    model = FakeModel([13, 14, 15])
    search_together(
        model.take_step, model.make_past(), searches=searches, drop_rows=model.keep_rows
    )
    assert made == moves_by_item
    assert len(model.calls) == 1 + max(len(moves) for moves in moves_by_item)


def test_rows_are_given_back_to_their_requests():
    rows = np.arange(12).reshape(6, 2)
    found = split_rows(["a", "b"], [rows, -rows], counts=[1, 3, 0, 2])
    assert [len(values["a"]) for values in found] == [1, 3, 0, 2]
    assert (found[1]["b"] == -rows[1:4]).all()


def test_a_node_without_a_batch_of_its_own_is_asked_one_by_one():
    assert answer_together(lambda x: {"y": 2 * x}, [{"x": 1}, {"x": 3}]) == [{"y": 2}, {"y": 6}]


def assert_same(together, alone):
    """Compare two answers: texts are equal, numbers nearly so."""
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        if isinstance(value, np.ndarray):
            assert together[name].shape == value.shape
            assert np.allclose(together[name], value, atol=1e-4), name
        elif isinstance(value, dict):
            assert_same(together[name], value)
        elif isinstance(value, list) and value and isinstance(value[0], float):
            assert together[name] == pytest.approx(value, abs=1e-4)
        else:
            assert together[name] == value, name


def draw_pictures(count):
    rng = np.random.default_rng(0)
    return [
        {"image": rng.integers(0, 256, (24 + 8 * i, 32, 3), dtype=np.uint8)} for i in range(count)
    ]


@pytest.mark.parametrize("side", ["baseline", "bundle"])
def test_a_bundle_answers_a_batch_as_it_answers_each_request(run_folder, side):
    pipeline = load_bundle(run_folder / side)
    requests = draw_pictures(5)
    alone = [pipeline(**request) for request in requests]
    calls = {
        f"{node}/{graph}": session.calls
        for node, sessions in pipeline.sessions.items()
        for graph, session in sessions.items()
    }
    together = pipeline.answer_batch(requests)
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)
    assert pipeline.sessions["vision"]["model"].calls == calls["vision/model"] + 1
    assert pipeline.sessions["text"]["model"].calls == calls["text/model"] + 1
    writer = pipeline.writers["captioner"]
    steps = [trace.steps for trace in writer.traces]
    assert len(steps) == 5
    step_calls = pipeline.sessions["captioner"]["step"].calls - calls["captioner/step"]
    assert step_calls == max(steps)
    assert pipeline.answer_batch([]) == []
    assert_same(pipeline.answer_batch(requests[:1])[0], alone[0])


def test_requests_of_a_batch_give_the_same_inputs(run_folder):
    pipeline = load_bundle(run_folder / "bundle")
    with pytest.raises(DataError, match="this pipeline takes image; got picture"):
        pipeline.answer_batch([{"image": np.zeros((32, 32, 3), np.uint8)}, {"picture": 1}])
    pipeline.inputs = {"image": "image", "text": "text"}
    with pytest.raises(DataError, match="the first gives image; number 2 gives image, text"):
        pipeline.answer_batch([{"image": 1}, {"image": 1, "text": ""}])


def test_texts_are_matched_with_the_pictures_of_their_own_requests(tmp_path):
    import torch

    _, _, vision, deployed = deploy_blip_matching(tmp_path)
    with torch.no_grad():
        tokens = vision(torch.randn(3, 3, 32, 32))[1].numpy()
    texts = [["a cat", "two dogs and a cat left of the tree"], "a tree", [""]]
    requests = [{"text": texts[i], "context": tokens[i : i + 1]} for i in range(3)]
    together = deployed.answer_batch(requests)
    for request, values in zip(requests, together, strict=True):
        alone = deployed(**request)
        assert values["scores"] == pytest.approx(alone["scores"], abs=1e-4)
        assert np.allclose(values["embedding"], alone["embedding"], atol=1e-4)


def test_sounds_of_any_length_are_heard_together_and_silence_has_no_tokens():
    from mmcompress.kinds.audio_encoder.deployed import AudioEncoder

    class CountingSession:
        outputs = ("embedding", "tokens")
        calls: list[int] = []  # noqa: RUF012

        def __call__(self, feed):
            features = feed["features"]
            self.calls.append(len(features))
            return [features.mean(2), features[:, :, :5].transpose(0, 2, 1)]

    session = CountingSession()
    config = {"features": {"mels": 80, "frames": 100, "seconds": 1.0}}
    encoder = AudioEncoder({"model": session}, config, None)
    rng = np.random.default_rng(0)
    seconds = (0.5, 2.5, 0.0, 1.0)
    sounds = [0.1 * rng.standard_normal(round(16_000 * s)).astype(np.float32) for s in seconds]
    sounds[2] = np.zeros(8_000, np.float32)
    alone = [encoder(sound) for sound in sounds]
    session.calls.clear()
    together = encoder.answer_batch([{"audio": sound} for sound in sounds])
    assert session.calls == [4, 2]
    for values, expected in zip(together, alone, strict=True):
        assert_same(values, expected)
    assert len(together[1]["tokens"]) == 3 and len(together[2]["tokens"]) == 0
    assert "silent" in together[2]["warnings"][0] and "warnings" not in together[0]


def test_requests_are_grouped_in_their_order():
    assert group_requests("abcdefg", 3) == [["a", "b", "c"], ["d", "e", "f"]]
    assert group_requests("ab", 1) == [["a"], ["b"]]
    assert group_requests("ab", 5) == [["a", "b", "a", "b", "a"]]
    requests = [{"x": i} for i in range(40)]
    assert len(select_requests(requests, 10, dense_ms=1.0, batch=4)) == 40
    assert len(select_requests(requests, 5, dense_ms=1.0, batch=4)) == 20


def test_a_batch_is_measured_as_one_request_and_replayed(run_folder):
    pair = {name: load_bundle(run_folder / name, 1) for name in ("baseline", "bundle")}
    requests = draw_pictures(6)
    options = BenchmarkOptions(warmup=1, max_requests=4, batch=3)
    free = bench_pipelines({"dense": pair["baseline"]}, requests, options=options)["dense"]
    assert len(free.ms) == 4 and len(free.traces) == 2
    assert [len(traces["captioner"]) for traces in free.traces] == [3, 3]
    measured = free.summarize()
    assert measured.calls["vision/model"] == 1
    steps = [max(trace.steps for trace in traces["captioner"]) for traces in free.traces]
    assert measured.calls["captioner/step"] == sum(steps) / 2
    replayed = bench_pipelines(
        pair, requests, options=replace(options, traces=measured.traces, max_requests=2)
    )
    for samples in replayed.values():
        assert samples.summarize().calls["captioner/step"] == sum(steps) / 2
        assert samples.decode_steps["captioner"] == [
            sum(trace.steps for trace in traces["captioner"]) for traces in measured.traces
        ]


def test_feeds_of_a_batch_are_what_the_deployed_nodes_send(spec, models, tmp_path):
    from mmcompress.export.onnx import export_node
    from mmcompress.measure.cost_model.calibrate import _write_feeds
    from mmcompress.runtime.sessions import TimedSession

    for node, model in models.items():
        files = export_node(model, tmp_path / node)
        feeds = _write_feeds(
            model, tmp_path / node, root=tmp_path, decode_steps=5.0, texts=2, batch=3
        )
        for graph, file in files.items():
            session = TimedSession(file, 1)
            arrays = feeds[graph].arrays
            outputs = session({name: arrays[name] for name in session.inputs})
            texts = 1 if node == "vision" or graph == "context" else 2
            assert {len(output) for output in outputs} == {3 * texts}, (node, graph)


def test_blocks_of_a_batch_are_rows_of_their_own_in_the_device_table(spec, models):
    from mmcompress.measure.cost_model.calibrate import plan_measurements

    calls = {"captioner/step": 5.0}
    one = plan_measurements(spec, models, calls=calls)
    batched_spec = replace(spec, measure=replace(spec.measure, batch=8))
    eight = plan_measurements(batched_spec, models, calls=calls)
    for node, blocks in one.deployed.items():
        for block, batched in zip(blocks, eight.deployed[node], strict=True):
            assert batched.key == replace(block.key, batch=8 * block.key.batch)
            assert batched.calls == block.calls
            if block.context is not None:
                assert batched.context == replace(block.context, batch=8)
