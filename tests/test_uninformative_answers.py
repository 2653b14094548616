"""Dense answers that are empty or alike, and sounds beyond the window: told, and never called retained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_summary import make_summary

from mmcompress.cli.run import _require_determined_quality
from mmcompress.errors import QualityUndetermined
from mmcompress.graph.load_spec import load_spec
from mmcompress.report.comparison_pages import write_front
from mmcompress.report.page import write_report
from mmcompress.results.records import (
    LONG_INPUTS,
    AnswerCounts,
    TrainingResult,
    ValidationFigure,
)
from mmcompress.run.answers import SplitAnswers, estimate_on_long_inputs
from mmcompress.run.count_answers import count_answers, find_judged_answers
from mmcompress.run.warnings import list_warnings
from mmcompress.stats import PerSampleScores, Quality
from mmcompress.storage import write_record
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.load_summary import load_summary

MATCH = """\
name: match
inputs: {image: image, caption: text}
nodes:
  vision: {kind: image_encoder, source: ./clip, inputs: {image: image}}
  words: {kind: text_encoder, source: ./clip, inputs: {text: caption}}
  match: {kind: similarity, inputs: {query: vision.embedding, keys: words.embedding}}
outputs: {score: match.score}
data: {kind: emoji_scenes, options: {image_size: 32}}
metrics: [retrieval]
"""


def counts(empty: int, alike: int, *, inputs: int = 100, judged: bool = True) -> AnswerCounts:
    return AnswerCounts(
        inputs=inputs, empty=empty, alike=alike, example="a dog" if alike else "", judged=judged
    )


@pytest.mark.parametrize(
    ("texts", "empty", "alike", "is_uninformative"),
    [
        ([""] * 10, 10, 0, True),
        (["", " \n", "a"], 2, 0, False),
        (["a dog"] * 9 + ["b"], 0, 9, True),
        (["a dog"] * 8 + ["b", "c"], 0, 8, False),
        (["a"] * 5 + [""] * 4 + ["b"], 4, 5, True),
        (list("abcdefghij"), 0, 0, False),
        (["alone"], 0, 0, False),
    ],
)
def test_empty_and_equal_answers_are_counted(tiny, texts, empty, alike, is_uninformative):
    spec = load_spec(tiny / "spec.yaml")
    node = next(iter(find_judged_answers(spec)))
    told = count_answers(spec, {node: texts})[node]
    assert (told.empty, told.alike, told.inputs) == (empty, alike, len(texts))
    assert told.judged and told.is_uninformative is is_uninformative


def test_a_report_without_samples_holds_no_answer_either(tiny):
    texts = {"captioner": ["my secret"] * 9 + ["b"]}
    spec = load_spec(tiny / "spec.yaml")
    assert "my secret" in count_answers(spec, texts)["captioner"].describe()
    private = load_spec(tiny / "spec.yaml", {"report.samples": "none"})
    told = count_answers(private, texts)["captioner"]
    assert told.alike == 9 and "secret" not in told.describe()


def test_only_nodes_whose_texts_are_judged_leave_quality_undetermined(tiny):
    spec = load_spec(tiny / "spec.yaml", {"metrics": ["retrieval"]})
    assert not find_judged_answers(spec)
    [told] = count_answers(spec, {"captioner": [""] * 4}).values()
    assert told.empty == 4 and not told.is_uninformative


@pytest.mark.parametrize(
    ("spread", "alike"), [(0.0, 10), (1e-4, 10), (1.0, 0)], ids=["equal", "rounding", "different"]
)
def test_embeddings_of_one_direction_are_counted(tiny, spread, alike):
    """As a model with random weights gives them of everything."""
    spec = load_spec(tiny / "spec.yaml")
    rng = np.random.default_rng(0)
    vectors = np.ones(32) + spread * rng.normal(size=(10, 32)) * (1 if spread < 1 else 9)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    told = count_answers(spec, {}, vectors_by_node={"vision": vectors})["vision"]
    assert (told.inputs, told.empty, told.alike) == (10, 0, alike)
    assert told.describe().endswith("equal to one another") is bool(alike)


def test_a_join_that_finds_the_same_text_for_everything_leaves_quality_undetermined(tmp_path, tiny):
    """A random CLIP: its retrieval is a matter of chance, and so is what is retained of it."""
    path = tmp_path / "match.yaml"
    path.write_text(MATCH.replace("./", f"{tiny}/"))
    spec = load_spec(path)
    assert find_judged_answers(spec) == {"match"}
    told = count_answers(spec, {"match": ["a red b"] * 12})["match"]
    assert told.is_uninformative
    summary = make_summary(dense_answers={"match": told})
    with pytest.raises(QualityUndetermined, match="12 are equal to one another"):
        _require_determined_quality([summary])


def test_compressed_answers_that_are_all_alike_are_warned_of():
    good, collapsed = counts(0, 3), counts(0, 96)
    summary = make_summary(
        dense_answers={"captioner": good}, compressed_answers={"captioner": collapsed}
    )
    [warning] = [text for text in list_warnings(summary) if "of the compressed pipeline" in text]
    assert "96 are equal to one another" in warning and "milder target" in warning
    both = make_summary(
        dense_answers={"captioner": collapsed}, compressed_answers={"captioner": collapsed}
    )
    assert not any("of the compressed pipeline" in text for text in list_warnings(both))


def test_undetermined_quality_is_told_everywhere(tmp_path, capsys):
    from mmcompress.cli.results_table import print_summary

    told = {"captioner": counts(95, 0), "pick": counts(0, 30)}
    summary = make_summary(dense_answers=told, quality_retained=1.0)
    assert summary.undetermined_nodes == ("captioner",) and summary.determined_quality is None
    reason = "the quality of 'captioner' is undetermined: 95 of 100 answers are empty"
    with pytest.raises(QualityUndetermined, match=reason) as caught:
        _require_determined_quality([make_summary(), summary])
    assert caught.value.exit_code == 3
    [warning] = [text for text in list_warnings(summary) if text.startswith("captioner: of")]
    assert "95 of 100 answers are empty" in warning and "its quality is undetermined" in warning
    write_report(summary, tmp_path)
    for name in ("report.md", "report.html"):
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert "undetermined" in page and "100.0 %" not in page.split("Before and after")[0]
        assert "0 of 100 answers are empty, 30 are equal to one another" in page.replace(
            "&#39;", "'"
        )
    write_front({"2x": make_summary(), "3x": summary}, RunFolder(path=tmp_path))
    assert "undetermined" in RunFolder(path=tmp_path).front_page.read_text(encoding="utf-8")
    print_summary(summary)
    assert "quality undetermined" in capsys.readouterr().out
    write_record(RunFolder(path=tmp_path).summary, summary)
    assert load_summary(tmp_path) == summary


def test_determined_quality_ends_well(tmp_path):
    summary = make_summary(dense_answers={"captioner": counts(1, 2)})
    _require_determined_quality([summary])
    assert summary.determined_quality == summary.quality_retained
    assert not any("of the dense pipeline, " in text for text in list_warnings(summary))
    write_report(summary, tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "1 of 100 answers are empty, 2 are equal to one another ('a dog')" in page
    assert "undetermined" not in page


def test_a_few_equal_answers_are_not_told_one_by_one(tmp_path):
    few = {"captioner": counts(0, 1), "pick": counts(0, 0)}
    write_report(make_summary(dense_answers=few, compressed_answers=few), tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No answer is empty, and hardly any are equal to one another." in page
    assert "of 100 answers" not in page + (tmp_path / "report.md").read_text(encoding="utf-8")


def test_word_errors_of_what_is_longer_than_the_window_are_told():
    scores = {
        "wer": PerSampleScores(
            numerators=(0, 4, 0, 2), denominators=(10, 10, 10, 10), is_error_rate=True
        ),
        "agreement": PerSampleScores(numerators=(1, 1, 1, 1)),
    }
    baseline = SplitAnswers(scores=scores, windows=(1, 3, 1, 2))
    sides = {"baseline": baseline, "compressed": SplitAnswers(scores=scores)}
    told = estimate_on_long_inputs(sides)
    assert set(told["baseline"]) == {"wer"}
    assert told["baseline"]["wer"].value == pytest.approx(6 / 20)
    assert told["compressed"]["wer"].n == 2
    assert estimate_on_long_inputs({**sides, "baseline": SplitAnswers(scores=scores)}) == {}
    quality = Quality(value=0.3, low=0.2, high=0.4, n=2, is_error_rate=True)
    split = {"baseline": {"wer": quality}, "compressed": {"wer": quality}}
    warnings = list_warnings(make_summary(extra_splits={LONG_INPUTS: split}))
    expected = (
        "2 test inputs are longer than the window and are heard in pieces: "
        "wer on them is 30.0% before and 30.0% after"
    )
    assert expected in warnings


def test_a_model_that_cannot_read_its_input_is_warned_of():
    summary = make_summary()
    emptied = {
        node: {block.name: 0 for block in blocks if block.kind == "attention"}
        for node, blocks in summary.blocks.items()
    }
    warned = list_warnings(replace(summary, kept_units={**emptied, "captioner": {}}))
    assert any("through which vision reads its input was dropped" in text for text in warned)
    assert not any("was dropped" in warning for warning in list_warnings(summary))


@pytest.mark.parametrize(("after", "is_told"), [(0.4, True), (0.75, False), (None, False)])
def test_a_loss_that_only_validation_pairs_show_is_told(after, is_told):
    figure = ValidationFigure(name="retrieval.vision", dense=0.8, before=0.1, after=after)
    training = TrainingResult(
        asked_steps=9,
        steps=9,
        seconds=1.0,
        learning_rate=1e-3,
        ended_by="steps",
        loss=None,
        dense_loss=None,
        loss_of_twice_the_steps=None,
        quality=(figure,),
    )
    warned = list_warnings(make_summary(training=training, quality_retained=1.0))
    expected = "retrieval.vision fell from 80.0% to 40.0% on validation pairs"
    assert any(expected in text for text in warned) is is_told
