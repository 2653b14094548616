"""Lists of the user: quoting, line ends, encodings, rows that don't fit, and what leaks into two splits."""

from __future__ import annotations

import ast
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcompress.data.folder import Folder
from mmcompress.data.open_dataset import open_dataset, read_lookup_texts
from mmcompress.data.speech_folder import SpeechFolder
from mmcompress.data.text_files import read_csv_rows, read_jsonl_rows, split_lines
from mmcompress.data.text_lines import TextLines
from mmcompress.errors import DataError
from mmcompress.spec.schema import Data
from mmcompress.storage import read_text_file

ROOT = Path(__file__).resolve().parents[1]

ODD_CAPTIONS = [
    "a dog, asleep, on a mat",
    "two lines\nof one caption",
    'it says "stop"',
    "a\u2028b\u0085c\x0bd\x0ce",
    "Straße naïve 你好 🚲",
    "x" * 200_000,
    " kept | bar ",
]


def write_images(folder: Path, names: list[str]) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(folder / name)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_caption_comes_back_from_csv_and_jsonl(tmp_path, line_end, mark):
    rows = [{"image": f"{i}.png", "caption": text} for i, text in enumerate(ODD_CAPTIONS)]
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        writer = csv.DictWriter(file, ["image", "caption"], lineterminator=line_end)
        writer.writeheader()
        writer.writerows(rows)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = mark + line_end.join(lines) + line_end
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    # CSV says the line at which a row begins: the second caption takes two of them
    assert read_csv_rows(tmp_path / "a.csv") == list(zip([2, 3, 5, 6, 7, 8, 9], rows, strict=True))
    assert [fields for _, fields in read_jsonl_rows(tmp_path / "a.jsonl")] == rows
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,caption\n0.png,a dog, asleep\n",
            r"a\.csv:2: more fields than names .*double quotes",
        ),
        ("image,caption,split\n\n0.png,a dog\n", r"a\.csv:3: too few fields, nothing for: split"),
        ('image,caption\n0.png,"a\nb"\n1.png\n', r"a\.csv:4: too few fields"),
        ('image,caption\n0.png,"never closed\n1.png,b\n', r"a\.csv:2: no CSV: unexpected end"),
        ('image,caption\n0.png,"a" dog\n', r"a\.csv:2: no CSV: .*written twice"),
        ("image,caption,caption\n0.png,a,b\n", r"a\.csv:1: several columns are named caption"),
    ],
)
def test_a_row_that_does_not_fit_is_told_with_its_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_csv_rows(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "0.png", "caption": "a", "caption": "b"}', "'caption' stands there twice"),
        ('{"image": "0.png", "more": {"a": 1, "a": 1}}', "'a' stands there twice"),
        (f"[{'0, ' * 5000}0]", r"expected a JSON object, got \[0.* letters\)$"),
    ],
)
def test_a_json_line_that_says_two_things_is_told(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(f"\n{text}\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        read_jsonl_rows(tmp_path / "a.jsonl")


def test_half_a_character_is_refused(tmp_path):
    write_images(tmp_path, ["0.png"])
    (tmp_path / "captions.jsonl").write_text('{"image": "0.png", "caption": "a \\ud83d"}\n')
    with pytest.raises(DataError, match=r"captions\.jsonl:1: \\ud83d is half of a character"):
        Folder(path=str(tmp_path)).load("train")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            "one\nthe caf\xe9 door\n".encode("latin-1"),
            r"a\.txt:2: can't be read: it is not UTF-8: byte 0xe9 in 'one\\nthe café door' as latin-1; save it as UTF-8, .*iconv -f latin1",
        ),
        (
            "one\n".encode("utf-16"),
            r"a\.txt: can't be read: it is not UTF-8 but UTF-16; .*iconv -f utf-16",
        ),
        ("\ufeffone\n\n".encode() + b"\xff", r"a\.txt:3: can't be read: it is not UTF-8"),
    ],
)
def test_another_encoding_is_told_with_its_place_and_cure(tmp_path, raw, message):
    (tmp_path / "a.txt").write_bytes(raw)
    for read in (
        lambda: read_text_file(tmp_path / "a.txt"),
        lambda: TextLines(path=str(tmp_path / "a.txt")).load("train"),
        lambda: read_lookup_texts(open_dataset(Data(kind="drawn")), str(tmp_path / "a.txt")),
    ):
        with pytest.raises(DataError, match=message):
            read()


def test_lines_end_at_line_feeds_alone(tmp_path):
    assert split_lines("a\u2028b\r\nc\x0bd\n\ne\u0085f") == ["a\u2028b", "c\x0bd", "", "e\u0085f"]
    (tmp_path / "list.txt").write_bytes("a\u2028b\r\nc\u0085d\n".encode())
    texts = read_lookup_texts(open_dataset(Data(kind="drawn")), str(tmp_path / "list.txt"))
    assert texts == ("a\u2028b", "c\u0085d")


def write_talk(folder: Path, lines: list[str], clips: int = 10) -> SpeechFolder:
    soundfile = pytest.importorskip("soundfile")
    (folder / "wavs").mkdir(parents=True)
    for i in range(clips):
        soundfile.write(folder / "wavs" / f"c{i}.wav", np.full(800, 0.1 + i / 100), 16_000)
    (folder / "metadata.csv").write_bytes("\n".join(lines).encode())
    return SpeechFolder(path=str(folder))


