"""open_clip's ViT image towers and text towers."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.errors import MissingPackage, ModelError
from mmcompress.models.base import Graph, LoadContext, Model, SelfAttention, Shape
from mmcompress.records import Block


def transformer_blocks(prefix: str, transformer: nn.Module) -> tuple[Block, ...]:
    """The blocks of an open_clip `Transformer`, its packed attention replaced on the way."""
    found = []
    for i, layer in enumerate(transformer.resblocks):
        if not isinstance(layer.attn, SelfAttention):
            if not isinstance(layer.attn, nn.MultiheadAttention):
                raise ModelError(f"{prefix}.{i}: attention of type {type(layer.attn).__name__} is not supported")
            layer.attn = SelfAttention.of(layer.attn)
        at, attention = f"{prefix}.{i}", layer.attn
        width = attention.out_proj.in_features // attention.num_heads
        found.append(
            Block(
                f"{i}.attention",
                "attention",
                f"{at}.attn.out_proj",
                ((f"{at}.attn.qkv", 3),),
                attention.num_heads,
                width,
                1,
                f"{at}.attn",
                ("stream",),
                ((f"{at}.attn", "pair"),),
            )
        )
        found.append(
            Block(
                f"{i}.ffn",
                "ffn",
                f"{at}.mlp.c_proj",
                ((f"{at}.mlp.c_fc", 1),),
                layer.mlp.c_fc.out_features,
                1,
                16,
                f"{at}.mlp",
                ("stream",),
                ((f"{at}.mlp.c_fc", "skip"), (f"{at}.mlp.c_proj", "plain")),
            )
        )
    return tuple(found)


class ImageEncoder(Model):
    """pixels [b, 3, s, s] -> embedding [b, d] of length 1, patch tokens [b, n, w]."""

    kind = "image_encoder"

    def __init__(self, tower: nn.Module, preprocess: dict[str, Any]):
        super().__init__()
        self.tower = tower
        tower.output_tokens = True  # type: ignore[assignment]
        self.blocks = transformer_blocks("tower.transformer.resblocks", tower.transformer)
        size = tower.image_size
        self.size = int(size[0] if isinstance(size, tuple | list) else size)
        self.config = {"preprocess": {**preprocess, "size": self.size}}
        self.width = int(tower.conv1.out_channels)
        self.patches = int(tower.positional_embedding.shape[0]) - 1
        self.dims = {"embedding": int(tower.output_dim), "tokens": self.width}

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding, tokens = self.tower(pixels)
        return F.normalize(embedding, dim=-1), tokens

    def graphs(self) -> dict[str, Graph]:
        example = torch.zeros(2, 3, self.size, self.size)
        names = ("embedding", "tokens")
        dynamic = {n: {0: "batch"} for n in ("pixels", *names)}
        return {"model": Graph(self, (example,), ("pixels",), names, dynamic)}

    def shapes(self, steps: float, beams: int) -> dict[str, Shape]:
        n = self.patches + 1
        return {b.name: Shape(self.width, n, n, 1) for b in self.blocks}

    def requests(self, steps: float, beams: int) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        return {"model": ((torch.randn(1, 3, self.size, self.size),), 1.0)}


class TextEncoder(Model):
    """ids [b, t] -> embedding [b, d] of length 1; t is the tower's context length."""

    kind = "text_encoder"

    def __init__(self, tower: nn.Module, tokenizer_json: str, candidates: int):
        super().__init__()
        self.tower = tower
        tower.output_tokens = False  # type: ignore[assignment]
        self.blocks = transformer_blocks("tower.transformer.resblocks", tower.transformer)
        self.context = int(tower.context_length)
        self.config = {
            "tokenizer": "tokenizer.json",
            "context_length": self.context,
            "pad": int(tower.pad_id),
            "eos": int(tower.eos_id),
        }
        self.tokenizer_json = tokenizer_json
        self.width = int(tower.width)
        self.dims = {"embedding": int(tower.output_dim or tower.width)}

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.tower(ids), dim=-1)

    def graphs(self) -> dict[str, Graph]:
        example = torch.full((2, self.context), self.config["pad"], dtype=torch.long)
        example[:, 0] = self.config["eos"]
        dynamic = {"ids": {0: "batch"}, "embedding": {0: "batch"}}
        return {"model": Graph(self, (example,), ("ids",), ("embedding",), dynamic)}

    def shapes(self, steps: float, beams: int) -> dict[str, Shape]:
        return {b.name: Shape(self.width, self.context, self.context, beams) for b in self.blocks}

    def requests(self, steps: float, beams: int) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        return {"model": ((torch.full((beams, self.context), self.config["eos"]),), 1.0)}


@lru_cache(maxsize=2)
def _clip(name: str, pretrained: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """An open_clip model with both towers, weights from safetensors only, and its preprocessing."""
    try:
        import open_clip
    except ImportError as e:
        raise MissingPackage("open_clip_torch", "compress") from e
    try:
        model = open_clip.create_model(name, pretrained=pretrained, force_custom_text=True, weights_only=True)
        config = open_clip.get_model_preprocess_cfg(model)
    except Exception as e:  # open_clip raises RuntimeError, FileNotFoundError, hub errors
        raise ModelError(f"open_clip can't load '{name}'{f' ({pretrained})' if pretrained else ''}: {e}") from e
    keep = ("mean", "std", "interpolation", "resize_mode")
    return model.float().eval(), {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k in keep}


def _source(context: LoadContext) -> str:
    return f"local-dir:{context.path}" if context.path else context.name


def load_image_encoder(context: LoadContext) -> Model:
    clip, preprocess = _clip(_source(context), context.pretrained)
    if not hasattr(clip.visual, "transformer"):
        raise ModelError(f"{_source(context)}: image tower {type(clip.visual).__name__} is not supported (ViT only)")
    return ImageEncoder(clip.visual, preprocess)


def load_text_encoder(context: LoadContext) -> Model:
    clip, _ = _clip(_source(context), context.pretrained)
    if not hasattr(clip.text, "transformer") or not hasattr(clip.text, "token_embedding"):
        raise ModelError(f"{_source(context)}: text tower {type(clip.text).__name__} is not supported")
    return TextEncoder(clip.text, tokenizer_of(context), context.candidates)


def tokenizer_of(context: LoadContext) -> str:
    """`tokenizer.json` beside the weights. Raises `ModelError` when there is none."""
    path = context.path / "tokenizer.json" if context.path else None
    if path is None or not path.is_file():
        raise ModelError(f"{_source(context)}: tokenizer.json is missing beside the weights")
    text = path.read_text()
    try:
        json.loads(text)
    except ValueError as e:
        raise ModelError(f"{path}: not JSON: {e}") from e
    return text
