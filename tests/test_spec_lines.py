"""Errors of models and data name the file and line of the spec that they come from."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from mmcompress.cli import main
from mmcompress.errors import DataError, DiskFull, ModelError
from mmcompress.spec.name_lines import name_spec_lines
from mmcompress.workspace.context import open_run


def find_line(path, text):
    """Return the number of the line that holds a text."""
    return 1 + next(i for i, line in enumerate(path.read_text().splitlines()) if text in line)


@pytest.fixture()
def broken(tiny, tmp_path):
    """A spec whose captioner is not there."""
    text = (tiny / "spec.yaml").read_text().replace("./clip", f"{tiny}/clip")
    path = tmp_path / "spec.yaml"
    path.write_text(text.replace("source: ./captioner", "source: ./nowhere"))
    return path


def test_a_missing_model_is_named_with_its_line(broken, tmp_path):
    line = find_line(broken, "./nowhere")
    with pytest.raises(
        ModelError, match=rf"spec\.yaml:{line}: nodes\.captioner: source '.*nowhere"
    ):
        open_run(broken, tmp_path / "r")
    told = CliRunner().invoke(main, ["validate", str(broken)])
    assert told.exit_code == 2 and f"spec.yaml:{line}: nodes.captioner" in told.stderr


def test_a_model_of_an_override_is_named_with_its_option(tiny, tmp_path):
    overrides = {"nodes.text.source": "./elsewhere"}
    with pytest.raises(
        ModelError, match=r"spec\.yaml \(--set nodes\.text\.source\): nodes\.text: "
    ):
        open_run(tiny / "spec.yaml", tmp_path / "r", overrides=overrides)


def test_an_option_of_the_data_is_named_with_its_line(tiny, tmp_path):
    path = tmp_path / "spec.yaml"
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    path.write_text(text.replace("image_size: 32", "image_sise: 32"))
    line = find_line(path, "image_sise")
    with pytest.raises(DataError, match=rf"spec\.yaml:{line}: data\.options"):
        open_run(path, tmp_path / "r")


@pytest.mark.parametrize(
    "error",
    [ModelError("weights.safetensors: torn"), DiskFull("/runs/data: no room"), ValueError("x")],
)
def test_what_names_no_key_stays_as_it_is(tiny, error):
    with pytest.raises(type(error)) as caught, name_spec_lines(tiny / "spec.yaml", None):
        raise error
    assert caught.value is error
