"""Records as JSON: made of plain data with every value checked, and written whole or not at all.
Texts of the user: read as UTF-8 on every machine.

A record is a frozen dataclass. pydantic checks plain data against its type hints; what is wrong
comes back as a list of `Problem`, each with the path to the value. `mmcompress.runtime` must not
import this module: a device that only runs bundles has no pydantic.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import stat
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from mmcompress.errors import (
    DataError,
    MmcompressError,
    find_disk_error,
    make_disk_error,
    shorten,
    suggest_nearest,
)

RecordType = TypeVar("RecordType")
"""A dataclass."""

PlainType = TypeVar("PlainType", dict[str, Any], list[Any])
"""What JSON holds at its root."""

UNFINISHED_SUFFIX = ".new"
"""Ends the name of a file or folder that is being written."""

DAMAGED_SUFFIX = ".damaged"
"""Behind the name of a file that can't be read and was set aside."""

REMADE_SEQUEL = "it is made again where it is needed"
"""What becomes of a file that was set aside."""

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""The first bytes of a file in UTF-16, as some editors write it."""

SHOWN_BYTES = 12
"""Bytes shown on either side of one that is not UTF-8."""

MIN_FREE_BYTES = 64 * 1024
"""Bytes: a disk with less room counts as full when something goes wrong with writing."""

HOLDS_OTHER_KEYS = "holds other keys"
"""Metadata of a field whose entries stand in JSON beside the keys of its record. The record itself
says what these are."""

RECORD_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""How records are checked: unknown keys are errors; the string under a field describes it."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with plain data."""

    path: tuple[str, ...]
    """Keys from the root to the value."""
    message: str
    """What is wrong with it."""


MAX_SHOWN_PROBLEMS = 4
"""Problems that a message shows. A record of another version has one for every key that changed."""


class InvalidValue(Exception):
    """Plain data that does not fit its record."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__(problems)

    def add_parent_keys(self, *keys: str) -> InvalidValue:
        """Return the same error for data that stands at some keys of a larger whole."""
        return InvalidValue(
            [Problem(path=(*keys, *p.path), message=p.message) for p in self.problems]
        )

    def __str__(self) -> str:
        shown_problems = self.problems[:MAX_SHOWN_PROBLEMS]
        parts = [": ".join(filter(None, (".".join(p.path), p.message))) for p in shown_problems]
        if len(self.problems) > MAX_SHOWN_PROBLEMS:
            parts.append(f"and {len(self.problems) - MAX_SHOWN_PROBLEMS} more")
        return "; ".join(parts)


@cache
def _make_adapter(record_type: Any) -> TypeAdapter[Any]:
    """Return the checker of a record type.

    It checks a list of one record: pydantic takes a configuration for a list, not for a bare
    dataclass.
    """
    return TypeAdapter(tuple[record_type], config=RECORD_CONFIG)


BOUND_ERRORS = ("greater_than", "greater_than_equal", "less_than_equal")
"""What pydantic calls a number out of its bounds."""

TYPES_IN_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
"""Types of values, for a person."""


def build_record(record_type: type[RecordType], data: Any) -> RecordType:
    """Make a record of plain data.

    Args:
        record_type: A dataclass; its fields may be records themselves.
        data: Mappings, lists, texts and numbers, as JSON or YAML give them.

    Returns:
        The record.

    Raises:
        InvalidValue: Keys are unknown or missing, or values don't fit; all of it at once.
    """
    if not isinstance(data, dict):
        raise InvalidValue(
            [Problem(path=(), message=f"expected a mapping, got {shorten(repr(data))}")]
        )
    try:
        text = json.dumps([data], default=str)
        record: RecordType = _make_adapter(cast(Hashable, record_type)).validate_json(
            text, strict=True
        )[0]
    except ValidationError as error:
        raise InvalidValue(_list_problems(record_type, error)) from None
    return record


def describe_record(record_type: type) -> dict[str, Any]:
    """Return the JSON Schema of a record type, every field described by the string under it."""
    schema = _make_adapter(record_type).json_schema()
    definitions = schema["$defs"]
    root = definitions.pop(record_type.__name__)
    return {**root, "$defs": definitions}


def _list_problems(record_type: type, error: ValidationError) -> list[Problem]:
    """Say in the words of this project what pydantic found.

    Of a value with several types, it finds fault with each of them. That is one problem.
    """
    problems: dict[tuple[str, ...], Problem] = {}
    for details in error.errors(include_url=False):
        path = tuple(str(key) for key in details["loc"][1:])
        choice = _find_choice_of_types(record_type, path)
        if choice is None:
            problem = _explain(record_type, details)
            problems[(*problem.path, problem.message)] = problem
            continue
        value_path, types_in_words = choice
        if details["type"] in BOUND_ERRORS:
            message = (
                f"must lie in {_describe_range(record_type, value_path)}, got {details['input']!r}"
            )
            problems[value_path] = Problem(path=value_path, message=message)
        else:
            message = f"expected {types_in_words}, got {shorten(repr(details['input']))}"
            problems.setdefault(value_path, Problem(path=value_path, message=message))
    return list(problems.values())


def _find_choice_of_types(
    record_type: type, path: tuple[str, ...]
) -> tuple[tuple[str, ...], str] | None:
    """Find the value on a path that may have one of several types.

    Args:
        record_type: The record that the path begins at.
        path: The place of an error. Behind such a value comes the name of the type that failed.

    Returns:
        The path of the value, and its types in words; None where there is no such value.
    """
    for length in range(1, len(path)):
        hint = _find_hint(record_type, path[:length])
        if typing.get_origin(hint) not in (typing.Union, types.UnionType):
            continue
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if len(options) > 1:
            return path[:length], " or ".join(_describe_type(option) for option in options)
    return None


def _describe_type(hint: Any) -> str:
    """Describe one of several types that a value may have."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    return TYPES_IN_WORDS.get(hint, str(hint))