def load_all(data: SpeechFolder | Folder) -> dict[str, str]:
    texts = {}
    for split in data.splits:
        pairs = data.load(split)
        texts.update(zip(pairs.names, pairs.texts, strict=True))
    return texts


def test_a_bar_does_not_move_a_transcript(tmp_path):
    lines = [f"c{i}|say {i} | now" for i in range(10)]
    two = write_talk(tmp_path / "two", [*lines[:5], *(f"c{i}|say\u2028{i}" for i in range(5, 10))])
    with pytest.raises(
        DataError,
        match=r":1: the lines differ in their columns \(2 in line 6, 3 in line 1\); .*columns: 2",
    ):
        two.load("train")
    texts = load_all(SpeechFolder(path=two.path, columns=2))
    assert texts["c3.wav"] == "say 3 | now" and texts["c7.wav"] == "say\u20287"
    three = write_talk(tmp_path / "three", [f"c{i}|No. {i}|number {i}" for i in range(10)])
    assert load_all(three)["c4.wav"] == "number 4"
    lacking = write_talk(tmp_path / "lacking", [f"c{i}|No. {i}|" for i in range(10)])
    assert load_all(lacking)["c4.wav"] == "No. 4"
    four = write_talk(tmp_path / "four", ["c0|a|b|c", *(f"c{i}|a|b" for i in range(1, 10))])
    with pytest.raises(DataError, match=r":1: the lines differ"):
        four.load("train")
    with pytest.raises(
        DataError, match=r":1: 4 fields, expected 3: with 3, a transcript can't hold '\|'"
    ):
        SpeechFolder(path=four.path, columns=3).load("train")


def test_a_clip_listed_twice_is_refused_or_its_first_line_read(tmp_path):
    lines = [f"c{i}|say {i}" for i in range(10)]
    twice = write_talk(tmp_path / "a", [*lines, "./c3.wav|other", "../wavs/c4|other"])
    with pytest.raises(
        DataError,
        match=r"2 sound files can't be used:(.|\n)*:11: ./c3.wav stands in line 4 already(.|\n)*:12: ",
    ):
        twice.load("train")
    first = SpeechFolder(path=twice.path, repeats="first")
    once = write_talk(tmp_path / "b", lines)
    assert load_all(first) == load_all(once)
    # the deal of a list without repeats is what it was
    assert [first.load(s).names for s in first.splits] == [once.load(s).names for s in once.splits]


def test_images_of_one_file_name_are_dealt_by_their_path(tmp_path):
    names = [f"sku{i}/main.jpg" for i in range(60)] + [f"sku{i}/{i}.jpg" for i in range(20)]
    write_images(tmp_path, names)
    rows = [json.dumps({"image": name, "caption": f"shade {name}"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    data = Folder(path=str(tmp_path))
    counts = {}
    for split in data.splits:
        loaded = data.load(split).names
        counts[split] = sum(name.endswith("main.jpg") for name in loaded)
        # an image whose file name is its own is dealt by it, as before
        own = [name for name in loaded if not name.endswith("main.jpg")]
        assert all(data.assign_split(Path(name).name) == split for name in own)
    assert counts["train"] in range(40, 57) and counts["val"] and counts["test"]


def test_one_image_by_two_spellings_is_one_image(tmp_path):
    write_images(tmp_path, [f"a/{i}.png" for i in range(30)])
    rows = [
        {"image": f"a/{i}.png", "caption": "x", "split": ("train", "val", "test")[i % 3]}
        for i in range(30)
    ]
    rows.append({"image": "a/../a/0.png", "caption": "x", "split": "test"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r":31: 0\.png stands in line 1 already"):
        Folder(path=str(tmp_path)).load("train")


BINARY_OPENERS = {"Image", "reader", "os"}


def list_calls_without_encoding(path: Path) -> list[int]:
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        owner = getattr(getattr(function, "value", None), "id", "")
        values = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        is_binary = any(isinstance(value, str) and "b" in value for value in values[:2])
        keywords = {keyword.arg for keyword in node.keywords}
        is_text = name in ("read_text", "write_text", "open", "fdopen")
        is_text = is_text or ("text" in keywords and name == "run")
        if is_text and owner not in BINARY_OPENERS and not is_binary and "encoding" not in keywords:
            lines.append(node.lineno)
    return lines


@pytest.mark.slow
def test_no_text_is_read_or_written_in_the_encoding_of_the_locale():
    places = []
    for path in sorted((ROOT / "mmcompress").rglob("*.py")):
        places += [f"{path.relative_to(ROOT)}:{line}" for line in list_calls_without_encoding(path)]
    assert places == []


def run_under_ascii(arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run the command line where the locale is ASCII and Python's own remedies are off."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import locale, sys; assert locale.getencoding() == 'ANSI_X3.4-1968', locale.getencoding();"
        "from mmcompress.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, env=environment, cwd=ROOT, check=False)


def test_a_spec_is_read_and_told_of_under_a_locale_of_ascii(tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text(encoding="utf-8").replace("./", f"{tiny}/")
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"\ufeff# Straße 你好\n{text}".replace("vision:", "vísion:"), encoding="utf-8")
    done = run_under_ascii(["validate", str(spec)])
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"error:" in done.stderr
    spec.write_bytes(f"# Stra\xdfe\n{text}".encode("latin-1"))
    done = run_under_ascii(["validate", str(spec)])
    assert done.returncode == 2
    assert rb"spec.yaml:1: can't be read: it is not UTF-8: byte 0xdf in '# Stra\xdfe" in done.stderr
