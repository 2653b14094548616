"""Datasets by kind: named splits of (input, text) pairs."""

from __future__ import annotations

from pathlib import Path

from mmcompress.data.base import Dataset
from mmcompress.errors import DataError
from mmcompress.registry import DATA_KINDS
from mmcompress.spec.schema import Data
from mmcompress.storage import InvalidValue, build_record


def open_dataset(data: Data) -> Dataset:
    """The dataset a spec names, its options checked. Raises `DataError`."""
    try:
        dataset: Dataset = build_record(DATA_KINDS.get(data.kind), data.options)
    except InvalidValue as invalid:
        raise DataError(str(invalid.inside("data", "options"))) from None
    return dataset


def read_lookup_texts(data: Dataset, file: str = "") -> tuple[str, ...]:
    """The list a lookup searches: the lines of a file, else all reference texts of the data, each once.

    Raises `DataError` when the file can't be read or holds nothing.
    """
    if not file:
        texts = [t for split in ("train", "val", "test") for t in data.load(split).texts]
    else:
        try:
            texts = [
                t
                for line in Path(file).read_text(encoding="utf-8-sig").splitlines()
                if (t := line.strip())
            ]
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"{file}: can't be read: {getattr(e, 'strerror', None) or e}") from e
    if not texts:
        raise DataError(f"{file}: holds no text")
    return tuple(dict.fromkeys(texts))
