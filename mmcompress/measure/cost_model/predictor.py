"""End-to-end latency of a candidate, from the device table and a calibration on whole exports. No
torch.

The prediction of a pipeline, in milliseconds, for its nodes n and their blocks b:

    pipeline = factor * request_factor * (path over n of node_n + overhead)
    node_n   = outside_n + remaining_n * base_n + sum over b of block_b
    block_b  = scale_n * table_b + (per_block_n where b has units left)

`path` is the sum of all nodes, or the longest way where branches run in parallel. `fit_predictor`
finds the terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Protocol

import numpy as np

from mmcompress.graph.blocks import Block, ConvGeometry
from mmcompress.graph.structure import Candidate, Fp32Blocks, KeptUnits, find_fp32_blocks
from mmcompress.measure.cost_model.device_table import DeviceTable, Rows, TableNeed, interpolate_ms
from mmcompress.measure.cost_model.microbenchmarks import TableKey
from mmcompress.runtime.graph import sum_critical_path

Cuts = Mapping[str, int]
"""Positions that are cut, by the node whose positions they are."""

NO_CUTS: Cuts = MappingProxyType({})
"""Every position of every node stays."""

MIN_TABLE_SPREAD_MS = 1e-6
"""Milliseconds between the smallest and the largest table sum of a fit. Below it no line can be
fitted."""

TERMS_IN_PIPELINE = ((0, 1, 2), (0, 1), (1, 2), (1,))
"""Terms of a fit inside pipelines (0: base, 1: scale, 2: per block) that are tried together.

