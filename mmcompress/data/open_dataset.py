"""Opening what a spec names: its dataset, and the list of texts that a lookup searches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmcompress.data.base import Dataset
from mmcompress.data.remote_files import fetch_remote
from mmcompress.data.text_files import split_lines
from mmcompress.errors import DataError
from mmcompress.graph.ports import get_kind
from mmcompress.registry import DATA_KINDS
from mmcompress.spec.overrides import warn_of_old_name
from mmcompress.spec.schema import Data, Spec
from mmcompress.spec.storage_urls import is_remote
from mmcompress.storage import InvalidValue, build_record, read_text_file

LOOKUP_SPLITS = ("train", "val", "test")
"""Splits whose reference texts a lookup searches when it has no file of its own."""


def open_dataset(data: Data) -> Dataset:
    """Open the dataset that a spec names.

    Args:
        data: The section `data` of the spec.

    Raises:
        DataError: An option is unknown or has a value that does not fit.
    """
    dataset_type = DATA_KINDS.get(data.kind)
    old_options: Mapping[str, str] = getattr(dataset_type, "old_options", {})
    try:
        options = fetch_remote_options(_rename_old_options(data.options, old_options))
        dataset: Dataset = build_record(dataset_type, options)
    except InvalidValue as invalid:
        raise DataError(str(invalid.add_parent_keys("data", "options"))) from None
    return dataset


def fetch_remote_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a dataset with what lies at storage URLs in the cache of this machine.

    Raises:
        DataError: There is nothing at a URL, or it can't be read.
    """
    fetched = dict(options)
    for name, value in options.items():
        if isinstance(value, str) and is_remote(value):
            fetched[name] = str(fetch_remote(value))
    return fetched


def _rename_old_options(
    options: Mapping[str, Any], old_options: Mapping[str, str]
) -> dict[str, Any]:
    """Return the options of a dataset under their present names, with a warning for an old one.

    Where both names are given, the old one stays and is told as unknown.

    Args:
        options: The options as the spec gives them.
        old_options: What old names are called now.
    """
    renamed: dict[str, Any] = {}
    for name, value in options.items():
        new_name = old_options.get(name, name)
        if new_name != name and new_name not in options:
            warn_of_old_name(f"data.options.{name}", f"data.options.{new_name}")
            name = new_name
        renamed[name] = value
    return renamed


def read_lookup_texts(data: Dataset, file: str = "") -> tuple[str, ...]:
    """Read the list of texts that a lookup searches, each text once.

    Args:
        data: The dataset of the pipeline.
        file: A file with one text a line; empty takes all reference texts of the data.

    Raises:
        DataError: The file can't be read or holds no text.
    """
    texts: list[str] = []
    if file:
        texts += _read_text_lines(Path(file))
    else:
        for split in LOOKUP_SPLITS:
            texts += data.load(split).texts
    if not texts:
        raise DataError(f"{file}: holds no text")
    return tuple(dict.fromkeys(texts))


def read_all_lookup_texts(spec: Spec, data: Dataset) -> dict[str, tuple[str, ...]]:
    """Return the texts of every lookup node."""
    texts: dict[str, tuple[str, ...]] = {}
    for node_name, node in spec.nodes.items():
        list_option = get_kind(node.kind).list_option
        if list_option:
            texts[node_name] = read_lookup_texts(data, node.get_option(list_option, ""))
    return texts


def _read_text_lines(path: Path) -> list[str]:
    """Return the lines of a file that are not blank, or raise `DataError`."""
    lines = split_lines(read_text_file(path))
    return [line.strip() for line in lines if line.strip()]
