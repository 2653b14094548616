"""Two generators, two joins, several metrics of one kind: each is judged under its own name."""

from __future__ import annotations

import pytest

from mmcompress.data.open_dataset import open_dataset
from mmcompress.errors import SpecError
from mmcompress.graph.judged_nodes import find_judged_nodes
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.references import name_by_node
from mmcompress.models.sources import load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.run.run_targets import run

SECOND = """\
  writer:
    kind: text_decoder
    source: ./captioner
    inputs: {context: vision.tokens}
    candidates: 2
    max_tokens: 12
  words:
    kind: text_encoder
    source: ./clip
    inputs: {text: writer.texts}
  pick:
    kind: nearest
    inputs: {query: vision.embedding, keys: words.embedding, values: writer.texts}
outputs: {caption: choose.best, second: pick.best}
"""
QUICK = {
    "search.trials": 1,
    "search.level_switches": 0,
    "search.linearization_rounds": 0,
    "search.max_artifacts": 1,
    "distill.steps": 1,
    "distill.precision": "fp32",
}


@pytest.fixture()
def twice(tiny, tmp_path):
    """A spec with a second generator and a second join beside the first ones."""
    text = (tiny / "spec.yaml").read_text()
    head, _, tail = text.partition("outputs: {caption: choose.best, embedding: vision.embedding}\n")
    path = tmp_path / "twice.yaml"
    path.write_text((head + SECOND + tail).replace("./", f"{tiny}/"))
    return path


def test_a_figure_that_one_node_has_keeps_its_name():
    figures = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
    assert name_by_node(figures) == {"x.a": 1, "y": 2, "x.b": 3}


def test_a_trial_tells_every_generator_and_every_join_apart(twice):
    spec = load_spec(twice)
    models = load_models(spec)
    pipeline = TorchPipeline(spec, models)
    batch = pipeline.collate(open_dataset(spec.data).load("train", 6))
    outputs = pipeline.forward_in_pieces(models, batch)
    quality = pipeline.compute_quality(outputs, batch)
    for figure in ("token_accuracy", "caption_exact_match"):
        assert {f"{figure}.captioner", f"{figure}.writer"} <= set(quality)
    for figure in ("image_to_text_r1", "text_to_image_r1"):
        assert {f"{figure}.choose", f"{figure}.pick"} <= set(quality)
    assert {"caption.captioner", "caption.writer"} <= set(pipeline.compute_losses(outputs, batch))


def test_a_metric_may_name_the_node_that_it_judges(twice):
    spec = load_spec(twice, {"metrics": ["endings", {"kind": "caption", "of": "pick"}]})
    assert [(m.kind, m.of) for m in spec.metrics] == [("endings", ""), ("caption", "pick")]
    assert find_judged_nodes(spec, "final_texts") == ("choose", "pick")
    with pytest.raises(SpecError, match=r"'caption' can't judge 'vision'; .*choose, pick"):
        load_spec(twice, {"metrics": [{"kind": "caption", "of": "vision"}]})


@pytest.mark.slow
def test_a_run_judges_each_under_its_own_name(twice, tmp_path, machine, one_artifact):
    metrics = ["retrieval", {"kind": "caption", "of": "pick"}, "endings"]
    changes = QUICK | {"metrics": metrics}
    space = "search_spaces/prune_only.yaml"
    options = {"space": space, "policy": one_artifact, **machine}
    summary = run(twice, tmp_path / "r", overrides=changes, **options)
    expected = {"caption_exact_match", "ends_by_itself.captioner", "ends_by_itself.writer"}
    expected |= {
        f"{figure}.{join}"
        for figure in ("image_to_text_r1", "text_to_image_r1")
        for join in ("choose", "pick")
    }
    assert set(summary.compressed.quality) == expected == set(summary.baseline.quality)