Every choice has the scale: a node whose time does not depend on its blocks could not be searched.
"""


@dataclass(frozen=True, kw_only=True)
class DeployedBlock:
    """A block as deployed: its key in the table, and how often a request runs it."""

    name: str
    """Name of the block in its model."""
    units: int
    """Units of the whole block."""
    granularity: int
    """Units of one cut."""
    key: TableKey
    """Kind and sizes of the block: its row in the table."""
    calls: float
    """Calls per request: 1, or the steps of a decode loop."""
    context: TableKey | None = None
    """What runs once a request besides the loop: K and V of a cross-attention, or the block over a
    prefix."""
    window: str = ""
    """The node whose positions pass through the block, or are its keys: a cut there makes it
    shorter. Empty: none."""

    def shorten_keys(self, cut: int) -> tuple[TableKey, TableKey | None]:
        """Return `key` and `context` as they are when `cut` positions of the window are gone."""
        if self.context is None:
            return _shorten_key(self.key, positions=cut, keys=cut), None
        # the loop computes as many positions as before, and reads fewer
        loop_key = _shorten_key(self.key, positions=0, keys=cut)
        return loop_key, _shorten_key(self.context, positions=cut, keys=cut)


def _shorten_key(key: TableKey, *, positions: int, keys: int) -> TableKey:
    """Take positions and key positions away from a key; a block without attention has one key
    position."""
    return TableKey(
        kind=key.kind,
        width=key.width,
        head=key.head,
        positions=key.positions - positions,
        keys=key.keys - keys if key.keys > 1 else key.keys,
        batch=key.batch,
        conv=key.conv,
    )


@dataclass(frozen=True, kw_only=True)
class PositionWindow:
    """Positions of a node that can be cut."""

    count: int
    """Positions of the whole node."""
    prefix_only: bool
    """Whether positions go from the end only. Then what runs before the blocks becomes shorter
    too."""
    cuts: tuple[int, ...]
    """Numbers of cut positions that the table is measured at, smallest first, without 0."""


@dataclass(frozen=True, kw_only=True)
class LinearFit:
    """The line from table to measurement: measured = base + scale * table sum + per_block_ms *
    blocks that are left.

    Sizes of files are fitted by the same record: megabytes = base + scale * millions of parameters.
    """

    base: float
    """Milliseconds (or megabytes) that no block accounts for."""
    scale: float
    """Measured milliseconds per millisecond of the table (or megabytes per million parameters)."""
    per_block_ms: float = 0.0
    """Milliseconds of a block besides its units. Only fits inside pipelines can tell it apart."""

    def multiply(self, factor: float) -> LinearFit:
        """Return the fit with every term multiplied by a factor."""
        return LinearFit(
            base=self.base * factor,
            scale=self.scale * factor,
            per_block_ms=self.per_block_ms * factor,
        )

    @classmethod
    def fit_in_pipeline(
        cls, table_ms: Sequence[float], block_counts: Sequence[int], *, measured_ms: Sequence[float]
    ) -> LinearFit | None:
        """Fit all three terms to measurements inside pipelines.

        It minimizes

            sum over i of ((base + scale * table_i + per_block * blocks_i) / measured_i - 1)^2

        with no term negative. These are least squares in relative error, so small structures count
        as much as the whole. Then all terms are scaled so that the line goes through the first
        point, which is the whole node.

        Args:
            table_ms: Table sums of the structures, the whole node first.
            block_counts: Blocks that are left in each of them.
            measured_ms: What was measured of each of them.

        Returns:
            The fit; None when no choice of terms gives a rising line without negative terms.
        """
        measured = np.asarray(measured_ms)
        terms = [1 / measured, np.asarray(table_ms) / measured, np.asarray(block_counts) / measured]
        relative_terms = np.stack(terms, 1)
        best_error = float("inf")
        best_terms: np.ndarray | None = None
        for term_names in TERMS_IN_PIPELINE:
            columns = list(term_names)
            solution = np.zeros(len(terms))
            solution[columns] = np.linalg.lstsq(
                relative_terms[:, columns], np.ones(len(measured)), rcond=None
            )[0]
            is_rising = solution[1] > 0
            if not is_rising or (solution < 0).any():
                continue
            error = float(np.square(relative_terms @ solution - 1).sum())
            if error < best_error:
                best_error = error
                best_terms = solution
        if best_terms is None:
            return None
        predicted_share_of_whole = relative_terms[0] @ best_terms
        base, scale, per_block_ms = (best_terms / predicted_share_of_whole).tolist()
        return cls(base=base, scale=scale, per_block_ms=per_block_ms)

    @classmethod
    def fit_line(
        cls,
        predicted: Sequence[float],
        measured: Sequence[float],
        *,
        base_shares: Sequence[float] = (),
    ) -> LinearFit:
        """Fit base and scale by least squares in relative error, no term negative.

        Minimizes sum over i of ((base_share_i * base + scale * predicted_i) / measured_i - 1)^2.

        Args:
            predicted: Table sums in milliseconds, or millions of parameters.
            measured: Milliseconds, or megabytes.
            base_shares: Share of the base that each structure still has, 0..1; default: all of it.

        Returns:
            The fit. Without a spread of `predicted` it has a scale only.
        """
        x = np.asarray(predicted)
        y = np.asarray(measured)
        base_share = np.asarray(base_shares) if len(base_shares) else np.ones(len(x))
        if len(x) == 0:
            return cls(base=0.0, scale=1.0)
        if len(x) == 1 or np.ptp(x) < MIN_TABLE_SPREAD_MS:
            return cls(base=0.0, scale=float(np.mean(y / x)))
        relative_terms = np.stack([base_share / y, x / y], 1)
        solution, *_ = np.linalg.lstsq(relative_terms, np.ones(len(x)), rcond=None)
        base, scale = solution
        if scale <= 0:
            return cls(base=float(np.mean(y / base_share)), scale=0.0)
        if base < 0:
            return cls(base=0.0, scale=float(1 / np.mean(x / y)))
        return cls(base=float(base), scale=float(scale))


NodeKey = tuple[str, str, tuple[int, ...], tuple[int, ...]]
"""Node, precision, units of its blocks, and cuts of the windows that it feels."""

MAX_KNOWN_NODES = 100_000
"""Predictions of nodes that are kept at a time."""


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Predicts the latency of a pipeline from the structure and the precision of its nodes.

    Nodes run one after the other on the same cores, or along the critical path of `reads`. Methods
    named for their unit (`node_ms`, `block_ms`, ...) return a prediction in that unit.
    """

    table: DeviceTable
    """Milliseconds of single blocks on the device."""
    deployed: dict[str, tuple[DeployedBlock, ...]]
    """Blocks by node."""
    fits: dict[str, dict[str, LinearFit]]
    """The line from the table to the sessions of a node, by node and precision."""
    overhead_ms: float
    """Milliseconds of a request that belong to no node."""
    correction: float = 1.0
    """Measured / predicted latency of the last artifact that missed its target; 1 before there is
    one."""
    windows: dict[str, PositionWindow] = field(default_factory=dict)
    """Positions that can be cut, by node."""
    size_fits: dict[str, dict[str, LinearFit]] = field(default_factory=dict)
    """Megabytes of a node against its parameters in millions, by node and precision."""
    fp32_blocks: Fp32Blocks = field(default_factory=dict)
    """Blocks that stay in fp32, by node and precision."""
    reads: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Nodes that each node waits for. Empty where all nodes run one after the other."""
    outside_sessions_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a node besides its sessions: the preparation of inputs, the decode loop."""
    p95_ratio: float = 1.0
    """p95 / p50 of a request where the target is a p95; else 1."""
    request_factor: float = 1.0
    """p50 of a dense request / what the p50s of its nodes and the overhead add up to. A median of
    sums is no sum of medians, on a machine that changes its pace above all."""

    @property
    def factor(self) -> float:
        """Predicted latency of a request / what its nodes and the overhead add up to."""
        return self.correction * self.p95_ratio * self.request_factor

    def correct_nodes(self, factors: Mapping[str, float]) -> Predictor:
        """Return a predictor that predicts another latency of some nodes, in every precision.

        Args:
            factors: Measured / predicted latency, by node; 1 where a node is missing.
        """
        fits: dict[str, dict[str, LinearFit]] = {}
        outside_sessions_ms = dict(self.outside_sessions_ms)
        for node, fits_by_precision in self.fits.items():
            factor = factors.get(node, 1.0)
            fits[node] = {
                precision: fit.multiply(factor) for precision, fit in fits_by_precision.items()
            }
            if node in outside_sessions_ms:
                outside_sessions_ms[node] *= factor
        return replace(self, fits=fits, outside_sessions_ms=outside_sessions_ms)

    def correct_precision(self, node: str, *, precision: str, factor: float) -> Predictor:
        """Return a predictor that predicts another latency of a node in one precision.

        What the node takes outside its sessions does not depend on the precision, so the sessions
        take the whole change.

        Args:
            node: The node.
            precision: The precision.
            factor: Latency of the node / predicted latency.
        """
        outside_ms = self.outside_sessions_ms.get(node, 0.0)
        fit = self.fits[node][precision]
        changed_fit = fit.multiply(factor)
        changed_fit = replace(changed_fit, base=changed_fit.base + (factor - 1) * outside_ms)
        fits = {**self.fits, node: {**self.fits[node], precision: changed_fit}}
        return replace(self, fits=fits)

    def combine_node_ms(self, node_ms: Mapping[str, float]) -> float:
        """Return what nodes take together.

        Args:
            node_ms: Milliseconds by node.

        Returns:
            Milliseconds: their sum, or the longest way where branches run in parallel.
        """
        if self.reads:
            return sum_critical_path(node_ms, self.reads)
        return sum(node_ms.values())

    def choose_block_precision(self, node: str, block: str, *, precision: str) -> str:
        """Return the precision that a block has in a node of some precision: fp32 for a sensitive
        one."""
        fp32_blocks = find_fp32_blocks(self.fp32_blocks, node, precision=precision)
        return "fp32" if block in fp32_blocks else precision

    def predict_table_ms(
        self,
        node: str,
        kept_units: KeptUnits,
        *,
        precision: str,
        rows: Rows,
        cuts: Cuts = NO_CUTS,
    ) -> float:
        """Sum the table over the blocks of a node.

        Args:
            node: The node.
            kept_units: Units by block; a block that is missing is whole.
            precision: Precision of the node.
            rows: Rows of the table.
            cuts: Positions that are cut.

        Returns:
            Milliseconds per request.
        """
        total = 0.0
        for block in self.deployed[node]:
            total += self.look_up_block_ms(
                rows,
                block,
                units=kept_units.get(block.name, block.units),
                precision=self.choose_block_precision(node, block.name, precision=precision),
                cuts=cuts,
            )
        return total

    def look_up_block_ms(
        self, rows: Rows, block: DeployedBlock, *, units: int, precision: str, cuts: Cuts = NO_CUTS
    ) -> float:
        """Look a block up in the table, linear between the cuts that were measured.

        Args:
            rows: Rows of the table.
            block: The block.
            units: Units that are left.
            precision: Precision of the block itself.
            cuts: Positions that are cut.

        Returns:
            Milliseconds per request.
        """
        cut = cuts.get(block.window, 0)
        if not cut:
            return _sum_calls_ms(rows, block, units=units, precision=precision, cut=0)
        measured_cuts = self.windows[block.window].cuts
        longer_cuts = [measured for measured in measured_cuts if measured >= cut]
        high_cut = longer_cuts[0] if longer_cuts else measured_cuts[-1]
        low_cut = max((measured for measured in measured_cuts if measured < high_cut), default=0)
        low_ms = _sum_calls_ms(rows, block, units=units, precision=precision, cut=low_cut)
        high_ms = _sum_calls_ms(rows, block, units=units, precision=precision, cut=high_cut)
        return low_ms + (high_ms - low_ms) * (cut - low_cut) / (high_cut - low_cut)

    def predict_node_table_ms(
        self,
        node: str,
        kept_units: KeptUnits,
        *,
        precision: str,
        rows: Rows,
        cuts: Cuts = NO_CUTS,
    ) -> float:
        """Return the predicted milliseconds of a node per request, before the correction. See
        `table_ms`."""
        blocks_ms = 0.0
        for block in self.deployed[node]:
            blocks_ms += self.predict_block_ms(
                node,
                block,
                units=kept_units.get(block.name, block.units),
                precision=precision,
                rows=rows,
                cuts=cuts,
            )
        return self.predict_base_ms(node, precision, cuts=cuts) + blocks_ms

    def predict_block_ms(
        self,
        node: str,
        block: DeployedBlock,
        *,
        units: int,
        precision: str,
        rows: Rows,
        cuts: Cuts = NO_CUTS,
    ) -> float:
        """Return the milliseconds of one block per request, as it runs in its node.

        Args:
            node: The node.
            block: One of its blocks.
            units: Units that are left.
            precision: Precision of the node.
            rows: Rows of the table.
            cuts: Positions that are cut.

        Returns:
            Milliseconds, before the correction.
        """
        fit = self.fits[node][precision]
        table_ms = self.look_up_block_ms(
            rows,
            block,
            units=units,
            precision=self.choose_block_precision(node, block.name, precision=precision),
            cuts=cuts,
        )
        return fit.scale * table_ms + (fit.per_block_ms if units else 0.0)

    def predict_fixed_ms(self, candidate: Candidate) -> float:
        """Return the milliseconds of a request that no block accounts for."""
        return self.factor * (self.combine_node_ms(self._list_bases(candidate)) + self.overhead_ms)

    def predict_fixed_ms_by_node(self, candidate: Candidate) -> dict[str, float]:
        """Return the milliseconds of each node that no block accounts for."""
        return {node: self.factor * ms for node, ms in self._list_bases(candidate).items()}

    def _list_bases(self, candidate: Candidate) -> dict[str, float]:
        """Return the milliseconds of each node besides its blocks, before the correction."""
        cuts = self.count_cut_positions(candidate.kept_units)
        return {
            node: self.predict_base_ms(node, candidate.precision[node], cuts=cuts)
            for node in self.deployed
        }

    def predict_node_ms(self, node: str, candidate: Candidate) -> float:
        """Return the predicted p50 of one node in milliseconds."""
        return self.correction * self.predict_node_table_ms(
            node,
            candidate.kept_units[node],
            precision=candidate.precision[node],
            rows=self.table.index_rows(),
            cuts=self.count_cut_positions(candidate.kept_units),
        )

    def predict_base_ms(self, node: str, precision: str, *, cuts: Cuts) -> float:
        """Return the milliseconds of a node besides its blocks, before the correction."""
        remaining_share = self.compute_remaining_share(node, cuts.get(node, 0))
        in_sessions_ms = self.fits[node][precision].base * remaining_share
        return self.outside_sessions_ms.get(node, 0.0) + in_sessions_ms

    def compute_remaining_share(self, node: str, cut: int) -> float:
        """Return the share of a node's base that a cut of positions leaves.

        Where positions go from the end, all that runs before the blocks becomes shorter too.
        """
        window = self.windows.get(node)
        if window is None or not window.prefix_only:
            return 1.0
        return 1 - cut / window.count

    def count_cut_positions(self, kept_units: Mapping[str, KeptUnits]) -> dict[str, int]:
        """Count the positions that a structure leaves out, by node."""
        cuts: dict[str, int] = {}
        for node, window in self.windows.items():
            cuts[node] = window.count - kept_units.get(node, {}).get("tokens", window.count)
        return cuts

    def __call__(self, candidate: Candidate) -> float:
        """Predict the latency of a request.

        Args:
            candidate: Kept units and precision of every node.

        Returns:
            Milliseconds: the p50, or the p95 where the target is one.
        """
        cuts = self.count_cut_positions(candidate.kept_units)
        node_ms: dict[str, float] = {}
        for node in self.deployed:
            node_ms[node] = self._recall_node_ms(
                node, candidate.kept_units[node], precision=candidate.precision[node], cuts=cuts
            )
        return self.factor * (self.combine_node_ms(node_ms) + self.overhead_ms)

    def _recall_node_ms(
        self, node: str, kept_units: KeptUnits, *, precision: str, cuts: Cuts
    ) -> float:
        """Return `predict_node_table_ms`, which is kept: structures of a search differ in few
        nodes."""
        units = tuple(kept_units.get(block.name, block.units) for block in self.deployed[node])
        seen_cuts = tuple(cuts.get(window, 0) for window in self._windows_by_node[node])
        key = (node, precision, units, seen_cuts)
        known_ms = self._known_node_ms
        if key not in known_ms:
            if len(known_ms) >= MAX_KNOWN_NODES:
                known_ms.clear()
            known_ms[key] = self.predict_node_table_ms(
                node,
                kept_units,
                precision=precision,
                rows=self.table.index_rows(),
                cuts=cuts,
            )
        return known_ms[key]

    @cached_property
    def _known_node_ms(self) -> dict[NodeKey, float]:
        return {}

    @cached_property
    def _windows_by_node(self) -> dict[str, tuple[str, ...]]:
        """The windows whose cuts a node feels: its own, and those that its blocks look at."""
        windows: dict[str, tuple[str, ...]] = {}
        for node, blocks in self.deployed.items():
            windows[node] = tuple(dict.fromkeys([node, *(block.window for block in blocks)]))
        return windows


