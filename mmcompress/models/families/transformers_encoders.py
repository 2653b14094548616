"""Encoders of transformers: image, text and audio towers. A tower of a new kind is a row in one of the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.models.base import (
    BlockShape,
    ExampleRequest,
    ExportGraph,
    ImageEncoderModel,
    LoadContext,
    Model,
    TextEncoderModel,
    add_tokens_block,
)
from mmcompress.models.hub import (
    POOLER,
    describe_source,
    find_family,
    load_config,
    load_json,
    load_library_model,
    load_tokenizer_json,
)
from mmcompress.models.layouts import find_blocks, normalize_


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """Where a library keeps one tower: the class to load, the module that holds its layers, what its embedding is."""

    class_name: str
    stack: str
    embed: Callable[[Any, Tensor], Tensor]
    """(the library's output, mask of real positions) -> [b, d], not yet normalized."""
    config: str = ""
    """The tower's part of a composite configuration, where the class loads it alone."""
    find_tower: Callable[[Any], nn.Module] = lambda whole: whole
    """The tower in a model that has to be loaded whole."""
    select_tokens: Callable[[Any], Tensor] = lambda out: out.last_hidden_state
    options: Mapping[str, Any] = field(default_factory=dict)
    """Given to the class when it is loaded."""
    unused_positions: int = 0
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
    if config.vision_feature_select_strategy != "default" or not isinstance(
        config.vision_feature_layer, int
    ):
        raise ModelError(
            "LLaVA with vision_feature_select_strategy other than 'default', or several layers"
        )
    stack = tower.get_submodule(first_submodule(tower, ("encoder", "vision_model.encoder")))
    count = len(stack.layers)
    stack.layers = stack.layers[
        : count + 1 + config.vision_feature_layer if config.vision_feature_layer < 0 else count
    ]
    return tower


def first_submodule(tower: nn.Module, paths: tuple[str, ...]) -> str:
    """The first of the paths that the tower has."""
    for path in paths:
        try:
            tower.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ModelError(f"{type(tower).__name__}: has none of {', '.join(paths)}")


IMAGE_FAMILIES = {
    "clip": EncoderFamily(
        class_name="CLIPVisionModelWithProjection",
        stack="vision_model.encoder",
        embed=lambda o, m: o.image_embeds,
        config="vision_config",
    ),
    "clip_vision_model": EncoderFamily(
        class_name="CLIPVisionModelWithProjection",
        stack="vision_model.encoder",
        embed=lambda o, m: o.image_embeds,
    ),
    "siglip": EncoderFamily(
        class_name="SiglipVisionModel", stack="encoder", embed=_pooled, config="vision_config"
    ),
    "siglip_vision_model": EncoderFamily(
        class_name="SiglipVisionModel", stack="encoder", embed=_pooled
    ),
    "vit": EncoderFamily(class_name="ViTModel", stack="", embed=_first, options=NO_POOLER),
    "dinov2": EncoderFamily(class_name="Dinov2Model", stack="", embed=_first),
    "blip": EncoderFamily(
        class_name="BlipForConditionalGeneration",
        stack="encoder",
        embed=_pooled,
        find_tower=lambda whole: whole.vision_model,
    ),
    "blip_vision_model": EncoderFamily(
        class_name="BlipVisionModel", stack="encoder", embed=_pooled
    ),
    "git": EncoderFamily(
        class_name="GitForCausalLM",
        stack="vision_model.encoder",
        embed=_first,
        find_tower=lambda whole: whole.git.image_encoder,
    ),
    "llava": EncoderFamily(
        class_name="LlavaForConditionalGeneration",
        stack="encoder",
        embed=_first,
        find_tower=_llava,
        select_tokens=_patches,
    ),
}


TEXT_FAMILIES = {
    "clip": EncoderFamily(
        class_name="CLIPTextModelWithProjection",
        stack="text_model.encoder",
        embed=lambda o, m: o.text_embeds,
        config="text_config",
    ),
    "clip_text_model": EncoderFamily(
        class_name="CLIPTextModelWithProjection",
        stack="text_model.encoder",
        embed=lambda o, m: o.text_embeds,
    ),
    "siglip": EncoderFamily(
        class_name="SiglipTextModel", stack="encoder", embed=_pooled, config="text_config"
    ),
    "siglip_text_model": EncoderFamily(
        class_name="SiglipTextModel", stack="encoder", embed=_pooled
    ),
    "bert": EncoderFamily(class_name="BertModel", stack="encoder", embed=_mean, options=NO_POOLER),
    "roberta": EncoderFamily(
        class_name="RobertaModel",
        stack="encoder",
        embed=_mean,
        options=NO_POOLER,
        unused_positions=2,
    ),
}


AUDIO_FAMILIES = {"whisper": EncoderFamily(class_name="WhisperModel", stack="layers", embed=_first)}


UNMASKED_TYPES = ("clip", "siglip")
"""Lines whose text towers see padding as they did in training."""


def _square(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


class ImageEncoder(ImageEncoderModel):
    """pixels [b, 3, s, s] -> embedding [b, d] of length 1, tokens [b, n, w] of the last layer."""

    def __init__(self, tower: nn.Module, row: EncoderFamily, *, preprocess: dict[str, Any]):
        super().__init__()
        self.tower, self.row = tower, row
        normalize_(tower.get_submodule(row.stack) if row.stack else tower)
        config: Any = tower.config
        size, places = (
            _square(config.image_size),
            (_square(config.image_size) // _square(config.patch_size)) ** 2,
        )
        embeddings = ".".join(("tower", *row.stack.split(".")[:-1], "embeddings"))
        with torch.no_grad():
            extra = self.get_submodule(embeddings)(torch.zeros(1, 3, size, size)).shape[1] - places
        blocks = find_blocks(self, ".".join(p for p in ("tower", row.stack) if p))
        self.blocks = (add_tokens_block(self, embeddings, extra=extra, count=places), *blocks)
        self.finish_setup(size, int(config.hidden_size), preprocess=preprocess)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = self.tower(pixel_values=pixels)
        return F.normalize(self.row.embed(out, pixels), dim=-1), self.row.select_tokens(out)


class TextEncoder(TextEncoderModel):
    """ids [b, t] -> embedding [b, d] of length 1. `masked`: padding is hidden from the tower."""

    def __init__(
        self,
        tower: nn.Module,
        row: EncoderFamily,
        *,
        tokenizer_json: str,
        context: int,
        masked: bool,
    ):
        super().__init__()
        self.tower, self.row, self.masked, self.tokenizer_json = tower, row, masked, tokenizer_json
        normalize_(tower.get_submodule(row.stack))
        self.blocks = find_blocks(self, f"tower.{row.stack}")
        config: Any = tower.config
        pad = config.pad_token_id if config.pad_token_id is not None else 0
        eos = next(
            v
            for v in (config.eos_token_id, getattr(config, "sep_token_id", None), pad)
            if v is not None
        )
        self.pad = int(pad)
        self.finish_setup(
            context,
            int(config.hidden_size),
            vocabulary=int(config.vocab_size),
            pad=self.pad,
            eos=int(eos),
            any_length=masked,
        )

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
        window = add_tokens_block(
            self, "window", extra=0, count=int(config.max_source_positions), ordered=True
        )
        self.blocks = (window, *find_blocks(self, "tower"))
        self.dims = {"tokens": self.width, "embedding": self.width}

    @property
    def token_count(self) -> int:
        return int(self.window.kept_count)

    @property
    def frames(self) -> int:
        """Frames of 10 ms that it looks at."""
        return 2 * min(int(self.window.count), self.token_count + 1)

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]
        """For the runtime node; `seconds` of sound are heard at once."""
        return {
            "features": {"mels": self.mels, "frames": self.frames, "seconds": self.token_count / 50}
        }

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        t = self.tower
        x = F.gelu(t.conv2(F.gelu(t.conv1(features[..., : self.frames])))).transpose(1, 2)
        x = self.window(x + t.embed_positions.weight[: x.shape[1]])
        for layer in t.layers:
            x = layer(x, None)
        tokens = t.layer_norm(x)
        return F.normalize(tokens.mean(1), dim=-1), tokens

    def export_graphs(self) -> dict[str, ExportGraph]:
        names = ("embedding", "tokens")
        dynamic = {n: {0: "batch"} for n in ("features", *names)}
        return {
            "model": ExportGraph(
                module=self,
                example=(torch.zeros(2, self.mels, self.frames),),
                inputs=("features",),
                outputs=names,
                dynamic_axes=dynamic,
            )
        }

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        return {
            b.name: BlockShape(
                width=self.width, positions=self.token_count, keys=self.token_count, batch=1
            )
            for b in self.blocks
        }

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        return {"model": ExampleRequest((torch.randn(1, self.mels, self.frames),), 1.0)}


def read_preprocessing(context: LoadContext) -> dict[str, Any]:
    """Normalization and resizing as `preprocessor_config.json` says; CLIP's where it says nothing."""
    given = load_json(context, "preprocessor_config.json")
    size = given.get("size", {})
    square = isinstance(size, dict) and "height" in size
    return {
        "mean": list(given.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        "std": list(given.get("image_std", (0.26862954, 0.26130258, 0.27577711))),
        "interpolation": "bilinear" if given.get("resample") == 2 else "bicubic",
        "resize_mode": "squash" if square or given.get("do_center_crop") is False else "shortest",
    }


def _own(config: Any, row: EncoderFamily) -> Any:
    """The configuration of one tower; CLIP states the width of its embeddings for both towers together."""
    if not row.config:
        return config
    own = getattr(config, row.config)
    if hasattr(own, "projection_dim") and hasattr(config, "projection_dim"):
        own.projection_dim = config.projection_dim
    return own


def load_image_encoder(context: LoadContext) -> Model:
    """The image tower of a transformers folder or hub id. Raises `ModelError`."""
    config = load_config(context)
    if config.model_type == "vision-encoder-decoder":
        inner = find_family(
            "image_encoder", config.encoder.model_type, table=IMAGE_FAMILIES, context=context
        )
        row = replace(
            inner,
            class_name="VisionEncoderDecoderModel",
            config="",
            find_tower=lambda whole: whole.encoder,
            options={},
        )
    else:
        row = find_family("image_encoder", config.model_type, table=IMAGE_FAMILIES, context=context)
    whole = load_library_model(
        context,
        row.class_name,
        config=_own(config, row),
        unread=() if row.embed is _pooled else POOLER,
        **row.options,
    )
    return ImageEncoder(row.find_tower(whole), row, preprocess=read_preprocessing(context))


def load_text_encoder(context: LoadContext) -> Model:
    """The text tower of a transformers folder or hub id. Raises `ModelError`."""
    config = load_config(context)
    row = find_family("text_encoder", config.model_type, table=TEXT_FAMILIES, context=context)
    own = _own(config, row)
    given = load_json(context, "sentence_bert_config.json").get("max_seq_length")
    longest = int(own.max_position_embeddings) - row.unused_positions
    length = min(int(given or longest), longest, context.max_tokens or 10**6)
    masked = not config.model_type.startswith(UNMASKED_TYPES)
    tower = load_library_model(context, row.class_name, config=own, **row.options)
    return TextEncoder(
        tower, row, tokenizer_json=load_tokenizer_json(context), context=length, masked=masked
    )


def load_audio_encoder(context: LoadContext) -> Model:
    """The encoder of a Whisper folder or hub id. Raises `ModelError`."""
    config = load_config(context)
    row = find_family("audio_encoder", config.model_type, table=AUDIO_FAMILIES, context=context)
    whole = load_library_model(context, row.class_name, config=config)
    if not hasattr(whole, "encoder"):
        raise ModelError(f"{describe_source(context)}: has no encoder")
    whole.encoder.config._attn_implementation = "eager"
    return AudioEncoder(whole.encoder)