def _explain(record_type: type, details: Any) -> Problem:
    """Say in the words of this project what pydantic found."""
    path = tuple(str(key) for key in details["loc"][1:])
    kind = details["type"]
    value = details["input"]
    shown_value = shorten(repr(value))
    context = details.get("ctx") or {}
    if kind == "unexpected_keyword_argument":
        names = _list_field_names(_find_type(record_type, path[:-1]))
        message = f"unknown key '{shorten(path[-1])}'; {suggest_nearest(path[-1], names)}"
        return Problem(path=path, message=message)
    if kind == "missing":
        return Problem(path=path[:-1], message=f"'{path[-1]}' is missing")
    if kind == "literal_error":
        choices = typing.get_args(_find_type(record_type, path))
        return Problem(
            path=path,
            message=f"unknown value '{shorten(value)}'; {suggest_nearest(str(value), choices)}",
        )
    if kind in BOUND_ERRORS:
        message = f"must lie in {_describe_range(record_type, path)}, got {shown_value}"
        return Problem(path=path, message=message)
    if kind == "value_error":
        return Problem(path=path, message=str(context["error"]))
    expected = {
        "float_type": "a number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "bool_type": "true or false",
        "string_type": "a text",
        "tuple_type": "a list",
        "list_type": "a list",
        "dict_type": "a mapping",
        "dataclass_type": "a mapping",
    }
    return Problem(path=path, message=f"expected {expected.get(kind, kind)}, got {shown_value}")


def make_error_details(key: str, message: str) -> InitErrorDetails:
    """Return what pydantic is told of a key that a record finds wrong by itself."""
    reason = PydanticCustomError("value_error", "{error}", {"error": message})
    return InitErrorDetails(type=reason, loc=(key,), input=key)


def add_error_details(
    error: ValidationError, details: Sequence[InitErrorDetails]
) -> ValidationError:
    """Return an error of pydantic with further details."""
    all_details: list[InitErrorDetails] = list(details)
    for line in error.errors(include_url=False):
        all_details.append(
            InitErrorDetails(
                type=line["type"], loc=line["loc"], input=line["input"], ctx=line.get("ctx", {})
            )
        )
    return ValidationError.from_exception_data(error.title, all_details)


def _find_type(record_type: Any, path: tuple[str, ...]) -> Any:
    """Return the type hint that a path leads to, without `None` and without bounds."""
    return _get_plain_hint(_find_hint(record_type, path))


def _find_hint(record_type: Any, path: tuple[str, ...]) -> Any:
    """Return the type hint that a path leads to, as it is written."""
    hint = record_type
    for key in path:
        hint = _get_plain_hint(hint)
        if dataclasses.is_dataclass(hint):
            hints = typing.get_type_hints(hint, include_extras=True)
            hint = hints.get(key, Any)
        else:
            arguments = typing.get_args(hint)
            hint = arguments[-1] if arguments and arguments[-1] is not ... else arguments[0]
    return hint


