"""Datasets: deterministic, honest splits; clear errors for odd files."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mmcompress.data.check_data import describe_shortage
from mmcompress.data.emoji_scenes import EMOJI_NAMES, VENDORS, EmojiScenes, load_drawing
from mmcompress.data.folder import Folder
from mmcompress.data.open_dataset import open_dataset
from mmcompress.errors import DataError
from mmcompress.graph.load_spec import load_spec
from mmcompress.runtime.images import open_image, preprocess_image
from mmcompress.spec.schema import Data

DATA = EmojiScenes(image_size=32)


def scenes(split, count=300, seed=0):
    return list(itertools.islice(DATA.generate_scenes(split, seed), count))


def test_every_emoji_is_drawn_by_both_vendors():
    assert len(EMOJI_NAMES) >= 96 and len(set(EMOJI_NAMES)) == len(EMOJI_NAMES)
    for i, v in itertools.product(range(len(EMOJI_NAMES)), range(len(VENDORS))):
        assert load_drawing(i, v, side=12)[..., 3].max() > 0.5


def test_scenes_are_a_function_of_split_and_seed():
    a, b, c = DATA.load("test", 6), DATA.load("test", 6), DATA.load("train", 6, seed=1)
    assert a.texts == b.texts and all(
        np.array_equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True)
    )
    assert a.texts != c.texts


@pytest.mark.slow
def test_no_combination_is_shared_between_splits():
    sets = {s: {tuple(sorted(x.emoji)) for x in scenes(s, 400)} for s in ("train", "val", "test")}
    for a, b in itertools.combinations(sets, 2):
        assert not sets[a] & sets[b]


@pytest.mark.slow
def test_held_out_drawings_are_seen_only_in_their_split():
    held = DATA.list_held_out_drawings()
    assert len(held) >= 4
    for split in ("train", "val", "test"):
        assert not any(
            p in held for s in scenes(split) for p in zip(s.emoji, s.vendor, strict=True)
        )
    assert all(
        any(p in held for p in zip(s.emoji, s.vendor, strict=True))
        for s in scenes("test_style", 60)
    )
    crowds = itertools.islice(DATA.generate_crowds(), 100)
    assert not any(p in held for s in crowds for p in zip(s.emoji, s.vendor, strict=True))


def test_captions_say_what_is_where():
    for s in scenes("train", 200):
        if len(s.emoji) < 2:
            continue
        a, b = s.boxes[0], s.boxes[1]
        first = s.caption.split(",")[0]
        assert (a[0] < b[0]) if "left of" in first else (a[1] < b[1])
        if len(s.emoji) == 3:
            axis = 0 if "left of" in s.caption.split(",")[1] else 1
            assert s.boxes[1][axis] < s.boxes[2][axis]


def test_test_captions_are_distinct():
    captions = DATA.load("test", 200).texts
    assert len(set(captions)) == 200


def test_unknown_split_and_option():
    with pytest.raises(DataError, match="no split 'tst'"):
        DATA.load("tst", 1)
    with pytest.raises(DataError, match="unknown key 'sise'"):
        open_dataset(Data(kind="emoji_scenes", options={"sise": 3}))


@pytest.fixture()
def photos(tmp_path):
    rows = []
    for i in range(30):
        Image.new("RGB", (20 + i, 16), (i * 8, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(
            {"image": f"{i}.png", "caption": f"shade {i}", "split": ("train", "val", "test")[i % 3]}
        )
    return tmp_path, rows


def listing(folder, rows):
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    return Folder(path=str(folder))


def test_folder_reads_jsonl_and_csv(photos):
    folder, rows = photos
    pairs = listing(folder, rows).load("test")
    assert len(pairs) == 10 and pairs.texts[0] == "shade 2" and pairs.inputs[0].shape == (16, 22, 3)
    (folder / "captions.jsonl").unlink()
    (folder / "captions.csv").write_text(
        "file_name,text,split\n"
        + "\n".join(f"{r['image']},{r['caption']},{r['split']}" for r in rows)
    )
    assert Folder(path=str(folder), split_seed=1).load("test").texts == pairs.texts
    assert [len(part) for part in (pairs.inputs[2:5], pairs.inputs[:])] == [3, 10]


def test_folder_tells_every_missing_and_broken_image(photos):
    folder, rows = photos
    (folder / "3.png").unlink()
    (folder / "4.png").write_bytes(b"")
    (folder / "5.png").write_text("not an image")
    with pytest.raises(
        DataError,
        match=r"3 images can't be used:(.|\n)*:4: .*3.png: no such image(.|\n)*4.png.*0 bytes",
    ):
        listing(folder, rows).load("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "0.png"}', r"captions.jsonl:1: no 'caption'"),
        ('{"image": "0.png", "caption": "a"', r"captions.jsonl:1: not a JSON object"),
        ('["0.png"]', r"expected a JSON object"),
        ('{"image": "0.png", "caption": ["a", "b"]}', r"'caption' is a list; one caption a row"),
        ('{"image": "0.png", "caption": "a", "split": "dev"}', r"unknown split 'dev'"),
        (
            '{"image": "0.png", "caption": "a", "split": "test"}',
            r"no pair in split train, val \(0 in train, 0 in val, 1 in test\)",
        ),
    ],
)
def test_folder_tells_what_is_odd_in_the_listing(photos, text, message):
    folder, _ = photos
    (folder / "captions.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        Folder(path=str(folder)).load("train")


def test_an_image_with_several_captions_is_refused_or_its_first_one_read(photos):
    folder, rows = photos
    again = [*rows, {"image": "0.png", "caption": "another", "split": "test"}]
    with pytest.raises(
        DataError, match=r"1 image can't be used:(.|\n)*:31: 0.png stands in line 1 already"
    ):
        listing(folder, again).load("train")
    first = Folder(path=str(folder), repeats="first")
    assert (
        first.count_pairs() == {"train": 10, "val": 10, "test": 10}
        and "another" not in first.load("test").texts
    )


def test_folder_without_a_listing_or_without_itself(tmp_path):
    with pytest.raises(DataError, match=r"none of captions\.jsonl"):
        Folder(path=str(tmp_path)).load("train")
    (tmp_path / "photographs").mkdir()
    for name, hint in (
        ("no", "$"),
        ("photograph", "; did you mean '.*/photographs'\\?$"),
        ("a/b", "; there is no '.*/a' either$"),
    ):
        with pytest.raises(DataError, match=f"no such folder{hint}"):
            Folder(path=str(tmp_path / name)).load("train")


def test_preprocessing_takes_any_kind_of_image(tmp_path):
    config = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    for mode in ("RGB", "L", "RGBA", "P", "1", "I;16"):
        for resize in ("shortest", "longest", "squash"):
            x = preprocess_image(Image.new(mode, (13, 30)), {**config, "resize_mode": resize})
            assert x.shape == (3, 8, 8) and x.dtype == np.float32
    assert np.asarray(open_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))).min() == 255
    with pytest.raises(DataError, match="not a readable image"):
        open_image(b"\x89PNG broken")


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"train": 300, "val": 300, "test": 200}, ""),
        (
            {"train": 50, "val": 300, "test": 200},
            "fewer pairs than the spec would use: 50 of 256 in train; 200 in test",
        ),
        (
            {"train": 300, "val": 300, "test": 25},
            "25 in test; percentages of so few are uncertain by up to 20 points either way: add pairs",
        ),
    ],
)
def test_splits_of_few_pairs_are_told(tiny, counts, told):
    spec = load_spec(tiny / "spec.yaml", {"data.calibration": 256, "data.validation_pairs": 256})
    assert describe_shortage(spec, SimpleNamespace(count_pairs=lambda: counts)) == told
