"""Opens the data of a spec, and says what is wrong with it or short of."""

from __future__ import annotations

import math

from mmcompress.data.base import Dataset
from mmcompress.data.open_dataset import open_dataset
from mmcompress.errors import DataError
from mmcompress.graph.inputs import find_data_input
from mmcompress.graph.ports import get_kind
from mmcompress.spec.schema import Spec

MIN_TEST_PAIRS = 100
"""Pairs in test, below which a run says how little their figures are known."""

WIDEST_SHARE_MARGIN = 0.98
"""Half of the 95 % interval of a share of one half, times the square root of the pairs."""


def open_data(spec: Spec) -> Dataset:
    """Open the data of a spec and look at one pair of every split.

    Raises:
        DataError: A split is missing or can't be read, or the data do not fit the pipeline.
    """
    data = open_dataset(spec.data)
    for split in ("train", "val", "test", *spec.data.report):
        if split not in data.splits:
            raise DataError(
                f"data.report: '{spec.data.kind}' has no split '{split}' "
                f"(known: {', '.join(data.splits)})"
            )
        data.load(split, 1)
    _check_input_type(spec, data)
    if spec.data.labels == "teacher":
        _check_teacher_labels(spec, data)
    return data


def _check_input_type(spec: Spec, data: Dataset) -> None:
    """Raise `DataError` when the data give another type of input than the pipeline takes."""
    # A plug-in of an earlier version may not say what it gives: those were all images.
    given_type = getattr(data, "modality", "image")
    input_type = spec.inputs[find_data_input(spec.inputs)]
    if given_type != input_type:
        raise DataError(
            f"data: '{spec.data.kind}' gives {given_type}, the pipeline takes {input_type}"
        )


def _check_teacher_labels(spec: Spec, data: Dataset) -> None:
    """Raise `DataError` when the dense pipeline can't label this data."""
    generators = sum(get_kind(node.kind).writes_text for node in spec.nodes.values())
    if generators != 1:
        raise DataError(
            f"data.labels: 'teacher' takes one node that writes text, here are {generators}"
        )
    # The labels are kept by file name.
    if not data.load("val", 1).names:
        raise DataError(
            f"data.labels: 'teacher' needs a data kind of files, not '{spec.data.kind}'"
        )


def describe_splits(data: Dataset) -> str:
    """Return how many pairs each split has; empty for data that are drawn without end."""
    count_pairs = getattr(data, "count_pairs", None)
    if count_pairs is None:
        return ""
    counts: dict[str, int] = count_pairs()
    parts = [f"{count} {split}" for split, count in counts.items()]
    return f"{sum(counts.values())} pairs: {', '.join(parts)}"


def describe_shortage(spec: Spec, data: Dataset) -> str:
    """Return a sentence on splits of few pairs, if there are any.

    They have fewer than the spec asks for, or so few in the test split that its figures say little.
    """
    # Only data of limited size counts its pairs.
    count_pairs = getattr(data, "count_pairs", None)
    if count_pairs is None:
        return ""
    available_counts: dict[str, int] = count_pairs()
    wanted_counts = {"train": spec.data.calibration, "val": spec.data.validation_pairs}
    shortages = [
        f"{available_counts[split]} of {count} in {split}"
        for split, count in wanted_counts.items()
        if available_counts[split] < count
    ]
    parts: list[str] = []
    if shortages:
        parts.append(f"fewer pairs than the spec would use: {', '.join(shortages)}")
    test_count = available_counts["test"]
    if shortages or test_count < MIN_TEST_PAIRS:
        parts.append(f"{test_count} in test")
    if 0 < test_count < MIN_TEST_PAIRS:
        margin = WIDEST_SHARE_MARGIN / math.sqrt(test_count)
        points = round(100 * margin)
        parts.append(
            f"percentages of so few are uncertain by up to {points} points either way: add pairs"
        )
    return "; ".join(parts)
