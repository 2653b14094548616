"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mmcompress.models.base import Model

Outputs = dict[str, dict[str, Tensor]]


Models = Mapping[str, Model]


@dataclass(frozen=True)
class Batch:
    """Inputs of every model for b pairs: `inputs[node]` pixels [b, 3, s, s], features [b, m, f] or ids [b, t].

    The tower behind a lookup reads two texts each, ids [b, 2, t]: the query and what it should find.
    `keep[node]` [b, p]: which positions hold something, where not all do; of a generator those with a next token.
    `names`: of the pairs, where they have any.
    """

    inputs: dict[str, Tensor]
    keep: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: slice) -> Batch:
        of = lambda by: {k: v[index] for k, v in by.items()}
        return Batch(of(self.inputs), of(self.keep), self.names[index])

    def pick(self, places: Sequence[int]) -> Batch:
        """The pairs at some places."""
        of = lambda by: {k: v[list(places)] for k, v in by.items()}
        return Batch(
            of(self.inputs),
            of(self.keep),
            tuple(self.names[i] for i in places) if self.names else (),
        )

    def chunks(self, size: int) -> list[Batch]:
        return [self[i : i + size] for i in range(0, len(self), size)]


@dataclass(frozen=True)
class Join:
    """Two embeddings that are compared: outputs (node, name) of the query and of what it should find."""

    query: tuple[str, str]
    keys: tuple[str, str]
    lookup: bool = False

    @property
    def name(self) -> str:
        """Of its two models, or the one of a lookup."""
        return ".".join(dict.fromkeys((self.query[0], self.keys[0])))

    def pair(self, out: Outputs) -> tuple[Tensor, Tensor]:
        (q, a), (k, b) = self.query, self.keys
        return out[q][a], out[k][b]
