"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Writer:
    """A linear layer or convolution that writes `width` rows for each unit, `parts` times over (a fused q, k, v: 3)."""

    path: str
    parts: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """A prunable sub-layer: `units` units of `width` features each, read by the linear layer `out`.

    Every unit kind fits this form: a unit's features are columns of `out`, and rows of the `writers` bring them about
    (a group of query heads has more of them than the key head it shares). `step` is the granularity of a cut, `reads`
    the streams whose values meet in the block, `drop` the modules replaced by a constant when no unit is left: (path,
    mode); where it is empty, the block can't be removed whole. Between writers and `out`, features may pass `through`
    modules that treat each alone (batch norms, depthwise convolutions) and be read by others `also` (a squeeze).

    Positions of a sequence are units too (`kind` tokens): `out` is the `models.base.Tokens` that passes on those kept.
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
        """What a unit counts where shares of several blocks are added up: its rows of writers and columns of `out`."""
        return self.width + sum(w.parts * w.width for w in self.writers)

    @property
    def min_units(self) -> int:
        """The fewest units that may be left."""
        return 0 if self.drop else min(self.granularity, self.units)

    @property
    def group(self) -> str:
        """`heads`, `ffn` (channels, of convolutions too) or `tokens`: what a pruning ratio in the spec speaks of."""
        if self.kind == "tokens":
            return "tokens"
        return "ffn" if self.kind.endswith("ffn") or self.kind == "conv" else "heads"


def count_steps(block: Block) -> int:
    """How many cuts of `step` units a block allows."""
    return -(-block.units // block.granularity)


def units_after(block: Block, removed: int | np.ndarray) -> int | np.ndarray:
    """Units left when `removed` steps are cut."""
    return np.maximum(block.units - np.asarray(removed) * block.granularity, block.min_units)