def _get_plain_hint(hint: Any) -> Any:
    """Return a type hint without its bounds, and without `None` where it is optional."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return _get_plain_hint(options[-1])
    return hint


def _list_field_names(record_type: Any) -> list[str]:
    """Return the names of the fields of a record type; none for anything else."""
    if not dataclasses.is_dataclass(record_type):
        return []
    return [field.name for field in dataclasses.fields(record_type)]


def _describe_range(record_type: type, path: tuple[str, ...]) -> str:
    """Return the bounds of the number that a path leads to, as text."""
    low = ""
    high = ""
    for part in _read_metadata(_find_hint(record_type, path)):
        if getattr(part, "gt", None) is not None:
            low = f"more than {part.gt:g}"
        low = f"{part.ge:g}" if getattr(part, "ge", None) is not None else low
        high = f"{part.le:g}" if getattr(part, "le", None) is not None else high
    return f"{low} .. {high}"


def _read_metadata(hint: Any) -> Iterator[Any]:
    """Yield the bounds in a type hint."""
    if typing.get_origin(hint) is typing.Annotated:
        for extra in typing.get_args(hint)[1:]:
            yield from getattr(extra, "metadata", [extra])
    for argument in typing.get_args(hint):
        if argument is not ...:
            yield from _read_metadata(argument)


def to_plain(record: Any) -> Any:
    """Return a record, or a collection of records, as JSON-ready data."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(record):
            value = to_plain(getattr(record, field.name)) if field.init else None
            if field.metadata.get(HOLDS_OTHER_KEYS):
                plain.update(value or {})
            elif field.init:
                plain[field.name] = value
        return plain
    if isinstance(record, dict):
        return {str(key): to_plain(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_plain(value) for value in record]
    return record


@contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Raise `DiskFull` with a path and the cure where the block can't write for want of room.

    Args:
        path: What the block writes.
    """
    try:
        yield
    except Exception as error:
        _raise_if_disk_full(error, path)
        raise


def _raise_if_disk_full(error: BaseException, path: Path) -> None:
    """Raise `DiskFull` if an error comes from a disk that can't be written."""
    if isinstance(error, MmcompressError) or not isinstance(error, Exception):
        return
    disk_error = find_disk_error(error, path)
    # Libraries of other languages raise errors of their own, without a number.
    if disk_error is None and _has_no_room(path.parent):
        disk_error = make_disk_error(errno.ENOSPC, path)
    if disk_error is not None:
        raise disk_error from error


def _has_no_room(folder: Path) -> bool:
    """Return whether the disk of a folder is full."""
    try:
        return shutil.disk_usage(folder).free < MIN_FREE_BYTES
    except OSError:
        return False


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; move it to `path` when the block ends.

    Args:
        path: The file to be written; its folder is made when it is missing.

    Yields:
        The path to write to. When the block raises, it is removed and `path` stays as it was.

    Raises:
        DiskFull: The disk has no room for it.
    """
    unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
    with name_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        mode = _create_file(unfinished)
    try:
        yield unfinished
        # Some libraries put a file of their own here, which its owner alone may read.
        unfinished.chmod(mode)
    except BaseException as error:
        try:
            # The torn file still takes its room now.
            _raise_if_disk_full(error, path)
        finally:
            unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)


@contextmanager
def hold_room(path: Path, size_bytes: int) -> Iterator[None]:
    """Hold room on the disk for the length of a block, for what is written right after it.

    Args:
        path: A file that takes the room; it is removed at the end of the block.
        size_bytes: The room.

    Raises:
        DiskFull: There is not as much room.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size_bytes, 1))
    except OSError as error:
        path.unlink(missing_ok=True)
        # Some file systems can't hold room: there nothing is held.
        disk_error = find_disk_error(error, path)
        if disk_error is not None:
            raise disk_error from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _create_file(path: Path) -> int:
    """Create an empty file; return the permissions that this process gives to new files."""
    path.touch(exist_ok=False)
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to fill, and put it in place once the block ends: whole
    or not at all.

    Args:
        folder: The folder to be written; what it held before is gone once the block ends without an
            error.

    Yields:
        The folder to fill. When the block raises, it is removed and `folder` stays as it was.

    Raises:
        DiskFull: The disk has no room for it.
    """
    unfinished = folder.with_name(folder.name + UNFINISHED_SUFFIX)
    with name_full_disk(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _grant_usual_access(unfinished)
    except BaseException as error:
        try:
            # What was written still takes its room now.
            _raise_if_disk_full(error, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    # It is moved away as a whole: nobody ever sees half of it.
    replaced = folder.with_name(f"{folder.name}.old{UNFINISHED_SUFFIX}")
    shutil.rmtree(replaced, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(replaced)
    unfinished.replace(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _grant_usual_access(folder: Path) -> None:
    """Give every file of a folder at least the permissions that this process gives to new files."""
    probe = folder / ".mode"
    usual_mode = _create_file(probe)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | usual_mode)


def write_record(path: Path, record: Any, *, indent: int | None = 1) -> Path:
    """Write a record as JSON, whole or not at all.

    Args:
        path: The file.
        record: A record, or plain data.
        indent: Spaces of indentation; None for one line.

    Returns:
        The file.
    """
    text = json.dumps(to_plain(record), indent=indent)
    with replace_file(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
    return path


def read_record(record_type: type[RecordType], path: Path, *, cure: str = "") -> RecordType:
    """Read a record that was written before.

    Args:
        record_type: A dataclass.
        path: The file.
        cure: What a person can do when the file is damaged; it ends the message.

    Raises:
        DataError: The file is missing, damaged, or written by another version of mmcompress.
    """
    try:
        return build_record(record_type, _read_json(path))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read: {error}{_add_cure(cure)}") from error
    except InvalidValue as error:
        raise DataError(
            f"{path}: damaged, or written by another version of mmcompress: {error}"
            f"{_add_cure(cure)}"
        ) from error


def read_plain(plain_type: type[PlainType], path: Path, *, cure: str = "") -> PlainType:
    """Read plain data that was written before.

    Args:
        plain_type: `dict` or `list`: what the file holds.
        path: The file.
        cure: What a person can do when the file is damaged; it ends the message.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        data = _read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read: {error}{_add_cure(cure)}") from error
    if not isinstance(data, plain_type):
        expected = "a mapping" if plain_type is dict else "a list"
        raise DataError(f"{path}: damaged: expected {expected}{_add_cure(cure)}")
    return data


