"""A prunable block: which units it has, who writes them, who reads them, and how it is cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A linear layer or a convolution that writes the units of a block."""

    path: str
    """Path of the module in its model."""
    parts: int
    """Times that it holds the block's features: 3 for a fused q, k, v projection, else 1."""
    width: int
    """Rows that it writes for each unit, in each of its parts."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A prunable sub-layer.

    Every kind of unit fits one form. The features of a unit are columns of the `reader`, and rows
    of the `writers` make them. A group of query heads has more rows than the key head that it
    shares. Positions of a sequence are units too, of kind `tokens`: their `reader` is the
    `TokenSelector` that passes on the positions that are kept.
    """

    name: str
    """Name within its model: `3.attention`."""
    kind: str
    """Kind of block: `attention`, `cross_attention`, `ffn`, `gated_ffn`, `conv` or `tokens`."""
    reader: str
    """Path of the layer that reads the units."""
    writers: tuple[Writer, ...]
    """The layers that write the units."""
    units: int
    """Units that the block has: heads, channels or positions."""
    width: int
    """Features of a unit: columns of the reader."""
    granularity: int
    """Units that are cut at a time: unrounded sizes are slow."""
    module: str
    """Path of the module that repeats sizes of the block as attributes."""
    reads: tuple[str, ...]
    """The streams whose values meet in the block: `stream`, and input ports of the node."""
    drop: tuple[tuple[str, str], ...]
    """What replaces modules when no unit is left: (path, name in `REPLACEMENTS`). Empty: the block
    can't be removed whole."""
    per_channel: tuple[str, ...] = ()
    """Modules between writers and reader that treat each feature alone: batch norms, depthwise
    convolutions."""
    extra_readers: tuple[str, ...] = ()
    """Further layers that read the units: a squeeze-and-excitation."""
    prefix_only: bool = False
    """Whether units go from the end only, as in the window of an audio encoder."""

    @property
    def rows_and_columns_per_unit(self) -> int:
        """Rows of the writers and columns of the reader that go with one unit.

        Shares of several blocks are added up by it.
        """
        written_rows = sum(writer.parts * writer.width for writer in self.writers)
        return self.width + written_rows

    @property
    def min_units(self) -> int:
        """The fewest units that may be left."""
        return 0 if self.drop else min(self.granularity, self.units)

    @property
    def group(self) -> str:
        """The pruning ratio of a spec that speaks of it: `heads`, `ffn` or `tokens`."""
        if self.kind == "tokens":
            return "tokens"
        is_feed_forward = self.kind.endswith("ffn") or self.kind == "conv"
        return "ffn" if is_feed_forward else "heads"


@dataclass(frozen=True, kw_only=True, order=True)
class ConvGeometry:
    """The kernels and the stride of a block of convolutions: channels in -> units -> channels
    out."""

    first_kernel: int
    """Side in places: the kernel that writes the units."""
    last_kernel: int
    """Side in places: the kernel that reads the units."""
    stride: int
    """Places that the depthwise convolution moves by; the first one does where there is none."""
    depthwise_kernel: int = 0
    """Side in places: the kernel of a depthwise convolution between the two. 0: there is none."""


def list_input_readers(blocks: Iterable[Block]) -> tuple[str, ...]:
    """List the blocks through which a model reads its input.

    These are its cross-attention, or its attention where it has none. Without any of them no token
    of the answer depends on another one: a class token never meets the picture.

    Args:
        blocks: All blocks of one model.

    Returns:
        Their names; empty for a model of convolutions.
    """
    names_by_kind: dict[str, list[str]] = {}
    for block in blocks:
        names_by_kind.setdefault(block.kind, []).append(block.name)
    attention = names_by_kind.get("attention", [])
    return tuple(names_by_kind.get("cross_attention", attention))


def count_droppable_blocks(blocks: Sequence[Block]) -> int:
    """Count the blocks of one model that can be gone at once: one that reads its input stays."""
    droppable_names = {block.name for block in blocks if block.min_units == 0}
    readers = list_input_readers(blocks)
    all_readers_go = bool(readers) and droppable_names.issuperset(readers)
    return len(droppable_names) - int(all_readers_go)


def count_steps(block: Block) -> int:
    """Count the cuts of `granularity` units that a block allows."""
    return -(-block.units // block.granularity)


def count_units_after(block: Block, removed: int | np.ndarray) -> int | np.ndarray:
    """Return the units that are left when `removed` steps are cut."""
    left: int | np.ndarray = np.maximum(
        block.units - np.asarray(removed) * block.granularity, block.min_units
    )
    return left


def cut_by_share(block: Block, share: float) -> int:
    """Count the units left when a share of a block's steps is cut, rounded to the nearest step."""
    return int(count_units_after(block, round(share * count_steps(block))))


def cut_evenly(blocks: Sequence[Block], removed_steps: int) -> list[int]:
    """Count the units left in each block when steps are cut in proportion to the sizes of the
    blocks.

    Args:
        blocks: The blocks that share the cut.
        removed_steps: Steps to cut of all of them together.

    Returns:
        Units left in each block, in order.
    """
    sizes = [count_steps(block) for block in blocks]
    kept_units = []
    for block, steps in zip(blocks, apportion_cuts(sizes, removed_steps), strict=True):
        kept_units.append(int(count_units_after(block, steps)))
    return kept_units


def apportion_cuts(sizes: Sequence[int], removed_steps: int) -> list[int]:
    """Apportion a number of cuts in proportion to sizes, by the largest remainder.

    Of equal remainders the first one gets the cut.

    Args:
        sizes: Steps that each place has.
        removed_steps: Cuts to share out.

    Returns:
        Cuts of each place; they add up to `removed_steps`.
    """
    exact_steps = [removed_steps * size / sum(sizes) for size in sizes]
    cuts = [int(cut) for cut in exact_steps]

    def measure_excess(place: int) -> float:
        return cuts[place] - exact_steps[place]

    leftover_steps = removed_steps - sum(cuts)
    for place in sorted(range(len(sizes)), key=measure_excess)[:leftover_steps]:
        cuts[place] += 1
    return cuts
