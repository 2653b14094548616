"""A bundle of every earlier format is read, and answers as it did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcompress.runtime.bundle import BUNDLE_FORMAT, READABLE_FORMATS, read_manifest
from mmcompress.runtime.graph import load_bundle

FOLDER = Path(__file__).parent / "earlier_bundles"
BUNDLES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def draw_picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_every_readable_format_has_a_bundle():
    formats = {read_manifest(FOLDER / name)["format"] for name in BUNDLES}
    assert formats == set(READABLE_FORMATS) and max(formats) == BUNDLE_FORMAT


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_answers_as_the_version_that_wrote_it(name):
    pipeline = load_bundle(FOLDER / name)
    expected = json.loads((FOLDER / f"{name}.answers.json").read_text())
    assert len(expected) == 3
    for seed, answers in enumerate(expected):
        found = pipeline(image=draw_picture(seed))
        assert set(found) == set(answers)
        for output, answer in answers.items():
            if isinstance(answer, str):
                assert found[output] == answer, (seed, output)
            else:
                assert np.ravel(found[output]) == pytest.approx(answer, abs=1e-4)
