"""Measure the device table: milliseconds of every block at several sizes, in every precision.

ONNX Runtime runs small stacks of blocks (`microbenchmarks`). A device is measured once; its table
is kept in the cache folder and grows when another pipeline needs other blocks. No torch here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean

import numpy as np

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.microbenchmarks import (
    SizedBlock,
    TableKey,
    build_stack,
    make_random_feed,
)
from mmcompress.quantize.base import quantize_model
from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.runtime.machine import fingerprint_device
from mmcompress.runtime.progress import StageProgress, ignore_progress, scale_progress
from mmcompress.runtime.providers import CPU_PROVIDER
from mmcompress.runtime.sessions import open_session
from mmcompress.runtime.timing import time_calls_in_turn
from mmcompress.storage import read_record, write_record

TABLE_FORMAT = 4
"""Version of what rows are measured with. It rises with changes of `microbenchmarks`, of `quantize`
and of the key.

The version is part of the file name, so a table of another format is never read.
"""

STACKED_COPIES = 4
"""Blocks in a stack. One small block alone would be lost beside the cost of a call."""

LARGE_BLOCK_MACS = 1 << 26
"""Multiply-accumulates. A larger block is timed alone and at fewer sizes: its cost stands out and
grows evenly."""

CONV_COLUMNS_PER_KERNEL_PLACE = 1000
"""Columns per place of a kernel's side: how a block of convolutions is counted when it is compared
to `LARGE_BLOCK_MACS`. With it every block of an RN50 is large."""

EVERY_EIGHTH = (1, 2, 3, 4, 5, 6, 7, 8)
"""Eighths of all units: the sizes at which a small block is timed."""

FEW_EIGHTHS = (1, 2, 4, 6, 8)
"""Eighths of all units: the sizes at which a large block is timed."""

STACK_WARMUP_CALLS = 5
"""Calls before a stack is timed: the first ones allocate its memory."""

STACK_CALLS = 60
"""Calls of a stack at most."""

STACK_SECONDS = 0.1
"""Seconds that a stack is called for. A table has hundreds of stacks."""

MAX_BYTES_IN_TURN = 1 << 28
"""Bytes of the models that are called in turn: all of them lie in memory at once."""

MIN_STACK_MS = 1e-4
"""Milliseconds that a stack takes at least. Noise may make a tiny one quicker than an empty
call."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """Latency of one block against its units."""

    key: TableKey
    """The block."""
    precision: str
    """Precision of its weights."""
    units: tuple[int, ...]
    """Sizes that were measured, smallest first."""
    ms: tuple[float, ...]
    """Milliseconds of one call at each size; never less than at the size before."""


RowKey = tuple[TableKey, str]
"""A block and its precision."""

Rows = Mapping[RowKey, TableRow]
"""Rows of a table by block and precision."""


@dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """Rows measured on one device with one number of threads. Tables of two devices are never
    mixed."""

    device: str
    """Fingerprint of the device (`runtime.machine.fingerprint_device`)."""
    threads: int
    """Threads of a session."""
    rows: tuple[TableRow, ...]
    """Measured milliseconds, a row for each kind of block and precision."""

    def index_rows(self) -> Rows:
        """Return the rows by block and precision."""
        return self._rows_by_key

    @cached_property
    def _rows_by_key(self) -> dict[RowKey, TableRow]:
        return {(row.key, row.precision): row for row in self.rows}


@dataclass(frozen=True, kw_only=True)
class TableNeed:
    """A block that the table must hold."""

    key: TableKey
    """Kind and sizes of the block: what its row is found by."""
    units: int
    """Units of the whole block: the largest size."""
    granularity: int
    """Units: the smallest step between two sizes that a cut can lead to."""


def interpolate_ms(rows: Rows, key: TableKey, *, units: int, precision: str) -> float:
    """Return the milliseconds of one call of a block, linear between the measured sizes.

    Args:
        rows: Rows of the table.
        key: The block.
        units: Units that are left.
        precision: Precision of the block.

    Returns:
        Milliseconds; 0 when no unit is left.

    Raises:
        KeyError: The table lacks the block.
    """
    if units == 0:
        return 0.0
    row = rows[key, precision]
    if units < row.units[0] and len(row.units) > 1:
        # below the smallest size the first line goes on
        slope = (row.ms[1] - row.ms[0]) / (row.units[1] - row.units[0])
        return max(row.ms[0] - slope * (row.units[0] - units), 0.0)
    return float(np.interp(units, row.units, row.ms))


def choose_measured_sizes(
    units: int, granularity: int, *, eighths: Sequence[int] = EVERY_EIGHTH
) -> tuple[int, ...]:
    """Choose the sizes at which a block is timed.

    Args:
        units: Units of the whole block.
        granularity: Units of one cut.
        eighths: Eighths of the block to choose.

    Returns:
        Units, smallest first: every size of a block of few cuts, the chosen eighths of one of many.
    """
    cut_count = -(-units // granularity)
    chosen_cuts = sorted({max(1, round(cut_count * eighth / 8)) for eighth in eighths})
    return tuple(min(cuts * granularity, units) for cuts in chosen_cuts)


def measure_table(
    needs: Iterable[TableNeed],
    threads: int,
    *,
    cached: DeviceTable | None = None,
    progress: StageProgress = ignore_progress,
    precisions: Sequence[str] = ("fp32", "int8"),
    provider: str = CPU_PROVIDER,
) -> DeviceTable:
    """Measure the blocks that a cached table lacks.

    A new row that breaks the order in positions or keys is measured once more.

    Args:
        needs: Blocks of a pipeline; one may occur several times.
        threads: Threads of a session.
        cached: The table so far. One of another device is not used.
        progress: Called before every stack of blocks.
        precisions: Precisions that every block is needed in.
        provider: What sessions run on.

    Returns:
        The cached rows and the new ones.
    """
    device = fingerprint_device(threads, provider)
    rows: dict[RowKey, TableRow] = {}
    if cached is not None and cached.device == device:
        rows.update(cached.index_rows())
    missing = _list_missing_rows(_merge_needs(needs), rows, precisions=precisions)
    with tempfile.TemporaryDirectory() as scratch:
        precisions_by_need = _group_by_need(missing)
        need_count = len(precisions_by_need)
        for i, (need, missing_precisions) in enumerate(precisions_by_need.items()):
            new_rows = _measure_rows(
                need,
                missing_precisions,
                settings=_SessionSettings(threads=threads, provider=provider),
                scratch=Path(scratch),
                progress=scale_progress(progress, start=i / need_count, end=(i + 1) / need_count),
            )
            rows.update({(row.key, row.precision): row for row in new_rows})
        disordered = list_disordered_rows(rows)
        for need, precision in missing:
            row_key = (need.key, precision)
            if row_key not in disordered:
                continue
            progress(f"{need.key.kind} blocks once more", None)
            [again] = _measure_rows(
                need,
                [precision],
                settings=_SessionSettings(threads=threads, provider=provider),
                scratch=Path(scratch),
                progress=ignore_progress,
            )
            rows[row_key] = _take_lower_ms(rows[row_key], again)
    return DeviceTable(device=device, threads=threads, rows=tuple(rows.values()))


def list_disordered_rows(rows: Rows) -> list[RowKey]:
    """List the rows that are slower than a row of as many positions and keys, or of more.

    Fewer positions never take more time: something else ran while such a row was measured. Only
    whole blocks of the same size are compared.
    """
    disordered: list[RowKey] = []
    for row_key, row in rows.items():
        for other in rows.values():
            is_alike = other.precision == row.precision and other.units[-1] == row.units[-1]
            if is_alike and _is_larger(other.key, row.key) and other.ms[-1] < row.ms[-1]:
                disordered.append(row_key)
                break
    return disordered


def _is_larger(key: TableKey, than: TableKey) -> bool:
    """Return whether a key is another one with more positions, or with more keys to read."""
    is_another = key != than
    has_as_many = key.positions >= than.positions and key.keys >= than.keys
    same_positions = replace(key, positions=than.positions, keys=than.keys)
    return is_another and has_as_many and same_positions == than


def _take_lower_ms(row: TableRow, again: TableRow) -> TableRow:
    """Return a row with the lower of two measurements of each size."""
    lower_ms = [min(pair) for pair in zip(row.ms, again.ms, strict=True)]
    return replace(row, ms=tuple(fit_rising(lower_ms)))


def _merge_needs(needs: Iterable[TableNeed]) -> list[TableNeed]:
    """Merge the needs of one key into one of the most units and the largest step, sorted by key."""
    merged: dict[TableKey, TableNeed] = {}
    for need in needs:
        merged_need = merged.get(need.key, need)
        merged[need.key] = TableNeed(
            key=need.key,
            units=max(merged_need.units, need.units),
            granularity=max(merged_need.granularity, need.granularity),
        )
    return [merged[key] for key in sorted(merged)]


def _list_missing_rows(
    needs: Sequence[TableNeed], rows: Rows, *, precisions: Sequence[str]
) -> list[tuple[TableNeed, str]]:
    """List the needs, with a precision each, that no row covers up to the largest size."""
    missing: list[tuple[TableNeed, str]] = []
    for need in needs:
        for precision in precisions:
            row = rows.get((need.key, precision))
            if row is None or row.units[-1] < need.units:
                missing.append((need, precision))
    return missing


def _group_by_need(missing: Sequence[tuple[TableNeed, str]]) -> dict[TableNeed, list[str]]:
    """Group missing rows: the precisions that each need lacks."""
    precisions_by_need: dict[TableNeed, list[str]] = {}
    for need, precision in missing:
        precisions_by_need.setdefault(need, []).append(precision)
    return precisions_by_need


def _measure_rows(
    need: TableNeed,
    precisions: Sequence[str],
    *,
    settings: _SessionSettings,
    scratch: Path,
    progress: StageProgress,
) -> list[TableRow]:
    """Measure one block in some precisions, each at several sizes."""
    whole_block = SizedBlock(key=need.key, units=need.units)
    is_large = _is_large(whole_block)
    sizes = choose_measured_sizes(
        need.units, need.granularity, eighths=FEW_EIGHTHS if is_large else EVERY_EIGHTH
    )
    stacks: list[_Stack] = []
    for precision in precisions:
        for size in sizes:
            block = SizedBlock(key=need.key, units=size)
            copies = 1 if _is_large(block) else STACKED_COPIES
            stacks.append(_Stack(block=block, copies=copies, precision=precision))
    block_ms = _time_blocks(stacks, settings=settings, scratch=scratch, progress=progress)
    rows: list[TableRow] = []
    for i, precision in enumerate(precisions):
        ms = block_ms[i * len(sizes) : (i + 1) * len(sizes)]
        rows.append(
            TableRow(key=need.key, precision=precision, units=sizes, ms=tuple(fit_rising(ms)))
        )
    return rows


def fit_rising(values: Sequence[float]) -> list[float]:
    """Return the nearest values, in least squares, of which none is less than the one before.

    More units never take less time: what falls is noise. The fit is

        fitted_i = max over j <= i of min over k >= i of mean(values_j .. values_k)

    (isotonic regression, Barlow et al. 1972).
    """
    fitted: list[float] = []
    for i in range(len(values)):
        lowest_means: list[float] = []
        for first in range(i + 1):
            ends = range(i, len(values))
            lowest_means.append(min(fmean(values[first : last + 1]) for last in ends))
        fitted.append(max(lowest_means))
    return fitted


def _is_large(block: SizedBlock) -> bool:
    """Return whether a block is timed alone: a rough count of its multiply-accumulates decides."""
    key = block.key
    columns = max(block.units, key.keys)
    if key.conv is not None:
        columns = max(columns, CONV_COLUMNS_PER_KERNEL_PLACE * key.conv.first_kernel)
    return key.positions * key.width * columns > LARGE_BLOCK_MACS


@dataclass(frozen=True, kw_only=True)
class _SessionSettings:
    """How sessions run."""

    threads: int
    """Threads of a session."""
    provider: str
    """What it runs on."""


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Equal blocks in a row, which are timed together."""

    block: SizedBlock
    """The block."""
    copies: int
    """How many there are; 0: the call costs just what any call does."""
    precision: str
    """Precision of their weights."""

    def load(self, settings: _SessionSettings, scratch: Path) -> _OpenStack:
        """Write the stack and open its session."""
        model = build_stack(self.block, self.copies)
        feed = make_random_feed(model)
        if self.precision == "fp32":
            model_bytes = model.SerializeToString()
        else:
            quantized_file, _ = quantize_model(
                self.precision, model, target=scratch / "q.onnx", feeds=[feed]
            )
            model_bytes = quantized_file.read_bytes()
        session = open_session(model_bytes, settings.threads, provider=settings.provider)
        return _OpenStack(
            copies=self.copies, call=partial(session.run, None, feed), size_bytes=len(model_bytes)
        )


