"""A user's own fusion encoder for tests: text that attends to itself, then to a picture's tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from own_tower import Attention
from torch import Tensor, nn

from mmcompress.models.base import LoadContext
from mmcompress.models.families.fusion_encoders import FusionEncoderModel
from mmcompress.models.layouts import find_blocks


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class FusionLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.encoder_attn = Attention(width, heads)
        self.mlp = FeedForward(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor, *, padding: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x), self.norms[0](x), padding)[0]
        x = x + self.encoder_attn(self.norms[1](x), context)[0]
        return x + self.mlp(self.norms[2](x))


class OwnFusionEncoder(FusionEncoderModel):
    def __init__(self, tokenizer_json: str, *, vocabulary: int, width: int = 32, layers: int = 2):
        super().__init__()
        self.tokenizer_json = tokenizer_json
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(20, width)
        self.layers = nn.ModuleList(FusionLayer(width, 4) for _ in range(layers))
        self.head = nn.Linear(width, 1)
        self.blocks = find_blocks(self, "layers")
        self.finish_setup(20, width, context_width=width, vocabulary=vocabulary, pad=1, eos=2)

    def forward(self, ids: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padding = (ids == self.config["pad"])[:, None, None]
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x, context, padding=padding)
        return F.normalize(x[:, 0], dim=-1), x, self.head(x[:, 0])[:, 0]


def build(context: LoadContext) -> OwnFusionEncoder:
    from train_demo_models import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    return OwnFusionEncoder(tokenizer.to_str(), vocabulary=tokenizer.get_vocab_size()).eval()
