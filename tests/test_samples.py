"""Inputs of the test split in the report: which ones, how small, and who keeps them out."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from made_summary import make_summary
from PIL import Image

from mmcompress.data.base import Pairs
from mmcompress.data.shown_inputs import (
    MAX_CLIP_BYTES,
    MAX_CLIP_SECONDS,
    THUMBNAIL_SIDE,
    show_picture,
    show_sound,
)
from mmcompress.graph.load_spec import load_spec
from mmcompress.report.charts.waveform import draw_waveform
from mmcompress.report.formats import mark_words, write_cell
from mmcompress.report.page import write_report
from mmcompress.results.records import Sample, ShownInput
from mmcompress.run.answers import SplitAnswers
from mmcompress.run.select_samples import select_samples

REFERENCES = ("a fox", "an owl", "a key", "a bell")
DENSE = ("a fox", "a crab", "a key", "a bell")
COMPRESSED = ("a fox", "an owl", "a tent", "a bell")
"""The second was wrong and changed, the third was right and is lost."""


WAVEFORM_BAR = 'fill="#4c78a8"'


def decode(shown):
    head, _, content = shown.media.partition(",")
    return head, base64.b64decode(content)


@pytest.fixture()
def select(tiny):
    """`select(...)`: the samples of four pictures; settings are keys of the spec."""

    def select_with(inputs=None, modality="image", messages=(), **settings):
        pictures = [np.full((40, 200, 3), 60 * i, np.uint8) for i in range(4)]
        pairs = Pairs(inputs=inputs or pictures, texts=REFERENCES)
        run = SimpleNamespace(
            spec=load_spec(tiny / "spec.yaml", settings),
            data=SimpleNamespace(load=lambda split: pairs, modality=modality),
            on_progress=lambda stage, message, share: messages.append(message),
        )
        answers = {
            "baseline": SplitAnswers(scores={}, texts={"choose": DENSE}),
            "compressed": SplitAnswers(scores={}, texts={"choose": COMPRESSED}),
        }
        return select_samples(run, answers, split="test")

    return select_with


def test_lost_answers_stand_first_then_other_changes(select):
    samples = select()
    assert [sample.reference for sample in samples] == ["a key", "an owl", "a fox", "a bell"]
    assert [sample.is_changed for sample in samples] == [True, True, False, False]
    head, content = decode(samples[0].shown)
    assert head == "data:image/jpeg;base64"
    # It is the picture of that very pair.
    assert abs(float(np.asarray(Image.open(io.BytesIO(content))).mean()) - 120) < 3


def test_a_spec_says_how_many_are_shown(select):
    assert len(select(**{"report.samples": 1})) == 1
    assert select(**{"report.samples": "none"}) == ()
    assert select(**{"report.samples": 0}) == ()


def test_an_input_that_cannot_be_shown_costs_nothing_else(select):
    messages = []
    samples = select(inputs=["no picture"] * 4, messages=messages)
    assert len(samples) == 4 and not samples[0].shown.media and messages
    assert not select(modality="text")[0].shown.media


def test_a_picture_is_small_and_keeps_its_shape():
    shown = show_picture(np.random.default_rng(0).integers(0, 255, (400, 1000, 3), np.uint8))
    _, content = decode(shown)
    image = Image.open(io.BytesIO(content))
    assert image.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE * 400 // 1000)
    assert len(content) < 20_000


@pytest.mark.parametrize("seconds", [0.5, 8.0, 40.0])
def test_a_sound_can_be_played_and_is_small(seconds):
    noise = np.random.default_rng(0).normal(0, 0.2, int(16_000 * seconds)).astype(np.float32)
    noise[: len(noise) // 2] *= 0.1
    shown = show_sound(noise)
    head, content = decode(shown)
    assert head == "data:audio/mpeg;base64" and len(content) <= MAX_CLIP_BYTES
    samples, rate = soundfile.read(io.BytesIO(content))
    assert rate == 16_000
    assert len(samples) / rate == pytest.approx(shown.shown_seconds, abs=0.1)
    assert shown.seconds == pytest.approx(seconds)
    assert shown.shown_seconds <= min(MAX_CLIP_SECONDS, seconds)
    middle = len(shown.peaks) // 2
    assert max(shown.peaks[: middle - 1]) < min(shown.peaks[middle + 1 :])
    assert draw_waveform(shown.peaks).count(WAVEFORM_BAR) == len(shown.peaks)


def test_silence_and_nothing_have_a_waveform_too():
    assert show_sound(np.zeros(1600, np.float32)).peaks
    assert draw_waveform((0.0, 0.0)).count(WAVEFORM_BAR) == 2
    assert draw_waveform(()) == ""


def test_words_that_only_one_side_wrote_are_marked():
    assert mark_words("a red fox", "a fox", "ins") == "a <ins>red</ins> fox"
    assert mark_words("a fox", "a fox", "ins") == "a fox"
    assert mark_words("", "a fox", "ins") == ""
    assert mark_words("a <b>", "a", "del") == "a <del>&lt;b&gt;</del>"
    # A comma is no part of the word before it.
    assert mark_words("a bulb, above it", "a bulb above it", "ins") == "a bulb<ins>,</ins> above it"
    assert mark_words("a b, a c", "a b", "ins") == "a b<ins>, a c</ins>"
    assert write_cell("a | b\nc") == "a \\| b c"


def test_the_report_shows_inputs_and_says_so_at_its_top(tmp_path):
    sound = ShownInput(
        media="data:audio/mpeg;base64,AAAA", peaks=(0.1, 0.9), seconds=30.0, shown_seconds=9.0
    )
    samples = (
        Sample(
            reference="a fox",
            baseline="a fox",
            compressed="a <cat>",
            shown=ShownInput(media="data:image/jpeg;base64,BBBB"),
        ),
        Sample(reference="x", baseline="y", compressed="y", shown=sound),
    )
    page = write_report(make_summary(samples=samples), tmp_path).read_text()
    head, _, rest = page.partition("<h2>Before and after</h2>")
    assert "holds 2 inputs of the data" in head
    assert '<img src="data:image/jpeg;base64,BBBB" alt="input 1"' in rest
    assert 'src="data:audio/mpeg;base64,AAAA"' in rest and "the first 9 of 30 s" in rest
    assert "<ins>&lt;cat&gt;</ins>" in rest and "<del>fox</del>" in rest
    assert "| a fox | a fox | a <cat> |" in (tmp_path / "report.md").read_text()
    bare = write_report(make_summary(samples=()), tmp_path / "bare").read_text()
    assert "of your data" not in bare and "<img" not in bare


def test_a_summary_keeps_its_samples(tmp_path):
    from mmcompress.storage import write_record
    from mmcompress.workspace.load_summary import load_summary

    shown = ShownInput(media="data:image/jpeg;base64,BBBB")
    sample = Sample(reference="a", baseline="b", compressed="c", shown=shown)
    summary = replace(make_summary(), samples=(sample,))
    write_record(tmp_path / "summary.json", summary)
    assert load_summary(tmp_path).samples == (sample,)
