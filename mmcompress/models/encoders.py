"""Encoders of transformers: image, text and audio towers. A tower of a new kind is a row in one of the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.models.adapters import find, normalize_
from mmcompress.models.base import Graph, ImageModel, LoadContext, Model, Shape, TextModel, tokens_block
from mmcompress.models.hub import POOLER, config_of, json_of, known, load, source, tokenizer_of


@dataclass(frozen=True)
class Tower:
    """Where a library keeps one tower: the class to load, the module that holds its layers, what its embedding is."""

    load: str
    stack: str
    embed: Callable[[Any, Tensor], Tensor]
    """(the library's output, mask of real positions) -> [b, d], not yet normalized."""
    config: str = ""
    """The tower's part of a composite configuration, where the class loads it alone."""
    part: Callable[[Any], nn.Module] = lambda whole: whole
    """The tower in a model that has to be loaded whole."""
    tokens: Callable[[Any], Tensor] = lambda out: out.last_hidden_state
    options: Mapping[str, Any] = field(default_factory=dict)
    """Given to the class when it is loaded."""
    unused: int = 0
    """Positions of its embedding table that no token takes."""


NO_POOLER = {"add_pooling_layer": False}


def _first(out: Any, mask: Tensor) -> Tensor:
    return out.last_hidden_state[:, 0]


def _pooled(out: Any, mask: Tensor) -> Tensor:
    return out.pooler_output


def _mean(out: Any, mask: Tensor) -> Tensor:
    weight = mask[..., None].to(out.last_hidden_state.dtype)
    return (out.last_hidden_state * weight).sum(1) / weight.sum(1).clamp(min=1)


def _patches(out: Any) -> Tensor:
    return out.last_hidden_state[:, 1:]


def _llava(whole: Any) -> nn.Module:
    """LLaVA's tower, without the layers behind the one it reads."""
    config, tower = whole.config, whole.model.vision_tower
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise ModelError("LLaVA with vision_feature_select_strategy other than 'default', or several layers")
    stack = tower.get_submodule(stack_of(tower, ("encoder", "vision_model.encoder")))
    count = len(stack.layers)
    stack.layers = stack.layers[: count + 1 + config.vision_feature_layer if config.vision_feature_layer < 0 else count]
    return tower


def stack_of(tower: nn.Module, paths: tuple[str, ...]) -> str:
    """The first of the paths that the tower has."""
    for path in paths:
        try:
            tower.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ModelError(f"{type(tower).__name__}: has none of {', '.join(paths)}")


IMAGE = {
    "clip": Tower(
        "CLIPVisionModelWithProjection", "vision_model.encoder", lambda o, m: o.image_embeds, "vision_config"
    ),
    "clip_vision_model": Tower("CLIPVisionModelWithProjection", "vision_model.encoder", lambda o, m: o.image_embeds),
    "siglip": Tower("SiglipVisionModel", "encoder", _pooled, "vision_config"),
    "siglip_vision_model": Tower("SiglipVisionModel", "encoder", _pooled),
    "vit": Tower("ViTModel", "", _first, options=NO_POOLER),
    "dinov2": Tower("Dinov2Model", "", _first),
    "blip": Tower("BlipForConditionalGeneration", "encoder", _pooled, part=lambda whole: whole.vision_model),
    "blip_vision_model": Tower("BlipVisionModel", "encoder", _pooled),
    "git": Tower("GitForCausalLM", "vision_model.encoder", _first, part=lambda whole: whole.git.image_encoder),
    "llava": Tower("LlavaForConditionalGeneration", "encoder", _first, part=_llava, tokens=_patches),
}
TEXT = {
    "clip": Tower("CLIPTextModelWithProjection", "text_model.encoder", lambda o, m: o.text_embeds, "text_config"),
    "clip_text_model": Tower("CLIPTextModelWithProjection", "text_model.encoder", lambda o, m: o.text_embeds),
    "siglip": Tower("SiglipTextModel", "encoder", _pooled, "text_config"),
    "siglip_text_model": Tower("SiglipTextModel", "encoder", _pooled),
    "bert": Tower("BertModel", "encoder", _mean, options=NO_POOLER),
    "roberta": Tower("RobertaModel", "encoder", _mean, options=NO_POOLER, unused=2),
}
AUDIO = {"whisper": Tower("WhisperModel", "layers", _first)}
UNMASKED = ("clip", "siglip")
"""Lines whose text towers see padding as they did in training."""


def _square(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


class ImageEncoder(ImageModel):
    """pixels [b, 3, s, s] -> embedding [b, d] of length 1, tokens [b, n, w] of the last layer."""

    def __init__(self, tower: nn.Module, row: Tower, preprocess: dict[str, Any]):
        super().__init__()
        self.tower, self.row = tower, row
        normalize_(tower.get_submodule(row.stack) if row.stack else tower)
        config: Any = tower.config
        size, places = _square(config.image_size), (_square(config.image_size) // _square(config.patch_size)) ** 2
        embeddings = ".".join(("tower", *row.stack.split(".")[:-1], "embeddings"))
        with torch.no_grad():
            extra = self.get_submodule(embeddings)(torch.zeros(1, 3, size, size)).shape[1] - places
        blocks = find(self, ".".join(p for p in ("tower", row.stack) if p))
        self.blocks = (tokens_block(self, embeddings, extra, places), *blocks)
        self.settle(size, int(config.hidden_size), preprocess)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.tower(pixel_values=pixels)
        return F.normalize(self.row.embed(out, pixels), dim=-1), self.row.tokens(out)


class TextEncoder(TextModel):
    """ids [b, t] -> embedding [b, d] of length 1. `masked`: padding is hidden from the tower."""

    def __init__(self, tower: nn.Module, row: Tower, tokenizer_json: str, context: int, masked: bool):
        super().__init__()
        self.tower, self.row, self.masked, self.tokenizer_json = tower, row, masked, tokenizer_json
        normalize_(tower.get_submodule(row.stack))
        self.blocks = find(self, f"tower.{row.stack}")
        config: Any = tower.config
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        eos = next(v for v in (config.eos_token_id, getattr(config, "sep_token_id", None), pad) if v is not None)
        self.pad = int(pad)
        self.settle(context, int(config.hidden_size), int(config.vocab_size), self.pad, int(eos), masked)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != self.pad
        options = {"attention_mask": mask.long()} if self.masked else {}
        return F.normalize(self.row.embed(self.tower(input_ids=ids, **options), mask), dim=-1)


class AudioEncoder(Model):
    """log-mel features [b, m, f] -> the mean of the tokens [b, w], of length 1, and tokens [b, n, w] (Whisper).

    Tokens are 20 ms long. A window cut short to n of them looks at the first 2 n + 2 frames: two more than it covers,
    so that its last token is the one of the whole window.
    """

    kind = "audio_encoder"

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.tower, self.window = encoder, nn.Identity()
        config: Any = encoder.config
        self.width, self.mels = int(config.d_model), int(config.num_mel_bins)
        window = tokens_block(self, "window", 0, int(config.max_source_positions), ordered=True)
        self.blocks = (window, *find(self, "tower"))
        self.dims = {"tokens": self.width, "embedding": self.width}

    @property
    def patches(self) -> int:
        return int(self.window.left)

    @property
    def frames(self) -> int:
        """Frames of 10 ms that it looks at."""
        return 2 * min(int(self.window.count), self.patches + 1)

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """For the runtime node; `seconds` of sound are heard at once."""
        return {"features": {"mels": self.mels, "frames": self.frames, "seconds": self.patches / 50}}

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        t = self.tower
        x = F.gelu(t.conv2(F.gelu(t.conv1(features[..., : self.frames])))).transpose(1, 2)
        x = self.window(x + t.embed_positions.weight[: x.shape[1]])
        for layer in t.layers:
            x = layer(x, None)
        tokens = t.layer_norm(x)
        return F.normalize(tokens.mean(1), dim=-1), tokens

    def graphs(self) -> dict[str, Graph]:
        names = ("embedding", "tokens")
        dynamic = {n: {0: "batch"} for n in ("features", *names)}
        return {"model": Graph(self, (torch.zeros(2, self.mels, self.frames),), ("features",), names, dynamic)}

    def shapes(self, steps: float, beams: int) -> dict[str, Shape]:
        return {b.name: Shape(self.width, self.patches, self.patches, 1) for b in self.blocks}

    def requests(self, steps: float, beams: int) -> dict[str, tuple[tuple[Tensor, ...], float]]:
        return {"model": ((torch.randn(1, self.mels, self.frames),), 1.0)}


def preprocessing(context: LoadContext) -> dict[str, Any]:
    """Normalization and resizing as `preprocessor_config.json` says; CLIP's where it says nothing."""
    given = json_of(context, "preprocessor_config.json")
    size = given.get("size", {})
    square = isinstance(size, dict) and "height" in size
    return {
        "mean": list(given.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        "std": list(given.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        "interpolation": "bilinear" if given.get("resample") == 2 else "bicubic",
        "resize_mode": "squash" if square or given.get("do_center_crop") is False else "shortest",
    }


def _own(config: Any, row: Tower) -> Any:
    """The configuration of one tower; CLIP states the width of its embeddings for both towers together."""
    if not row.config:
        return config
    own = getattr(config, row.config)
    if hasattr(own, "projection_dim") and hasattr(config, "projection_dim"):
        own.projection_dim = config.projection_dim
    return own


def load_image_encoder(context: LoadContext) -> Model:
    """The image tower of a transformers folder or hub id. Raises `ModelError`."""
    config = config_of(context)
    if config.model_type == "vision-encoder-decoder":
        inner = known("image_encoder", config.encoder.model_type, IMAGE, context)
        row = replace(inner, load="VisionEncoderDecoderModel", config="", part=lambda whole: whole.encoder, options={})
    else:
        row = known("image_encoder", config.model_type, IMAGE, context)
    whole = load(context, row.load, _own(config, row), unread=() if row.embed is _pooled else POOLER, **row.options)
    return ImageEncoder(row.part(whole), row, preprocessing(context))


def load_text_encoder(context: LoadContext) -> Model:
    """The text tower of a transformers folder or hub id. Raises `ModelError`."""
    config = config_of(context)
    row = known("text_encoder", config.model_type, TEXT, context)
    own = _own(config, row)
    given = json_of(context, "sentence_bert_config.json").get("max_seq_length")
    longest = int(own.max_position_embeddings) - row.unused
    length = min(int(given or longest), longest, context.max_tokens or 10**6)
    masked = not config.model_type.startswith(UNMASKED)
    tower = load(context, row.load, own, **row.options)
    return TextEncoder(tower, row, tokenizer_of(context), length, masked)


def load_audio_encoder(context: LoadContext) -> Model:
    """The encoder of a Whisper folder or hub id. Raises `ModelError`."""
    config = config_of(context)
    row = known("audio_encoder", config.model_type, AUDIO, context)
    whole = load(context, row.load, config)
    if not hasattr(whole, "encoder"):
        raise ModelError(f"{source(context)}: has no encoder")
    whole.encoder.config._attn_implementation = "eager"
    return AudioEncoder(whole.encoder)