@dataclass(frozen=True, kw_only=True)
class _OpenStack:
    """A stack that can be called."""

    copies: int
    """How many blocks there are."""
    call: Callable[[], object]
    """Runs it once."""
    size_bytes: int
    """Bytes of its model."""


def _time_blocks(
    stacks: Sequence[_Stack],
    *,
    settings: _SessionSettings,
    scratch: Path,
    progress: StageProgress,
) -> list[float]:
    """Return the milliseconds of one block of each stack, without those of an empty call.

    Stacks are called in turn. So all sizes meet the same pace of the machine. Each finds its
    weights out of the nearest caches, as it does inside a pipeline.
    """
    empty_stack = replace(stacks[0], copies=0, precision="fp32").load(settings, scratch)
    block_ms: list[float] = []
    turn: list[_OpenStack] = []
    for i, stack in enumerate(stacks):
        progress(f"{stack.block.key.kind} blocks", i / len(stacks))
        open_stack = stack.load(settings, scratch)
        size_bytes = sum(other.size_bytes for other in turn) + open_stack.size_bytes
        if turn and size_bytes > MAX_BYTES_IN_TURN:
            block_ms += _time_turn(turn, empty_stack)
            turn = []
        turn.append(open_stack)
    return block_ms + _time_turn(turn, empty_stack)


