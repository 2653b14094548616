"""Put the file and line of a spec in front of errors that only its models or data show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError, ModelError
from mmcompress.spec.loader import YamlSource

NAMED_KEY = re.compile(r"((?:nodes|data|metrics|measure|prune)(?:\.[\w-]+)*): ")
"""How an error begins that names a key of the spec."""

SOURCE_ERROR = "source '"
"""How an error of a node's model goes on when its source is wrong."""


@contextmanager
def name_spec_lines(spec_path: str | Path, overrides: dict[str, Any] | None) -> Iterator[None]:
    """Name the place in a spec where an error in the block begins with one of its keys.

    Args:
        spec_path: The spec file.
        overrides: Values by dotted key that replace those of the spec.

    Raises:
        ModelError: As in the block, with file and line.
        DataError: The same.
    """
    try:
        yield
    except (ModelError, DataError) as error:
        message = str(error)
        match = NAMED_KEY.match(message)
        if match is None:
            raise
        path = tuple(match.group(1).split("."))
        rest = message[match.end() :]
        if rest.startswith(SOURCE_ERROR) and path[-1] != "source":
            path = (*path, "source")
        place = YamlSource(spec_path, overrides).describe_place(path)
        raise type(error)(f"{place}: {message}") from error
