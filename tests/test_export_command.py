"""`mmcompress export`: the dense pipeline as a bundle, without data, metrics or a target."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from mmcompress.cli import main
from mmcompress.errors import DataError
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


def test_a_folder_that_holds_something_is_refused(write_spec, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(DataError, match="not empty; choose another --out"):
        export_dense(write_spec(ONE_TEXT_ENCODER), tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]
