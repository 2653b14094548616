"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A linear layer or convolution that writes `width` rows for each unit, `parts` times over (a
    fused q, k, v: 3)."""

    path: str
    parts: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """A prunable sub-layer: `units` units of `width` features each, read by the linear layer `out`.

    Every unit kind fits this form: a unit's features are columns of `out`, and rows of the
    `writers` bring them about (a group of query heads has more of them than the key head it
    shares). `step` is the granularity of a cut, `reads` the streams whose values meet in the block,
    `drop` the modules replaced by a constant when no unit is left: (path, mode); where it is empty,
    the block can't be removed whole. Between writers and `out`, features may pass `through` modules
    that treat each alone (batch norms, depthwise convolutions) and be read by others `also` (a
    squeeze).

    Positions of a sequence are units too (`kind` tokens): `out` is the `models.base.Tokens` that
    passes on those kept.
    """

    name: str
    kind: str
    reader: str
    writers: tuple[Writer, ...]
    units: int
    width: int
    granularity: int
    module: str
    reads: tuple[str, ...]
    drop: tuple[tuple[str, str], ...]
    per_channel: tuple[str, ...] = ()
    extra_readers: tuple[str, ...] = ()
    prefix_only: bool = False
    """Units go from the end alone (the window of an audio encoder)."""

    @property
    def rows_and_columns_per_unit(self) -> int:
        """What a unit counts where shares of several blocks are added up: its rows of writers and
        columns of `out`."""
        return self.width + sum(w.parts * w.width for w in self.writers)

    @property
    def min_units(self) -> int:
        """The fewest units that may be left."""
        return 0 if self.drop else min(self.granularity, self.units)

    @property
    def group(self) -> str:
        """`heads`, `ffn` (channels, of convolutions too) or `tokens`: what a pruning ratio in the
        spec speaks of."""
        if self.kind == "tokens":
            return "tokens"
        return "ffn" if self.kind.endswith("ffn") or self.kind == "conv" else "heads"


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


def count_steps(block: Block) -> int:
    """How many cuts of `step` units a block allows."""
    return -(-block.units // block.granularity)


def units_after(block: Block, removed: int | np.ndarray) -> int | np.ndarray:
    """Units left when `removed` steps are cut."""
    return np.maximum(block.units - np.asarray(removed) * block.granularity, block.min_units)


def cut_by_share(block: Block, share: float) -> int:
    """Count the units left when a share of a block's steps is cut, rounded to the nearest step."""
    return int(units_after(block, round(share * count_steps(block))))


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
        kept_units.append(int(units_after(block, steps)))
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
    exact = [removed_steps * size / sum(sizes) for size in sizes]
    cuts = [int(cut) for cut in exact]

    def measure_excess(place: int) -> float:
        return cuts[place] - exact[place]

    left_over = removed_steps - sum(cuts)
    for place in sorted(range(len(sizes)), key=measure_excess)[:left_over]:
        cuts[place] += 1
    return cuts
