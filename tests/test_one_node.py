"""Lines of text as data, which a pipeline of one text encoder is compressed on."""

from __future__ import annotations

import pytest

from mmcompress.data.text_lines import TextLines
from mmcompress.errors import DataError


def test_a_line_ends_at_a_line_feed_and_stays_in_its_split(tmp_path):
    file = tmp_path / "lines.txt"
    lines = [f"line {i} with a \u2028 inside" for i in range(40)]
    file.write_bytes("\n".join([*lines, "", lines[0], "windows\r"]).encode())
    data = TextLines(path=str(file))
    splits = {split: set(data.load(split).texts) for split in data.splits}
    assert set().union(*splits.values()) == {*lines, "windows"}
    assert sum(len(texts) for texts in splits.values()) == 41
    with file.open("a") as out:
        out.write("\nanother line")
    more = TextLines(path=str(file), seed=0)
    assert data.assign_split(lines[3]) == more.assign_split(lines[3])


def test_a_file_that_is_not_utf8_is_told(tmp_path):
    (tmp_path / "lines.txt").write_bytes("stra\xdfe\n".encode("latin-1") * 9)
    with pytest.raises(DataError, match=r"is not UTF-8.*save it as UTF-8"):
        TextLines(path=str(tmp_path / "lines.txt")).load("train")
