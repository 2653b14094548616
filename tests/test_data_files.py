"""Lists, texts and sounds as people's files have them."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from mmcompress.data.folder import Folder
from mmcompress.data.open_dataset import open_dataset, read_lookup_texts
from mmcompress.data.speech_folder import SpeechFolder
from mmcompress.errors import DataError
from mmcompress.runtime.audio import open_audio
from mmcompress.spec.schema import Data


@pytest.fixture()
def write_folder(tmp_path):
    """`write_folder(listing, text)`: a folder of pictures a0 .. a39 with a list of that name."""

    def write(listing, text):
        for i in range(40):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"a{i}.png")
        (tmp_path / listing).write_bytes(text if isinstance(text, bytes) else text.encode())
        return Folder(path=str(tmp_path))

    return write


def load_all(data):
    return {text for split in data.splits for text in data.load(split).texts}


def list_rows(make, count=40):
    return "\n".join(make(i) for i in range(count))


def test_csv_keeps_commas_and_line_breaks_in_quotes(write_folder):
    rows = list_rows(lambda i: f'a{i}.png,"a dog, {i}\nin the ""park"""')
    data = write_folder("captions.csv", f"image,caption\n{rows}\n")
    assert load_all(data) == {f'a dog, {i}\nin the "park"' for i in range(40)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a0.png,a dog, in the park", r":2: more fields than names \(image, caption\).*quotes"),
        ("a0.png", r":2: too few fields, nothing for: caption"),
        ('a0.png,"never closed', r":2: no CSV: unexpected end of data"),
    ],
)
def test_a_csv_row_that_is_wrong_is_told_with_its_line(write_folder, row, message):
    with pytest.raises(DataError, match=message):
        load_all(write_folder("captions.csv", f"image,caption\n{row}\n"))


def test_a_csv_field_may_be_long(write_folder):
    rows = list_rows(lambda i: f"a{i}.png,{'w' * 140_000}{i}")
    assert len(load_all(write_folder("captions.csv", f"image,caption\n{rows}"))) == 40


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b", "\x0c"])
def test_a_line_ends_at_a_line_feed_alone(write_folder, tmp_path, mark):
    rows = list_rows(lambda i: f'{{"image": "a{i}.png", "caption": "one{mark}two {i}"}}')
    rows = rows.replace("\x0b", "\\u000b").replace("\x0c", "\\u000c")
    data = write_folder("captions.jsonl", rows.replace("\n", "\r\n"))
    assert load_all(data) == {f"one{mark}two {i}" for i in range(40)}
    (tmp_path / "list.txt").write_text(f"one{mark}two\nthree\n")
    assert read_lookup_texts(data, str(tmp_path / "list.txt")) == (f"one{mark}two", "three")


def test_a_list_that_is_not_utf8_is_told(write_folder):
    with pytest.raises(DataError, match=r"captions.csv:2: .* is not UTF-8.*save it as UTF-8"):
        load_all(
            write_folder("captions.csv", "image,caption\na0.png,stra\xdfe\n".encode("latin-1"))
        )


def test_pictures_of_one_name_in_many_folders_are_dealt_by_their_paths(tmp_path):
    rows = []
    for i in range(40):
        (tmp_path / f"sku{i}").mkdir()
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"sku{i}" / "main.jpg")
        rows.append(f'{{"image": "sku{i}/main.jpg", "caption": "thing {i}"}}')
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    data = Folder(path=str(tmp_path))
    assert {split: len(data.load(split)) > 0 for split in data.splits} == {
        "train": True,
        "val": True,
        "test": True,
    }


@pytest.fixture()
def clips(tmp_path):
    import soundfile

    (tmp_path / "wavs").mkdir()
    for i in range(12):
        soundfile.write(tmp_path / "wavs" / f"c{i}.wav", np.zeros(1600), 16_000)
    return tmp_path


def test_a_clip_that_is_listed_twice_is_refused(clips):
    rows = [*(f"c{i}|text {i}" for i in range(12)), "c3|text 3 again"]
    (clips / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"metadata.csv:13: c3 stands in line 4 already"):
        SpeechFolder(path=str(clips)).load("train")


