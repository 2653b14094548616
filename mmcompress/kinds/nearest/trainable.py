"""The choice among a few texts, in torch: two embeddings are compared."""

from __future__ import annotations

import torch

from mmcompress.kinds.base import Outputs, TrainableJoin, compute_share


class TrainableNearest(TrainableJoin):
    """Compares the embeddings of two models, such as a picture's and a text's."""

    @property
    def query(self) -> tuple[str, str]:
        """The embedding behind the port `query`."""
        return self.sources["query"], "embedding"

    @property
    def keys(self) -> tuple[str, str]:
        """The embedding behind the port `keys`."""
        return self.sources["keys"], "embedding"

    def compute_quality(self, outputs: Outputs) -> dict[str, float]:
        """Return R@1 both ways among the pairs of a batch."""
        nearest_key, nearest_query = self.rank_pairs(outputs)
        own = torch.arange(len(nearest_key), device=nearest_key.device)
        return {
            "image_to_text_r1": compute_share(nearest_key == own),
            "text_to_image_r1": compute_share(nearest_query == own),
        }
