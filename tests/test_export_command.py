"""`mmcompress export`: the dense pipeline as a bundle, without data, metrics or a target."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mmcompress.cli import main
from mmcompress.errors import DataError, SpecError
from mmcompress.metrics.answers import Answers
from mmcompress.run.export_dense import export_dense
from mmcompress.runtime.graph import load_bundle

ONE_TEXT_ENCODER = """\
name: sentence
inputs: {text: text}
nodes:
  sentence: {kind: text_encoder, source: ./clip, inputs: {text: text}}
outputs: {embedding: sentence.embedding}
"""

ONE_IMAGE_ENCODER = """\
name: picture
inputs: {image: image}
nodes:
  vision: {kind: image_encoder, source: ./clip, inputs: {image: image}}
outputs: {embedding: vision.embedding}
"""

WITH_CAPTIONER = """\
name: caption
inputs: {image: image}
nodes:
  vision: {kind: image_encoder, source: ./clip, inputs: {image: image}}
  captioner:
    {kind: text_decoder, source: ./captioner, inputs: {context: vision.tokens}, max_tokens: 8}
outputs: {caption: captioner.text}
"""


@pytest.fixture()
def write_spec(tiny, tmp_path):
    def write(text):
        path = tmp_path / "spec.yaml"
        path.write_text(text.replace("./", f"{tiny}/"))
        return path

    return write


def test_a_single_text_encoder_is_a_pipeline(write_spec, tmp_path):
    done = CliRunner().invoke(
        main, ["export", str(write_spec(ONE_TEXT_ENCODER)), "--out", str(tmp_path / "b")]
    )
    assert done.exit_code == 0, done.output
    assert "4 proofs hold" in done.output
    pipeline = load_bundle(tmp_path / "b")
    embedding = pipeline(text="a red apple")["embedding"]
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    # `bench` and the measurement of memory send it.
    request = pipeline.make_noise_request()
    assert isinstance(request["text"], str)
    assert pipeline(**request)["embedding"].shape == embedding.shape


def test_a_single_image_encoder_is_a_pipeline(write_spec, tmp_path):
    proofs = export_dense(write_spec(ONE_IMAGE_ENCODER), tmp_path / "b")
    assert {proof.name for proof in proofs} >= {"torch == onnx", "fused == unfused"}
    picture = np.zeros((40, 50, 3), np.uint8)
    assert load_bundle(tmp_path / "b")(image=picture)["embedding"].shape[-1] == 32


def test_a_captioner_is_exported_with_its_cache_and_its_proof(write_spec, tmp_path):
    proofs = export_dense(write_spec(WITH_CAPTIONER), tmp_path / "b")
    assert "cached generation == library" in {proof.name for proof in proofs}
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert {proof["name"] for proof in manifest["proofs"]} == {proof.name for proof in proofs}
    assert set(manifest["graph"]["nodes"]["captioner"]["files"]) == {"context", "step"}


@pytest.mark.slow
def test_an_exported_bundle_carries_requests_for_verify_and_bench(
    write_spec, tmp_path, monkeypatch
):
    bundle = tmp_path / "b"
    export_dense(write_spec(WITH_CAPTIONER), bundle)
    verified = CliRunner().invoke(main, ["verify", str(bundle)])
    assert verified.exit_code == 0, verified.output
    assert "8 of 8 answers are as they were on" in verified.output

    def refuse(pipeline):
        raise AssertionError("noise is measured")

    monkeypatch.setattr("mmcompress.runtime.graph.Pipeline.make_noise_request", refuse)
    measured = CliRunner().invoke(main, ["bench", str(bundle), "--requests", "4", "--json"])
    assert measured.exit_code == 0, measured.output


@pytest.mark.slow
def test_no_request_is_kept_where_the_spec_shows_no_samples(write_spec, tmp_path):
    bundle = tmp_path / "b"
    export_dense(write_spec(WITH_CAPTIONER), bundle, overrides={"report.samples": "none"})
    assert not (bundle / "requests").exists()


@pytest.mark.examples(1)
@pytest.mark.parametrize("is_alike", [True, False])
def test_a_generator_that_writes_the_same_of_everything_is_told(
    write_spec, tmp_path, monkeypatch, is_alike
):
    """As one with random weights does: before anybody spends an hour on it."""

    def answer_alike(pipeline, pairs, **options):
        texts = tuple("a dog" if is_alike else f"{i} dogs" for i in range(len(pairs)))
        return {"captioner": Answers(references=pairs.texts, texts=texts)}

    monkeypatch.setattr("mmcompress.run.export_dense.answer_pairs", answer_alike)
    data = "data: {kind: emoji_scenes, options: {image_size: 32, val: 16}}\n"
    told = []
    export_dense(
        write_spec(WITH_CAPTIONER + data),
        tmp_path / "b",
        on_progress=lambda stage, message, share: told.append(message),
    )
    expected = "captioner: 0 of 8 answers are empty, 8 are equal to one another ('a dog')"
    assert any(message.startswith(expected) for message in told) is is_alike


def test_a_folder_that_holds_something_is_refused(write_spec, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(DataError, match="not empty; choose another --out"):
        export_dense(write_spec(ONE_TEXT_ENCODER), tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]


WITH_LOOKUP = """\
name: search
inputs: {text: text}
nodes:
  sentence: {kind: text_encoder, source: ./clip, inputs: {text: text}}
  find: {kind: lookup, inputs: {query: sentence.embedding}}
outputs: {found: find.best}
"""


def test_a_lookup_without_texts_is_not_exported_with_drawn_ones(write_spec, tmp_path):
    with pytest.raises(SpecError, match=r"nodes\.find\.texts: name a file of texts, or `data`"):
        export_dense(write_spec(WITH_LOOKUP), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_text_is_given_as_it_is_or_by_a_file(write_spec, tmp_path, monkeypatch):
    bundle = tmp_path / "b"
    export_dense(write_spec(ONE_TEXT_ENCODER), bundle)
    (tmp_path / "q.txt").write_text("a red bar\n")
    monkeypatch.chdir(tmp_path)

    def predict(value):
        done = CliRunner().invoke(main, ["predict", str(bundle), "--input", f"text={value}"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout), done.stderr

    literal, told = predict("q.txt")
    assert "@q.txt reads the file" in told
    assert predict("a red bar " * 60)[1] == "", "longer than any name of a file"
    read, told = predict("@q.txt")
    assert read == predict("a red bar")[0] != literal and not told
    done = CliRunner().invoke(main, ["predict", str(bundle), "--input", "text=@none.txt"])
    assert done.exit_code == 2 and "none.txt: can't be read" in done.output
