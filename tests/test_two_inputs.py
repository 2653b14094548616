"""A dual encoder: a pipeline that is given a picture and a text, and may be given one of them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mmcompress.cli import main
from mmcompress.errors import DataError, SpecError
from mmcompress.graph.inputs import find_data_input, find_text_input, make_request
from mmcompress.graph.load_spec import load_spec
from mmcompress.metrics.answers import Answers
from mmcompress.metrics.retrieval import score_retrieval, score_wide_retrieval
from mmcompress.models.sources import load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.run.answers import answer_split, estimate_qualities
from mmcompress.run.stages import prepare_run
from mmcompress.runtime.graph import load_bundle
from mmcompress.workspace.context import open_run

SPEC = """\
name: search
inputs: {image: image, text: text}
nodes:
  vision: {kind: image_encoder, source: ./clip, inputs: {image: image}}
  query: {kind: text_encoder, source: ./clip, inputs: {text: text}}
  match: {kind: similarity, inputs: {query: vision.embedding, keys: query.embedding}}
outputs: {score: match.score, image_embedding: vision.embedding, text_embedding: query.embedding}
data: {kind: emoji_scenes, options: {image_size: 32, test: 24}, calibration: 16, validation_pairs: 12}
metrics: [retrieval, wide_retrieval, agreement]
target: 1.2x
distill: {steps: 2, minutes: 1, batch: 4}
compute: {precision: fp32}
search: {trials: 2, level_switches: 0, executor: inline, workers: 1, max_artifacts: 1}
measure: {threads: 1, warmup: 1, requests: 8, memory: false}
"""


@pytest.fixture()
def dual(tiny, tmp_path):
    """The spec of a dual encoder."""
    path = tmp_path / "search.yaml"
    path.write_text(SPEC.replace("./clip", f"{tiny}/clip"))
    return path


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    """Its dense bundle, as `mmcompress export` writes it."""
    folder = tmp_path_factory.mktemp("dual")
    path = folder / "search.yaml"
    path.write_text(SPEC.replace("./clip", f"{tiny}/clip"))
    done = CliRunner().invoke(main, ["export", str(path), "--out", str(folder / "bundle")])
    assert done.exit_code == 0, done.output
    return load_bundle(folder / "bundle")


def test_a_request_holds_what_the_pipeline_takes():
    inputs = {"words": "text", "picture": "image"}
    assert find_data_input(inputs) == "picture" and find_text_input(inputs) == "words"
    assert make_request(inputs, 3, text="three") == {"picture": 3, "words": "three"}
    assert make_request({"line": "text"}, "a line", text="a line") == {"line": "a line"}
    assert find_text_input({"line": "text"}) == ""


@pytest.mark.parametrize(
    "inputs", ["{image: image, other: image}", "{a: text, b: text}", "{a: image, b: text, c: text}"]
)
def test_other_inputs_than_one_or_one_with_its_text_are_refused(dual, inputs):
    text = dual.read_text().replace("{image: image, text: text}", inputs, 1)
    dual.write_text(text)
    with pytest.raises(
        SpecError, match=r"takes one input .* or two: an image or audio, and a text"
    ):
        load_spec(dual)


def test_a_request_of_an_input_that_is_not_there_is_refused(dual):
    with pytest.raises(SpecError, match="no input is named 'txt'; did you mean 'text'"):
        load_spec(dual, {"measure.request": "txt"})


def test_both_inputs_give_the_cosine_of_their_embeddings(bundle):
    picture = np.random.default_rng(0).integers(0, 255, (40, 32, 3), np.uint8)
    answer = bundle(image=picture, text="a red car")
    image, text = answer["image_embedding"], answer["text_embedding"]
    assert answer["score"] == pytest.approx(float(image[0] @ text[0]), abs=1e-6)
    assert np.linalg.norm(image) == pytest.approx(1, abs=1e-5)


def test_one_input_gives_what_follows_from_it_alone(bundle):
    picture = np.random.default_rng(0).integers(0, 255, (40, 32, 3), np.uint8)
    both = bundle(image=picture, text="a red car")
    query = bundle(text="a red car")
    assert list(query) == ["text_embedding"]
    assert np.array_equal(query["text_embedding"], both["text_embedding"])
    assert bundle.node_seconds["vision"] == 0 < bundle.node_seconds["query"]
    assert list(bundle(image=picture)) == ["image_embedding"]
    many = bundle(text=["a red car", "two dogs"])["text_embedding"]
    assert many.shape[0] == 2 and np.allclose(many[0], both["text_embedding"][0], atol=1e-5)
    for wrong in ({}, {"sound": 1}, {"image": picture, "sound": 1}):
        with pytest.raises(DataError, match="this pipeline takes image, text; got"):
            bundle(**wrong)


def test_what_is_learned_is_that_pairs_belong_together(dual):
    spec = load_spec(dual)
    models = load_models(spec)
    pipeline = TorchPipeline(spec, models)
    run = open_run(dual, dual.with_name("run"))
    batch = pipeline.collate(run.data.load("train", 6))
    outputs = pipeline.forward(models, batch)
    losses = pipeline.compute_losses(outputs, batch)
    assert list(losses) == ["contrast.vision.query"]
    similarity = 30 * outputs["vision"]["embedding"] @ outputs["query"]["embedding"].T
    both = similarity.log_softmax(1).diagonal() + similarity.log_softmax(0).diagonal()
    assert losses["contrast.vision.query"].item() == pytest.approx(-both.mean().item() / 2)
    assert torch.isfinite(similarity).all()


def test_a_right_answer_among_the_first_ones_counts():
    """Every figure as its definition says it, on vectors without equal similarities."""
    rng = np.random.default_rng(0)
    queries, keys = (rng.standard_normal((40, 6)) for _ in range(2))
    references = tuple(f"text {i % 30}" for i in range(40))  # some texts belong to two inputs
    answers = Answers(references=references, queries=queries, keys=keys)
    figures = score_retrieval(answers) | score_wide_retrieval(answers)
    assert len(figures) == 6
    for rank in (1, 5, 10):
        for name, similarity in (
            ("image_to_text", queries @ keys.T),
            ("text_to_image", keys @ queries.T),
        ):
            for i, score in enumerate(figures[f"{name}_r{rank}"].numerators):
                better = sorted(range(40), key=lambda k: -similarity[i, k])[:rank]
                assert score == any(references[k] == references[i] for k in better)


@pytest.mark.very_slow
@pytest.mark.parametrize("request_name", ["pair", "image", "text"])
def test_the_target_counts_what_a_request_holds(dual, tmp_path, machine, request_name):
    changes = {"measure.request": request_name}
    run = prepare_run(open_run(dual, tmp_path / "r", overrides=changes, **machine)).run
    held = {"image", "text"} if request_name == "pair" else {request_name}
    assert set(run.load_requests(1)[0]) == held
    # What is checked and stored runs every node all the same.
    assert set(run.load_whole_requests("val", 1, seed=1)[0]) == {"image", "text"}
    shutil.copytree(run.folder.baseline, run.folder.bundle)
    with run.seal.open_for_judging():
        quality = estimate_qualities(answer_split(run, "test"))
    assert len(quality["compressed"]) == 7
    assert quality["compressed"] == quality["baseline"]
    assert quality["baseline"]["agreement"].value == 1
