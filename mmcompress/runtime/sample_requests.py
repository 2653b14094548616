"""Requests that a bundle carries with their answers: any machine can replay them.

They lie in the folder `requests` of the bundle: texts and figures as JSON, arrays as NumPy files
without objects.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmcompress.errors import BundleError
from mmcompress.runtime.graph import Pipeline
from mmcompress.runtime.text import Values

REQUESTS_FOLDER = "requests"
"""Where they lie in a bundle."""

MAX_STORED_BYTES = 20_000_000
"""Bytes of their arrays. What goes beyond is left out, so that no bundle grows by its pictures."""

MIN_COSINE = 0.999
"""Cosine of a vector to the stored one that counts as the same. Other processors add in another
order; int8 on a processor that it is wrong on lies far below."""

MAX_RELATIVE_DIFFERENCE = 1e-2
"""Relative difference of a number to the stored one that counts as the same."""

REPLAY_ROUNDS = 5
"""Times that every request is answered when a bundle is verified. The first one is not timed."""


@dataclass(frozen=True, kw_only=True)
class StoredRequest:
    """One request with its answer."""

    inputs: Values
    """Values of the pipeline's inputs, by name."""
    answer: Values
    """Values of its outputs, by name."""


@dataclass(frozen=True, kw_only=True)
class StoredRequests:
    """The requests of a bundle."""

    requests: tuple[StoredRequest, ...]
    """The requests."""
    machine: str
    """The processor that gave the answers."""
    latency_ms: float
    """Median milliseconds of these requests there."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How a bundle answers on this machine."""

    differences: tuple[str, ...]
    """What differs in the answer to each request; empty texts for what is the same."""
    latency_ms: float
    """Median milliseconds of the requests here."""
    stored: StoredRequests
    """What the bundle carries."""

    @property
    def holds(self) -> bool:
        """Whether every answer is the stored one."""
        return not any(self.differences)


def write_requests(
    pipeline: Pipeline, requests: Sequence[Mapping[str, object]], *, machine: str
) -> None:
    """Answer requests, and write both into the bundle.

    Args:
        pipeline: The loaded bundle.
        requests: Values of its inputs by name: arrays or texts.
        machine: The processor, for people.
    """
    arrays: dict[str, np.ndarray] = {}
    rows: list[Values] = []
    seconds: list[float] = []
    for number, request in enumerate(requests):
        start = time.perf_counter()
        answer = pipeline(**request)
        seconds.append(time.perf_counter() - start)
        packed: dict[str, np.ndarray] = {}
        row = {
            "inputs": _pack(request, packed, prefix=f"{number}.in"),
            "answer": _pack(answer, packed, prefix=f"{number}.out"),
        }
        size = sum(array.nbytes for array in (*arrays.values(), *packed.values()))
        if rows and size > MAX_STORED_BYTES:
            break
        arrays |= packed
        rows.append(row)
    folder = pipeline.folder / REQUESTS_FOLDER
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    record = {
        "requests": rows,
        "machine": machine,
        "latency_ms": 1e3 * statistics.median(seconds),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "requests.json").write_text(text, encoding="utf-8")


def has_requests(bundle: Path) -> bool:
    """Return whether a bundle carries requests."""
    return (bundle / REQUESTS_FOLDER).exists()


def read_requests(bundle: Path) -> StoredRequests:
    """Read the requests that a bundle carries.

    Raises:
        BundleError: It carries none, or they are damaged.
    """
    folder = bundle / REQUESTS_FOLDER
    if not has_requests(bundle):
        raise BundleError(
            f"{bundle}: carries no requests: compressed bundles of `run` and those of `export` do, "
            "those of `report.samples: none` do not"
        )
    try:
        record = json.loads((folder / "requests.json").read_text(encoding="utf-8"))
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            requests = [
                StoredRequest(
                    inputs=_unpack(row["inputs"], arrays), answer=_unpack(row["answer"], arrays)
                )
                for row in record["requests"]
            ]
        return StoredRequests(
            requests=tuple(requests),
            machine=str(record["machine"]),
            latency_ms=float(record["latency_ms"]),
        )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BundleError(f"{folder}: damaged: {type(error).__name__}: {error}") from error


def verify_bundle(pipeline: Pipeline) -> Verification:
    """Replay the requests of a bundle on this machine.

    Args:
        pipeline: The loaded bundle.

    Raises:
        BundleError: The bundle carries no requests, or can't answer them.
    """
    stored = read_requests(pipeline.folder)
    differences: list[str] = []
    seconds: list[float] = []
    for request in stored.requests:
        answer = pipeline(**request.inputs)
        differences.append(describe_difference(request.answer, answer))
        for _ in range(REPLAY_ROUNDS - 1):
            start = time.perf_counter()
            pipeline(**request.inputs)
            seconds.append(time.perf_counter() - start)
    return Verification(
        differences=tuple(differences),
        latency_ms=1e3 * statistics.median(seconds) if seconds else math.nan,
        stored=stored,
    )


def describe_difference(stored: Mapping[str, object], answer: Mapping[str, object]) -> str:
    """Return in words what differs between two answers; an empty text where nothing does."""
    if set(stored) != set(answer):
        return f"gives {', '.join(sorted(answer))} for {', '.join(sorted(stored))}"
    for name, expected in stored.items():
        problem = _compare_values(expected, answer[name])
        if problem:
            return f"{name}: {problem}"
    return ""


def _compare_values(expected: object, actual: object) -> str:
    """Return in words what differs between two values of an output."""
    if isinstance(expected, np.ndarray):
        other = np.asarray(actual)
        if other.shape != expected.shape:
            return f"shape {other.shape} for {expected.shape}"
        cosine = _compute_cosine(expected, other)
        return "" if cosine >= MIN_COSINE else f"cosine {cosine:.4f} to the stored vector"
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        problems = [
            _compare_values(one, other) for one, other in zip(expected, actual, strict=True)
        ]
        return next((problem for problem in problems if problem), "")
    if isinstance(expected, float) and isinstance(actual, int | float):
        same = math.isclose(
            expected, actual, rel_tol=MAX_RELATIVE_DIFFERENCE, abs_tol=MAX_RELATIVE_DIFFERENCE
        )
        return "" if same else f"{actual:.4g} for {expected:.4g}"
    return "" if expected == actual else f"{actual!r} for {expected!r}"


def _compute_cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of two arrays, as vectors; 1 for two of zeros."""
    first = one.astype(np.float64).ravel()
    second = other.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    if lengths == 0:
        return float(np.array_equal(first, second))
    return float(first @ second) / lengths


def _pack(values: Mapping[str, object], arrays: dict[str, np.ndarray], *, prefix: str) -> Values:
    """Return values as JSON takes them; arrays go into `arrays` and leave their names."""
    packed: Values = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            key = f"{prefix}.{name}"
            arrays[key] = value
            packed[name] = {"array": key}
        else:
            packed[name] = {"value": value}
    return packed


def _unpack(packed: Mapping[str, Values], arrays: Mapping[str, np.ndarray]) -> Values:
    """Return values that were packed."""
    values: Values = {}
    for name, entry in packed.items():
        values[name] = arrays[entry["array"]] if "array" in entry else entry["value"]
    return values