def _read_json(path: Path) -> Any:
    """Return the JSON of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _add_cure(cure: str) -> str:
    """Return the end of a message that tells a cure; nothing where there is none."""
    return f"; {cure}" if cure else ""


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Return whether a file or folder is of no use: unfinished, or damaged and set aside."""
    return path.name.endswith(UNFINISHED_SUFFIX) or DAMAGED_SUFFIX in path.name


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder: `.damaged` comes behind its name.

    Args:
        path: The file or folder. What was set aside under the new name before is gone then.

    Returns:
        The new path.
    """
    new_path = path.with_name(path.name + DAMAGED_SUFFIX)
    if new_path.is_dir():
        shutil.rmtree(new_path)
    elif new_path.exists():
        new_path.unlink()
    return path.rename(new_path)


def set_aside_if_damaged(
    check: Callable[[], object],
    *,
    paths: Sequence[Path],
    tell: Callable[[str], None],
    sequel: str = REMADE_SEQUEL,
) -> bool:
    """Set files aside that can't be read, so that the work that wrote them writes them again.

    Args:
        check: Reads the files.
        paths: The files and folders that are of no use any more when the check fails. Those that
            are not there are passed over.
        tell: Receives what is wrong, and where the files are now.
        sequel: What becomes of it; it ends the message.

    Returns:
        Whether they were set aside.
    """
    try:
        check()
    except (MmcompressError, OSError, ValueError) as error:
        names = [set_aside(path).name for path in paths if path.exists()]
        tell(f"{error}; set aside as {', '.join(names)}: {sequel}")
        return True
    return False


def read_text_file(path: Path) -> str:
    """Read a text file as UTF-8; a byte order mark at its start is no part of the text.

    Raises:
        DataError: The file can't be read, or is in another encoding: the message says where, and
            how to convert it.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # the decoder counts from behind the byte order mark
        text_bytes = error.object
        position = error.start
    if raw.startswith(UTF16_MARKS):
        raise DataError(
            f"{path}: can't be read: it is not UTF-8 but UTF-16; {_describe_cure(path, 'utf-16')}"
        )
    line_number = text_bytes.count(b"\n", 0, position) + 1
    shown_value = text_bytes[max(0, position - SHOWN_BYTES) : position + SHOWN_BYTES]
    # latin-1 gives every byte a character
    excerpt = shown_value.decode("latin-1").strip()
    raise DataError(
        f"{path}:{line_number}: can't be read: it is not UTF-8: byte "
        f"0x{text_bytes[position]:02x} in {excerpt!r} as latin-1; {_describe_cure(path, 'latin1')}"
    )


def _describe_cure(path: Path, encoding: str) -> str:
    """Return how a file is brought to UTF-8, in words."""
    return (
        "save it as UTF-8, such as by "
        f"`iconv -f {encoding} -t utf-8 {path.name} > utf8-{path.name}`"
    )
