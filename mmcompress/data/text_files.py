"""Text files of the user: UTF-8, lines that end at \\n alone, and rows of CSV and JSONL.

`str.splitlines` also cuts at U+2028, U+0085 and other marks that may stand inside a text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmcompress.errors import DataError, shorten
from mmcompress.storage import read_text_file

Fields = Mapping[str, object]
"""The values of a row, by the name of their column."""


def split_lines(text: str) -> list[str]:
    """Split a text into lines that end at \\n or \\r\\n and at nothing else."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def check_characters(text: str, *, place: str) -> None:
    """Check that a text can be written as UTF-8.

    Args:
        text: The text.
        place: Where it stands, for the message.

    Raises:
        DataError: Half of a surrogate pair is in it, which only an escape of JSON can bring.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(
            f"{place}: \\u{code:04x} is half of a character: write both halves, or the character"
        ) from None


def read_jsonl_rows(path: Path) -> list[tuple[int, Fields]]:
    """Read the rows of a JSONL file; blank lines do not count.

    Returns:
        The number of the line and its object, for every row.

    Raises:
        DataError: The file can't be read, or a line is no JSON object.
    """
    rows: list[tuple[int, Fields]] = []
    for line_number, line in enumerate(split_lines(read_text_file(path)), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line, object_pairs_hook=_take_each_name_once)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line_number}: not a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{line_number}: expected a JSON object, got {shorten(fields)}")
        rows.append((line_number, fields))
    return rows


def _take_each_name_once(pairs: list[tuple[str, object]]) -> Fields:
    """Return the fields of a JSON object; JSON itself would keep the last one of a name.

    Raises:
        ValueError: A name stands there twice.
    """
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated_name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{shorten(repeated_name)}' stands there twice")
    return fields


def read_csv_rows(path: Path) -> list[tuple[int, Fields]]:
    """Read the rows of a CSV file with names in its first row; blank lines do not count.

    A text with commas, quotes or line breaks stands in double quotes (RFC 4180).

    Returns:
        The number of the line where it begins and its fields, for every row.

    Raises:
        DataError: The file can't be read, or a row has more or fewer fields than there are names.
    """
    numbered_rows = list(_parse_csv(read_text_file(path), path=path))
    if not numbered_rows:
        return []
    first_line, header = numbered_rows[0]
    names = [name.strip() for name in header]
    _refuse_repeated_names(names, place=f"{path}:{first_line}")
    rows: list[tuple[int, Fields]] = []
    for line_number, values in numbered_rows[1:]:
        place = f"{path}:{line_number}"
        if len(values) > len(names):
            raise DataError(
                f"{place}: more fields than names ({', '.join(names)}): put a text with commas in "
                f"double quotes (got {len(values)} fields)"
            )
        if len(values) < len(names):
            missing = ", ".join(names[len(values) :])
            raise DataError(f"{place}: too few fields, nothing for: {missing}")
        rows.append((line_number, dict(zip(names, values, strict=True))))
    return rows


def _parse_csv(text: str, *, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line where a row begins and its values, or raise `DataError`."""
    # a file without line breaks is one field at most
    limit_before = csv.field_size_limit(max(len(text), 1))
    # newline="\n" ends lines at \n alone and leaves \r to the reader, which drops it at an end
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    first_line = 1
    try:
        for values in reader:
            if values:
                yield first_line, values
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{first_line}: no CSV: {error}; a double quote within quotes is written twice"
        ) from error
    finally:
        csv.field_size_limit(limit_before)


def _refuse_repeated_names(names: list[str], *, place: str) -> None:
    """Raise `DataError` when two columns have the same name; columns without a name may be many."""
    repeated_names = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if repeated_names:
        raise DataError(f"{place}: several columns are named {', '.join(repeated_names)}")