def _sum_calls_ms(
    rows: Rows, block: DeployedBlock, *, units: int, precision: str, cut: int
) -> float:
    """Return the milliseconds of all calls of a block in a request, at a cut that the table
    holds."""
    key = block.key
    context = block.context
    if cut:
        key, context = block.shorten_keys(cut)
    loop_ms = block.calls * interpolate_ms(rows, key, units=units, precision=precision)
    if context is None:
        return loop_ms
    return loop_ms + interpolate_ms(rows, context, units=units, precision=precision)


class ShapeInModel(Protocol):
    """What `models.base.BlockShape` tells of a block. That module imports torch, this one must
    not."""

    @property
    def width(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def calls(self) -> float: ...
    @property
    def prefill(self) -> int: ...
    @property
    def conv(self) -> ConvGeometry | None: ...


def deploy_blocks(
    blocks: Sequence[Block],
    shapes: Mapping[str, ShapeInModel],
    *,
    own_window: str,
    context_window: str,
    batch: int = 1,
) -> tuple[DeployedBlock, ...]:
    """Give blocks the keys that they have in the table.

    Args:
        blocks: Blocks of one node; those of positions are left out.
        shapes: Shapes by block.
        own_window: The node itself where its positions can be cut; else empty.
        context_window: The node that it reads where the positions of that one can be cut; else
            empty.
        batch: Requests that are answered together.

    Returns:
        The blocks as deployed.
    """
    deployed: list[DeployedBlock] = []
    for block in blocks:
        if block.group == "tokens":
            continue
        shape = shapes[block.name]
        key = TableKey(
            kind=block.kind,
            width=shape.width,
            head=shape.head or block.width,
            positions=shape.positions,
            keys=shape.keys,
            batch=batch * shape.batch,
            conv=shape.conv,
        )
        context = _make_context_key(block, shape, batch=batch)
        deployed.append(
            DeployedBlock(
                name=block.name,
                units=block.units,
                granularity=block.granularity,
                key=key,
                calls=shape.calls,
                context=context,
                window=own_window if context is None else context_window,
            )
        )
    return tuple(deployed)


def _make_context_key(block: Block, shape: ShapeInModel, *, batch: int) -> TableKey | None:
    """Make the key of what a block runs once a request, before the decode loop; None where it runs
    nothing."""
    if shape.prefill:
        kind = block.kind
        positions = shape.prefill
    elif block.kind == "cross_attention":
        kind = "context"
        positions = shape.keys
    else:
        return None
    return TableKey(
        kind=kind,
        width=shape.width,
        head=block.width,
        positions=positions,
        keys=positions,
        batch=batch,
    )


def list_table_needs(
    deployed: Mapping[str, Sequence[DeployedBlock]], windows: Mapping[str, PositionWindow]
) -> list[TableNeed]:
    """List what the device table must hold to predict a pipeline.

    Args:
        deployed: Blocks by node.
        windows: Positions that can be cut, by node.

    Returns:
        A need for every key of every block, whole and at every measured cut.
    """
    needs: list[TableNeed] = []
    for blocks in deployed.values():
        for block in blocks:
            window = windows.get(block.window)
            needs += _list_keys_at_cut(block, 0, granularity=block.granularity)
            # a shorter window needs fewer sizes: four of a block will do
            quarter = -(-block.units // 4)
            for cut in window.cuts if window else ():
                granularity = max(block.granularity, quarter)
                needs += _list_keys_at_cut(block, cut, granularity=granularity)
    return needs


def _list_keys_at_cut(block: DeployedBlock, cut: int, *, granularity: int) -> list[TableNeed]:
    """List the needs of one block when `cut` positions are gone."""
    needs: list[TableNeed] = []
    for key in block.shorten_keys(cut):
        if key is not None:
            needs.append(TableNeed(key=key, units=block.units, granularity=granularity))
    return needs
