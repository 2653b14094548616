"""An image encoder in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcompress.data.base import Pairs
from mmcompress.kinds.base import Batch, Outputs, TrainableNode
from mmcompress.models.base import Model
from mmcompress.runtime.images import preprocess_image


class TrainableImageEncoder(TrainableNode):
    """Pixels [b, 3, height, width] to an embedding [b, d] and tokens [b, n, w]."""

    def collate(self, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
        """Resize and normalize the pictures of some pairs."""
        options = self.setup.config["preprocess"]
        pixels = [preprocess_image(picture, options) for picture in pairs.inputs]
        return torch.from_numpy(np.stack(pixels)), None

    def forward(self, model: Model, batch: Batch, *, outputs: Outputs) -> dict[str, Tensor]:
        """Run the encoder on the pixels of a batch."""
        embedding, tokens = model(batch.inputs[self.name])
        return {"embedding": embedding, "tokens": tokens}

    @staticmethod
    def make_random_inputs(
        model: Any, batch_size: int, *, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """Return random pixels [b, 3, height, width]."""
        return (torch.randn((batch_size, *model.image_shape), generator=generator),)
