"""The device table: latency of every block kind x shape x size x precision, measured on ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mmcompress.errors import DataError
from mmcompress.measure.latency import quiet
from mmcompress.measure.machine import fingerprint
from mmcompress.records import read, write

COPIES = 4
LARGE = 1 << 26
"""Above this many multiply-accumulates one block is timed, not a stack of them: its cost stands out by itself."""


@dataclass(frozen=True)
class Row:
    """Latency in milliseconds of one block kind at one shape, against its units."""

    kind: str
    width: int
    head: int
    positions: int
    keys: int
    batch: int
    precision: str
    units: tuple[int, ...]
    ms: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """Rows measured on one device with one number of threads. Tables of two devices are never mixed."""

    device: str
    threads: int
    rows: tuple[Row, ...]

    def lookup(self) -> dict[tuple, Row]:
        return {(r.kind, r.width, r.head, r.positions, r.keys, r.batch, r.precision): r for r in self.rows}


Key = tuple[str, int, int, int, int, int]
"""(kind, width, head width, positions, key positions, batch)."""


def cost(rows: Mapping[tuple, Row], key: Key, units: int, precision: str) -> float:
    """Milliseconds of one call of a block, linear between measured sizes; nothing when no unit is left."""
    if units == 0:
        return 0.0
    row = rows[(*key, precision)]
    return float(np.interp(units, row.units, row.ms))


def levels(units: int, step: int) -> tuple[int, ...]:
    """Sizes a table row is measured at: every size of a small block, eight of a large one."""
    count = -(-units // step)
    picks = sorted({max(1, round(count * i / 8)) for i in range(1, 9)})
    return tuple(min(p * step, units) for p in picks)


def measure(
    needs: Iterable[tuple[Key, int, int]],
    threads: int,
    cached: Table | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
    precisions: Sequence[str] = ("fp32", "int8"),
) -> Table:
    """Measure what `needs` asks for and `cached` lacks: (key, units, step) of every block of the pipeline."""
    from mmcompress.measure.blocks import Cell, feed, stack
    from mmcompress.quantize.precision import quantize
    from mmcompress.runtime.sessions import session

    device = fingerprint(threads)
    old = cached.lookup() if cached and cached.device == device else {}
    rows = dict(old)
    largest: dict[Key, tuple[int, int]] = {}
    for k, u, s in needs:
        largest[k] = max(largest.get(k, (0, 1)), (u, s))
    todo = [
        (k, u, s, p)
        for k, (u, s) in sorted(largest.items())
        for p in precisions
        if (*k, p) not in old or old[(*k, p)].units[-1] < u
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for done, (key, units, step, precision) in enumerate(todo):
            sizes, ms = levels(units, step), []
            progress(f"{key[0]} {precision}", done / len(todo))
            for size in sizes:
                kind, width, head, positions, keys, batch = key
                cell, times = Cell(kind, width, size, head, positions, keys, batch), []
                large = positions * width * max(size, keys) > LARGE
                for copies in (0, 1 if large else COPIES):
                    model = stack(cell, copies)
                    inputs = feed(cell, model)
                    if precision != "fp32" and copies:
                        rounded, _ = quantize(precision, model, Path(scratch) / "q.onnx", [inputs])
                        run = session(rounded.read_bytes(), threads)
                    else:
                        run = session(model.SerializeToString(), threads)
                    times.append(quiet(partial(run.run, None, inputs), 5, 60, 0.12))
                ms.append(max(times[1] - times[0], 1e-4) / (1 if large else COPIES))
            rows[(*key, precision)] = Row(*key, precision, sizes, tuple(np.maximum.accumulate(ms).tolist()))
    return Table(device, threads, tuple(rows.values()))


def load_cached(path: Path) -> Table | None:
    """A table written before; None when there is none that can be read."""
    try:
        return read(Table, path)
    except DataError:
        return None


def store(path: Path, table: Table) -> None:
    write(path, table)