def _time_turn(turn: Sequence[_OpenStack], empty_stack: _OpenStack) -> list[float]:
    """Call stacks in turn, and return the milliseconds of one block of each."""
    empty_ms, *stack_ms = time_calls_in_turn(
        [empty_stack.call, *(stack.call for stack in turn)],
        STACK_WARMUP_CALLS,
        rounds=STACK_CALLS,
        limit=STACK_SECONDS * len(turn),
    )
    return [
        max(ms - empty_ms, MIN_STACK_MS) / stack.copies
        for stack, ms in zip(turn, stack_ms, strict=True)
    ]


def complete_table(
    needs: Iterable[TableNeed],
    threads: int,
    *,
    progress: StageProgress = ignore_progress,
    precisions: Sequence[str] = ("fp32", "int8"),
    provider: str = CPU_PROVIDER,
) -> DeviceTable:
    """Measure what the kept table of this device lacks, and keep the result.

    Args:
        needs: Blocks of a pipeline.
        threads: Threads of a session.
        progress: Called before every row.
        precisions: Precisions that every block is needed in.
        provider: What sessions run on.

    Returns:
        The table of this device, with a row for every need.
    """
    name = f"device-{fingerprint_device(threads, provider)}-{TABLE_FORMAT}.json"
    kept_table = None
    # this device was never measured, the file is damaged, or there is no cache: all is measured
    with suppress(DataError):
        kept_table = read_record(DeviceTable, locate_cache_folder() / name)
    table = measure_table(
        needs,
        threads,
        cached=kept_table,
        progress=progress,
        precisions=precisions,
        provider=provider,
    )
    # a cache folder that can't be written costs time, not the result
    with suppress(OSError, DataError):
        write_record(locate_cache_folder() / name, table)
    return table
