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


def add_second_nodes(text):
    """Add a second generator and a second join to the text of the tiny spec."""
    head, _, tail = text.partition("outputs: {caption: choose.best, embedding: vision.embedding}\n")
    return head + SECOND + tail


@pytest.fixture()
def twice(tiny, tmp_path):
    """A spec with a second generator and a second join beside the first ones."""
    path = tmp_path / "twice.yaml"
    path.write_text(add_second_nodes((tiny / "spec.yaml").read_text()).replace("./", f"{tiny}/"))
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
