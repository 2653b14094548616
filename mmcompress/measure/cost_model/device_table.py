"""The device table: latency of every block kind x shape x size x precision, measured on ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.microbenchmarks import BlockShape, build_stack, make_random_feed
from mmcompress.quantize.base import quantize_model
from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.runtime.machine import fingerprint_device
from mmcompress.runtime.sessions import open_session
from mmcompress.runtime.timing import min_of_medians
from mmcompress.storage import read_record, write_record

TABLE_FORMAT = 2
"""Of what rows are measured with: it changes with `measure.blocks` and `quantize`; tables of another are not used."""


STACKED_COPIES = 4


LARGE_BLOCK_MACS = 1 << 26
"""Above this many multiply-accumulates one block is timed, not a stack of them, and at fewer sizes: its cost stands out
by itself and grows evenly."""


ALL_EIGHTHS, FEW_EIGHTHS = tuple(range(1, 9)), (1, 2, 4, 6, 8)


@dataclass(frozen=True)
class TableRow:
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


@dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """Rows measured on one device with one number of threads. Tables of two devices are never mixed."""

    device: str
    threads: int
    rows: tuple[TableRow, ...]

    def index_rows(self) -> Mapping[tuple, TableRow]:
        return self._rows

    @cached_property
    def _rows(self) -> dict[tuple, TableRow]:
        return {
            (r.kind, r.width, r.head, r.positions, r.keys, r.batch, r.precision): r
            for r in self.rows
        }


TableKey = tuple[str, int, int, int, int, int]
"""(kind, width, head width, positions, key positions, batch)."""


def interpolate_ms(
    rows: Mapping[tuple, TableRow], key: TableKey, *, units: int, precision: str
) -> float:
    """Milliseconds of one call of a block, linear between measured sizes; nothing when no unit is left."""
    if units == 0:
        return 0.0
    row = rows[(*key, precision)]
    if (
        units < row.units[0] and len(row.units) > 1
    ):  # below what was measured: on along the first line
        slope = (row.ms[1] - row.ms[0]) / (row.units[1] - row.units[0])
        return max(row.ms[0] - slope * (row.units[0] - units), 0.0)
    return float(np.interp(units, row.units, row.ms))


def choose_measured_sizes(
    units: int, step: int, *, eighths: Sequence[int] = ALL_EIGHTHS
) -> tuple[int, ...]:
    """Sizes a table row is measured at: every size of a small block, some eighths of one of many steps."""
    count = -(-units // step)
    picks = sorted({max(1, round(count * i / 8)) for i in eighths})
    return tuple(min(p * step, units) for p in picks)


def measure_table(
    needs: Iterable[tuple[TableKey, int, int]],
    threads: int,
    *,
    cached: DeviceTable | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
    precisions: Sequence[str] = ("fp32", "int8"),
) -> DeviceTable:
    """Measure what `needs` asks for and `cached` lacks: (key, units, step) of every block of the pipeline."""

    device = fingerprint_device(threads)
    old = cached.index_rows() if cached and cached.device == device else {}
    rows: dict[tuple, TableRow] = dict(old)
    largest: dict[TableKey, tuple[int, int]] = {}
    for k, u, s in needs:
        largest[k] = max(largest.get(k, (0, 1)), (u, s))
    todo = [
        (k, u, s, p)
        for k, (u, s) in sorted(largest.items())
        for p in precisions
        if (*k, p) not in old or old[(*k, p)].units[-1] < u
    ]
    bare: dict[tuple[int, int, int], float] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def clocked(cell: BlockShape, copies: int, precision: str) -> float:
            model = build_stack(cell, copies)
            inputs = make_random_feed(cell, model)
            if precision == "fp32":
                run = open_session(model.SerializeToString(), threads)
            else:
                rounded, _ = quantize_model(
                    precision, model, target=Path(scratch) / "q.onnx", feeds=[inputs]
                )
                run = open_session(rounded.read_bytes(), threads)
            return min_of_medians(partial(run.run, None, inputs), 5, rounds=60, limit=0.12)

        for done, (key, units, step, precision) in enumerate(todo):
            kind, width, head, positions, keys, batch = key
            heavy = lambda size, k=key: k[3] * k[1] * max(size, k[4]) > LARGE_BLOCK_MACS
            sizes, ms = (
                choose_measured_sizes(
                    units, step, eighths=FEW_EIGHTHS if heavy(units) else ALL_EIGHTHS
                ),
                [],
            )
            progress(f"{kind} {precision}", done / len(todo))
            for size in sizes:
                cell, copies = (
                    BlockShape(kind, width, size, head, positions, keys, batch),
                    1 if heavy(size) else STACKED_COPIES,
                )
                call = (width, positions, batch)  # all that the bare cost of a call depends on
                if call not in bare:
                    bare[call] = clocked(cell, 0, "fp32")
                ms.append(max(clocked(cell, copies, precision) - bare[call], 1e-4) / copies)
            rows[(*key, precision)] = TableRow(
                *key, precision, sizes, tuple(np.maximum.accumulate(ms).tolist())
            )
    return DeviceTable(device=device, threads=threads, rows=tuple(rows.values()))


def complete_table(
    needs: Iterable[tuple[TableKey, int, int]],
    threads: int,
    *,
    progress: Callable[[str, float], None] = lambda what, share: None,
    precisions: Sequence[str] = ("fp32", "int8"),
) -> DeviceTable:
    """The table of this device, which is kept, with what it lacks measured: once per device, whatever asks for it."""
    path = locate_cache_folder() / f"device-{fingerprint_device(threads)}-{TABLE_FORMAT}.json"
    try:
        known = read_record(DeviceTable, path)
    except DataError:  # there is none that can be read
        known = None
    found = measure_table(needs, threads, cached=known, progress=progress, precisions=precisions)
    with suppress(OSError):  # it can't be kept here
        write_record(path, found)
    return found
