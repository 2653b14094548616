"""A generator that reads an encoder of another checkpoint: it runs, and somebody should be told."""

from __future__ import annotations

import shutil

import pytest
from click.testing import CliRunner
from library_checkpoints import save_blip

from mmcompress.cli.validate import validate_command
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.foreign_encoders import describe_foreign_encoders
from mmcompress.models.sources import check_models

SPEC = """\
name: blip
inputs: {{image: image}}
nodes:
  vision:
    kind: image_encoder
    source: {vision}
    inputs: {{image: image}}
  captioner:
    kind: text_decoder
    source: {captioner}
    inputs: {{context: vision.tokens}}
outputs: {{caption: captioner.text}}
data: {{kind: emoji_scenes}}
metrics: [caption]
target: 1.5x
"""


@pytest.fixture(scope="module")
def blips(tmp_path_factory):
    """The same BLIP in two folders: their widths fit, and only one pair was trained together."""
    folder = tmp_path_factory.mktemp("blips")
    save_blip(folder / "one")
    shutil.copytree(folder / "one", folder / "other")
    return folder


def write_spec(folder, vision, captioner):
    path = folder / f"{vision.name}-{captioner.rpartition('/')[2]}.yaml"
    path.write_text(SPEC.format(vision=vision, captioner=captioner))
    return path


def describe(path):
    spec = load_spec(path)
    return describe_foreign_encoders(spec, check_models(spec))


def test_an_encoder_of_another_checkpoint_is_told(blips):
    path = write_spec(blips, blips / "one", str(blips / "other"))
    [sentence] = describe(path)
    assert sentence.startswith(
        "captioner reads the tokens of vision, which is of another checkpoint"
    )
    assert str(blips / "one") in sentence and str(blips / "other") in sentence
    done = CliRunner().invoke(validate_command, [str(path)])
    assert done.exit_code == 0, done.output
    assert "another checkpoint" in done.output.replace("\n", " ")


def test_the_same_checkpoint_is_known_by_every_name_of_it(blips):
    assert describe(write_spec(blips, blips / "one", str(blips / "one"))) == []
    named = f"transformers:{blips / 'one'}"
    assert describe(write_spec(blips, blips / "one", named)) == []


def test_a_decoder_that_stands_alone_may_read_any_encoder():
    assert describe("pipelines/clip_captioner.yaml") == []
