"""The search in a list of texts, in torch: one model embeds both the query and the list."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.kinds.base import Outputs, TrainableJoin, compute_share, compute_squared_distance


class TrainableLookup(TrainableJoin):
    """Compares the embedding of a text with errors to that of the text that it should find."""

    @property
    def query(self) -> tuple[str, str]:
        """The embedding behind the port `query`."""
        return self.sources["query"], "embedding"

    @property
    def keys(self) -> tuple[str, str]:
        """The same model's embedding of the text that should be found."""
        return self.sources["query"], "keys"

    def compute_losses(self, outputs: Outputs, *, reference: Outputs | None) -> dict[str, Tensor]:
        """Return the contrastive loss, and how far embeddings drifted from the dense model's.

        A list of texts may hold anything. The model behind it must therefore stay what it was.
        """
        parts = super().compute_losses(outputs, reference=reference)
        if reference is None:
            return parts
        query, keys = self.select_pair(outputs)
        dense_query, dense_keys = self.select_pair(reference)
        drift = compute_squared_distance(query, dense_query) + compute_squared_distance(
            keys, dense_keys
        )
        return {**parts, f"drift.{self.name}": drift / 2}

    def compute_quality(self, outputs: Outputs) -> dict[str, float]:
        """Return the share of queries whose nearest text is the right one."""
        nearest_key, _ = self.rank_pairs(outputs)
        own = torch.arange(len(nearest_key), device=nearest_key.device)
        return {"lookup_r1": compute_share(nearest_key == own)}