def test_a_bar_inside_a_transcript_is_told(clips):
    (clips / "metadata.csv").write_text("\n".join(f"c{i}|one|two|three" for i in range(12)))
    with pytest.raises(DataError, match=r"metadata.csv:1: 4 fields, .* can't hold '\|'"):
        SpeechFolder(path=str(clips)).load("train")


WAVE = np.sin(np.arange(4000) / 9).astype(np.float32) * 0.5


@pytest.mark.parametrize(
    ("samples", "tolerance"),
    [
        (WAVE, 0.0),
        (WAVE.astype(np.float64), 1e-7),
        (WAVE.tolist(), 1e-7),
        (tuple(WAVE.tolist()), 1e-7),
        ((WAVE * 2**15).astype(np.int16), 2**-15),
        ((WAVE.astype(np.float64) * 2**31).astype(np.int32), 2**-23),
        ((WAVE * 128 + 128).astype(np.uint8), 2**-7),
        (np.stack([WAVE, WAVE], 1), 1e-7),
        (np.stack([WAVE, WAVE], 0), 1e-7),
        (np.stack([2 * WAVE, 0 * WAVE], 0), 1e-7),
    ],
)
def test_samples_of_any_type_and_shape_are_one_sound(samples, tolerance):
    opened = open_audio(samples)
    assert opened.dtype == np.float32 and opened.shape == WAVE.shape
    assert np.abs(opened - WAVE).max() <= tolerance


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_32", "PCM_U8"])
def test_whole_numbers_are_scaled_as_libsndfile_scales_them(tmp_path, subtype):
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, WAVE, 16_000, format="WAV", subtype=subtype)
    expected, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype="float32")
    kinds = {"PCM_16": "int16", "PCM_32": "int32", "PCM_U8": "int16"}
    raw, _ = soundfile.read(io.BytesIO(file.getvalue()), dtype=kinds[subtype])
    assert np.abs(open_audio(raw) - expected).max() < 1e-6
    file.seek(0)
    assert np.abs(open_audio(file) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.array([0.0, np.nan]), "not finite"),
        (np.array([0.0, np.inf]), "not finite"),
        (np.zeros((40, 50)), r"of shape \[40, 50\]: expected \[n\]"),
        (np.array(["a"]), "expected numbers"),
    ],
)
def test_samples_that_are_no_sound_are_told(samples, message):
    with pytest.raises(DataError, match=message):
        open_audio(samples)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "loop", "pipe"])
@pytest.mark.parametrize("kind", ["folder", "speech_folder"])
def test_a_name_that_no_file_can_have_is_told_with_its_line(kind, name, tmp_path):
    (tmp_path / "wavs").mkdir()
    for folder in (tmp_path, tmp_path / "wavs"):
        (folder / "loop.wav").symlink_to("loop.wav")
        os.mkfifo(folder / "pipe.wav")
    if kind == "folder":
        row = json.dumps({"image": f"{name}.wav", "caption": "a"})
        (tmp_path / "captions.jsonl").write_text(f"{row}\n", encoding="utf-8")
    else:
        (tmp_path / "metadata.csv").write_text(f"{name}|a\n", encoding="utf-8")
    dataset = open_dataset(Data(kind=kind, options={"path": str(tmp_path)}))
    with pytest.raises(DataError, match=r"(captions\.jsonl|metadata\.csv):1: ") as caught:
        dataset.load("val")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["folder", "speech_folder"])
def test_the_old_name_of_the_split_seed_is_read_with_a_warning(kind, tmp_path):
    def open_with(**options):
        return open_dataset(Data(kind=kind, options={"path": str(tmp_path), **options}))

    with pytest.warns(FutureWarning, match=r"'data\.options\.seed' is called .*split_seed"):
        dataset = open_with(seed=3)
    assert dataset == open_with(split_seed=3) and dataset.split_seed == 3
    with pytest.raises(DataError, match=r"data\.options\.seed"):
        open_with(seed=3, split_seed=3)
    assert open_dataset(Data(kind="emoji_scenes", options={"seed": 2})).seed == 2
