"""TODO."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mmcompress.errors import DataError, suggest_nearest
from mmcompress.registry import Registry

T = TypeVar("T")


class InvalidValue(Exception):
    """A value that does not fit its type. `path` leads to it from the root."""

    def __init__(self, path: tuple[str, ...], message: str):
        super().__init__(f"{'.'.join(path)}: {message}")
        self.path, self.message = path, message

    def __reduce__(self) -> tuple:  # crosses process borders
        return type(self), (self.path, self.message)


def build_record(cls: type[T], data: Any, *, path: tuple[str, ...] = ()) -> T:
    """Make a dataclass from plain data, checking names and types on the way. Raises `Invalid`."""
    if not isinstance(data, dict):
        raise InvalidValue(path, f"expected a mapping, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise InvalidValue(
                (*path, str(key)), f"unknown key '{key}'; {suggest_nearest(key, fields)}"
            )
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], path=(*path, name))
            registry: Registry | None = f.metadata.get("registry")
            if (
                registry
                and isinstance(values[name], str)
                and (problem := registry.problem(values[name]))
            ):
                raise InvalidValue((*path, name), problem)
            check = f.metadata.get("check")
            if check and values[name] is not None and (problem := check(values[name])):
                raise InvalidValue((*path, name), f"{problem}, got {values[name]!r}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise InvalidValue(path, f"'{name}' is missing")
    return cls(**values)


def _value(hint: Any, value: Any, *, path: tuple[str, ...]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        for option in options[:-1]:
            try:
                return _value(option, value, path=path)
            except InvalidValue:
                continue
        return _value(options[-1], value, path=path)
    if origin is typing.Literal:
        if value not in args:
            raise InvalidValue(path, f"unknown value '{value}'; {suggest_nearest(value, args)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidValue(path, f"expected a list, got {value!r}")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise InvalidValue(path, f"expected {len(args)} values, got {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(
            _value(k, v, path=(*path, str(i)))
            for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is list:
        if not isinstance(value, list):
            raise InvalidValue(path, f"expected a list, got {value!r}")
        return [_value(args[0], v, path=(*path, str(i))) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise InvalidValue(path, f"expected a mapping, got {value!r}")
        return {str(k): _value(args[1], v, path=(*path, str(k))) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build_record(hint, value, path=path)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise InvalidValue(path, f"expected {hint.__name__}, got {value!r}")
    return value


def to_plain(obj: Any) -> Any:
    """A record as JSON-ready data."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_plain(getattr(obj, f.name)) for f in dataclasses.fields(obj) if f.init}
    if isinstance(obj, dict):
        return {str(k): to_plain(v) for k, v in obj.items()}
    if isinstance(obj, list | tuple):
        return [to_plain(v) for v in obj]
    return obj


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and put it in place once the block ends: whole or not at all.

    Args:
        path: The file to be written; its folder is made when it is missing.

    Yields:
        The path to write to. When the block raises, it is removed and `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    try:
        yield unfinished
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to fill, and put it in place once the block ends: whole or not at all.

    Args:
        folder: The folder to be written; what it held before is gone once the block ends without an error.

    Yields:
        The folder to fill. When the block raises, it is removed and `folder` stays as it was.
    """
    unfinished = folder.with_name(folder.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.replace(folder)


def write_record(path: Path, obj: Any, *, indent: int | None = 1) -> Path:
    """Write a record as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(to_plain(obj), indent=indent) + "\n")
    new.replace(path)
    return path


def read_record(cls: type[T], path: Path) -> T:
    """A record written before. Raises `DataError` when the file is missing, damaged or of another version."""
    try:
        return build_record(cls, json.loads(path.read_text()))
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: can't be read: {e}") from e
    except InvalidValue as e:
        raise DataError(f"{path}: damaged, or written by another version: {e}") from e
