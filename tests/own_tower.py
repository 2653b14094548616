"""A user's own image encoder for tests: patches, one self-attention, one cross-attention.

A few learned queries read the patches in the cross-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.models.base import ImageEncoderModel, LoadContext
from mmcompress.models.layouts import find_blocks

PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}


class Attention(nn.Module):
    """Heads of a fixed width, however many are left."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.num_heads = heads
        self.head_dim = width // heads

    def forward(
        self, x: Tensor, context: Tensor, padding: Tensor | None = None
    ) -> tuple[Tensor, None]:
        queries = self._split_heads(self.q_proj(x))
        keys = self._split_heads(self.k_proj(context))
        values = self._split_heads(self.v_proj(context))
        scores = queries @ keys.transpose(-1, -2) * self.head_dim**-0.5
        if padding is not None:
            scores = scores.masked_fill(padding, float("-inf"))
        weights = torch.softmax(scores, -1)
        return self.out_proj((weights @ values).transpose(1, 2).flatten(2)), None

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)


class Reader(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.encoder_attn = Attention(width, heads)
        self.queries = nn.Parameter(torch.randn(1, 4, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x)[0]
        queries = self.queries.expand(x.shape[0], -1, -1)
        return queries + self.encoder_attn(queries, x)[0]


class Tower(ImageEncoderModel):
    def __init__(self, width: int = 32, heads: int = 4, size: int = 32):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.layers = nn.ModuleList([Reader(width, heads)])
        self.blocks = find_blocks(self, "layers", context="stream")
        self.finish_setup(size, width, preprocess=PREPROCESS, hidden_positions=12)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.layers[0](self.patch(pixels).flatten(2).transpose(1, 2))
        return F.normalize(tokens.mean(1), dim=-1), tokens


def build(context: LoadContext) -> Tower:
    torch.manual_seed(3)
    return Tower()


def build_convolutional(context: LoadContext) -> ImageEncoderModel:
    from open_clip.modified_resnet import ModifiedResNet

    from mmcompress.models.families.open_clip import ConvEncoder

    torch.manual_seed(4)
    tower = ModifiedResNet([1, 1, 1, 1], output_dim=32, heads=4, image_size=32, width=16)
    return ConvEncoder(tower.eval(), PREPROCESS)
