"""Datasets by kind: named splits of (image, caption) pairs."""

from __future__ import annotations

from mmcompress.data.base import Dataset, Pairs
from mmcompress.errors import DataError
from mmcompress.records import Invalid, build
from mmcompress.registry import DATA
from mmcompress.spec.schema import Data

__all__ = ["Dataset", "Pairs", "open_dataset"]


def open_dataset(data: Data) -> Dataset:
    """The dataset a spec names, its options checked. Raises `DataError`."""
    try:
        return build(DATA.get(data.kind), data.options, ("data", "options"))
    except Invalid as e:
        raise DataError(str(e)) from None
