"""Image, text and audio towers of transformers; a new kind of tower is a new row of a table.

Shapes: B batch, T text tokens, N output tokens, W width, D width of
    the embedding,
M mel bands, F frames of sound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.utils import ModelOutput

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
from mmcompress.models.families.image_processors import read_preprocessing
from mmcompress.models.families.sentence_folder import SentenceSetup, read_sentence_setup
from mmcompress.models.hub import (
    POOLER,
    TOKENIZER_CONFIG,
    describe_source,
    find_family,
    load_config,
    load_json,
    load_library_model,
    load_tokenizer_json,
)
from mmcompress.models.layouts import find_blocks, normalize_
from mmcompress.models.tokenizer_files import find_added_end, find_padding_id, lower_case_first
from mmcompress.runtime.audio import TOKENS_PER_SECOND

WITHOUT_POOLER = {"add_pooling_layer": False}
"""Option of transformers: leave out a layer whose output nobody reads here."""
UNMASKED_TEXT_TYPES = ("clip", "siglip")
"""Starts of the model types whose text towers see padding, as they did in training."""
BLIP_CLASSES = (
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
    "BlipModel",
)
"""Classes of transformers that hold BLIP's image tower; the configuration names the one that the
weights were written by."""
LLAVA_STACKS = ("encoder", "vision_model.encoder")
"""Paths of the layers in LLaVA's tower; they differ between versions of transformers."""


def select_image_embedding(outputs: ModelOutput, mask: Tensor) -> Tensor:
    """Select the projected embedding of an image [B, D] as CLIP returns it."""
    return outputs.image_embeds


def select_text_embedding(outputs: ModelOutput, mask: Tensor) -> Tensor:
    """Select the projected embedding of a text [B, D] as CLIP returns it."""
    return outputs.text_embeds


def select_first_token(outputs: ModelOutput, mask: Tensor) -> Tensor:
    """Select the first token [B, W], mostly a class token."""
    return outputs.last_hidden_state[:, 0]


def select_pooled(outputs: ModelOutput, mask: Tensor) -> Tensor:
    """Select the output of the tower's own pooling layer [B, W]."""
    return outputs.pooler_output


def average_tokens(outputs: ModelOutput, mask: Tensor) -> Tensor:
    """Average the tokens that are no padding [B, W], as sentence encoders do.

    Args:
        outputs: the library's outputs, with tokens [B, T, W].
        mask: [B, T], true for real tokens.
    """
    tokens_BTW = outputs.last_hidden_state
    weight_BT1 = mask[..., None].to(tokens_BTW.dtype)
    return (tokens_BTW * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


def select_all_tokens(outputs: ModelOutput) -> Tensor:
    """Select all tokens of the last layer [B, N, W]."""
    return outputs.last_hidden_state


def select_patch_tokens(outputs: ModelOutput) -> Tensor:
    """Select the tokens of the last layer [B, N, W] without the class token."""
    return outputs.last_hidden_state[:, 1:]


def get_whole_model(library_model: nn.Module) -> nn.Module:
    """Return a model that is the tower itself."""
    return library_model


def get_blip_tower(library_model: nn.Module) -> nn.Module:
    """Return the image tower of BLIP."""
    return library_model.get_submodule("vision_model")


def get_git_tower(library_model: nn.Module) -> nn.Module:
    """Return the image tower of GIT."""
    return library_model.get_submodule("git.image_encoder")


def get_encoder(library_model: nn.Module) -> nn.Module:
    """Return the encoder of a VisionEncoderDecoder model."""
    return library_model.get_submodule("encoder")


def cut_llava_tower(library_model: nn.Module) -> nn.Module:
    """Return the image tower of LLaVA, without the layers behind the one that LLaVA reads.

    Raises:
        ModelError: if LLaVA reads several layers, or the class token as well.
    """
    config = library_model.config
    layer = config.vision_feature_layer
    if config.vision_feature_select_strategy != "default" or not isinstance(layer, int):
        raise ModelError(
            "LLaVA with vision_feature_select_strategy other than 'default', or several layers"
        )
    tower = library_model.get_submodule("model.vision_tower")
    stack = tower.get_submodule(find_first_submodule(tower, LLAVA_STACKS))
    # Layer -1 is the output of the last layer, -2 the output of the one before.
    if layer < 0:
        stack.layers = stack.layers[: len(stack.layers) + 1 + layer]
    return tower


def find_first_submodule(tower: nn.Module, paths: tuple[str, ...]) -> str:
    """Return the first of the paths that a tower has.

    Raises:
        ModelError: if it has none of them.
    """
    for path in paths:
        try:
            tower.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise ModelError(f"{type(tower).__name__}: has none of {', '.join(paths)}")


class FixedDinov2Embeddings(Dinov2Embeddings):
    """DINOv2's embeddings of pictures of one size: their positions are a table and no graph."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Return the positions as they are."""
        return self.position_embeddings


def fit_dinov2_positions_(tower: nn.Module, sides: tuple[int, int]) -> None:
    """Interpolate the positions of DINOv2 once, as the library does for each picture.

    Args:
        tower: The library's tower; changed in place.
        sides: Height and width of the pictures in pixels.
    """
    embeddings = tower.embeddings
    with torch.no_grad():
        patches = embeddings.patch_embeddings(torch.zeros((1, 3, *sides)))
        sequence = torch.cat((embeddings.cls_token, patches), dim=1)
        positions = embeddings.interpolate_pos_encoding(sequence, *sides)
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    embeddings.__class__ = FixedDinov2Embeddings


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """Say where transformers keeps one kind of tower and what its embedding is."""

    class_name: str
    """Class of transformers that loads the weights."""
    stack: str
    """Path of the module that holds the layers; empty if the tower itself holds them."""
    compute_embedding: Callable[[ModelOutput, Tensor], Tensor]
    """Called with (outputs, mask of real tokens [B, T]); returns [B, D], not yet normalized."""
    config_attribute: str = ""
    """Name of the tower's part of a composite configuration; empty if there is only one tower."""
    find_tower: Callable[[nn.Module], nn.Module] = get_whole_model
    """Returns the tower of a model that has to be loaded whole."""
    select_tokens: Callable[[ModelOutput], Tensor] = select_all_tokens
    """Called with (outputs); returns the tokens [B, N, W] that other nodes read."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Passed to the class when it loads the weights."""
    fit_positions_: Callable[[nn.Module, tuple[int, int]], None] | None = None
    """Called with (tower, (height, width)) where pictures have other sides than the configuration
    says; None where the library refuses them."""
    unused_positions: int = 0
    """Positions of the embedding table that no token takes."""


IMAGE_FAMILIES = {
    "clip": EncoderFamily(
        class_name="CLIPVisionModelWithProjection",
        stack="vision_model.encoder",
        compute_embedding=select_image_embedding,
        config_attribute="vision_config",
    ),
    "clip_vision_model": EncoderFamily(
        class_name="CLIPVisionModelWithProjection",
        stack="vision_model.encoder",
        compute_embedding=select_image_embedding,
    ),
    "siglip": EncoderFamily(
        class_name="SiglipVisionModel",
        stack="encoder",
        compute_embedding=select_pooled,
        config_attribute="vision_config",
    ),
    "siglip_vision_model": EncoderFamily(
        class_name="SiglipVisionModel",
        stack="encoder",
        compute_embedding=select_pooled,
    ),
    "vit": EncoderFamily(
        class_name="ViTModel",
        stack="",
        compute_embedding=select_first_token,
        options=WITHOUT_POOLER,
    ),
    "dinov2": EncoderFamily(
        class_name="Dinov2Model",
        stack="",
        compute_embedding=select_first_token,
        fit_positions_=fit_dinov2_positions_,
    ),
    "blip": EncoderFamily(
        class_name="BlipForConditionalGeneration",
        stack="encoder",
        compute_embedding=select_pooled,
        find_tower=get_blip_tower,
    ),
    "blip_vision_model": EncoderFamily(
        class_name="BlipVisionModel",
        stack="encoder",
        compute_embedding=select_pooled,
    ),
    "git": EncoderFamily(
        class_name="GitForCausalLM",
        stack="vision_model.encoder",
        compute_embedding=select_first_token,
        find_tower=get_git_tower,
    ),
    "llava": EncoderFamily(
        class_name="LlavaForConditionalGeneration",
        stack="encoder",
        compute_embedding=select_first_token,
        find_tower=cut_llava_tower,
        select_tokens=select_patch_tokens,
    ),
}
"""Image towers by `model_type` of the library's configuration; to add one, copy a row."""


TEXT_FAMILIES = {
    "clip": EncoderFamily(
        class_name="CLIPTextModelWithProjection",
        stack="text_model.encoder",
        compute_embedding=select_text_embedding,
        config_attribute="text_config",
    ),
    "clip_text_model": EncoderFamily(
        class_name="CLIPTextModelWithProjection",
        stack="text_model.encoder",
        compute_embedding=select_text_embedding,
    ),
    "siglip": EncoderFamily(
        class_name="SiglipTextModel",
        stack="encoder",
        compute_embedding=select_pooled,
        config_attribute="text_config",
    ),
    "siglip_text_model": EncoderFamily(
        class_name="SiglipTextModel",
        stack="encoder",
        compute_embedding=select_pooled,
    ),
    "bert": EncoderFamily(
        class_name="BertModel",
        stack="encoder",
        compute_embedding=average_tokens,
        options=WITHOUT_POOLER,
    ),
    "roberta": EncoderFamily(
        class_name="RobertaModel",
        stack="encoder",
        compute_embedding=average_tokens,
        options=WITHOUT_POOLER,
        unused_positions=2,
    ),
}
"""Text towers by `model_type` of the library's configuration; to add one, copy a row."""


AUDIO_FAMILIES = {
    "whisper": EncoderFamily(
        class_name="WhisperModel",
        stack="layers",
        compute_embedding=select_first_token,
    ),
}
"""Audio towers by `model_type` of the library's configuration; `AudioEncoder` is Whisper's."""


def read_sides(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Read (height, width) of what a configuration gives as a number or as a pair."""
    if isinstance(size, list | tuple):
        return (int(size[0]), int(size[-1]))
    return (int(size), int(size))


def _join_path(*parts: str) -> str:
    """Join parts of a module's path, leaving out empty ones."""
    return ".".join(part for part in parts if part)


class ImageEncoder(ImageEncoderModel):
    """Encode pixels [B, 3, height, width] to an embedding [B, D] and tokens [B, N, W].

    The embedding has length 1; the tokens are those of the last layer.

    Args:
        tower: the library's image tower; changed in place.
        family: where the library keeps its parts.
        preprocess: keys of `mmcompress.runtime.images.preprocess_image`; without a size, pictures
            have that of the tower's configuration.
    """

    def __init__(self, tower: nn.Module, family: EncoderFamily, *, preprocess: dict[str, Any]):
        super().__init__()
        self.tower = tower
        self.family = family
        normalize_(tower.get_submodule(family.stack) if family.stack else tower)
        sides = read_sides(preprocess.get("size", tower.config.image_size))
        patch_sides = read_sides(tower.config.patch_size)
        patch_count = (sides[0] // patch_sides[0]) * (sides[1] // patch_sides[1])
        # The embeddings stand beside the layers.
        stack_parent = family.stack.rpartition(".")[0]
        embeddings = _join_path("tower", stack_parent, "embeddings")
        # A class token or registers may stand before the patches.
        with torch.no_grad():
            token_count = self.get_submodule(embeddings)(torch.zeros((1, 3, *sides))).shape[1]
        blocks = find_blocks(self, _join_path("tower", family.stack))
        tokens_block = add_tokens_block(
            self, embeddings, extra=token_count - patch_count, count=patch_count
        )
        self.blocks = (tokens_block, *blocks)
        self.finish_setup(sides, int(tower.config.hidden_size), preprocess=preprocess)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.tower(pixel_values=pixels)
        embedding_BD = self.family.compute_embedding(outputs, pixels)
        return F.normalize(embedding_BD, dim=-1), self.family.select_tokens(outputs)


class TextEncoder(TextEncoderModel):
    """Encode ids [B, T] to an embedding [B, D] of length 1.

    Args:
        tower: the library's text tower; changed in place.
        family: where the library keeps its parts.
        tokenizer_json: a fast tokenizer as JSON.
        context: tokens of the longest text.
        masked: whether padding is hidden from the tower.
        pad: the id that fills a text up.
        sentence: how a sentence-transformers folder pools and prompts.
    """

    def __init__(
        self,
        tower: nn.Module,
        family: EncoderFamily,
        *,
        tokenizer_json: str,
        context: int,
        masked: bool,
        pad: int | None = None,
        sentence: SentenceSetup | None = None,
    ):
        super().__init__()
        self.tower = tower
        self.family = family
        self.masked = masked
        self.sentence = sentence or SentenceSetup()
        self.head = nn.Sequential(*self.sentence.layers)
        if self.sentence.lower_case:
            tokenizer_json = lower_case_first(tokenizer_json)
        self.tokenizer_json = tokenizer_json
        normalize_(tower.get_submodule(family.stack))
        self.blocks = find_blocks(self, f"tower.{family.stack}")
        config = tower.config
        self.pad = _find_padding(config) if pad is None else pad
        self.finish_setup(
            context,
            int(config.hidden_size),
            vocabulary=int(config.vocab_size),
            pad=self.pad,
            eos=find_added_end(tokenizer_json),
            any_length=masked,
            prompt=self.sentence.prompt,
        )

    def forward(self, ids: Tensor) -> Tensor:
        mask_BT = ids != self.pad
        options = {"attention_mask": mask_BT.long()} if self.masked else {}
        outputs = self.tower(input_ids=ids, **options)
        return F.normalize(self._embed(outputs, mask_BT), dim=-1)

    def _embed(self, outputs: ModelOutput, mask_BT: Tensor) -> Tensor:
        """Pool as the family does, or as the folder of a sentence encoder says [B, D]."""
        if self.family.compute_embedding is not average_tokens:
            return self.family.compute_embedding(outputs, mask_BT)
        tokens_BTW = outputs.last_hidden_state
        pooled = torch.cat([pool(tokens_BTW, mask_BT) for pool in self.sentence.pools], -1)
        return self.head(pooled)


def _find_padding(config: PretrainedConfig) -> int:
    """Find the id that fills a text up in the configuration of the model."""
    return 0 if config.pad_token_id is None else int(config.pad_token_id)


class AudioEncoder(Model):
    """Encode log-mel features [B, M, F] to an embedding [B, W] of length 1 and tokens [B, N, W].

    The embedding is the mean of the tokens. A token is 20 ms long. A window cut short to N tokens
    reads the first 2 N + 2 frames, two more than it covers: then its last token equals that of the
    whole window.

    Args:
        encoder: the encoder of Whisper; changed in place.
    """

    kind = "audio_encoder"

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.tower = encoder
        # Becomes the module that cuts the window short.
        self.window = nn.Identity()
        config = encoder.config
        self.width = int(config.d_model)
        self.mels = int(config.num_mel_bins)
        window_block = add_tokens_block(
            self, "window", extra=0, count=int(config.max_source_positions), ordered=True
        )
        self.blocks = (window_block, *find_blocks(self, "tower"))
        self.dims = {"tokens": self.width, "embedding": self.width}

    @property
    def token_count(self) -> int:
        """Tokens that come out."""
        return int(self.window.kept_count)

    @property
    def frames(self) -> int:
        """Frames of 10 ms that the encoder reads."""
        return 2 * min(int(self.window.count), self.token_count + 1)

    @property
    def config(self) -> dict[str, object]:  # type: ignore[override]
        """Describe the features for the runtime node; `seconds` of sound fit in one window."""
        seconds = self.token_count / TOKENS_PER_SECOND
        return {"features": {"mels": self.mels, "frames": self.frames, "seconds": seconds}}

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.tower
        x_BWF = F.gelu(tower.conv1(features[..., : self.frames]))
        x_BWN = F.gelu(tower.conv2(x_BWF))
        x_BNW = x_BWN.transpose(1, 2)
        x_BNW = self.window(x_BNW + tower.embed_positions.weight[: x_BNW.shape[1]])
        for layer in tower.layers:
            x_BNW = layer(x_BNW, None)
        tokens_BNW = tower.layer_norm(x_BNW)
        return F.normalize(tokens_BNW.mean(1), dim=-1), tokens_BNW

    def export_graphs(self) -> dict[str, ExportGraph]:
        """Describe the one graph, for any batch."""
        graph = ExportGraph(
            module=self,
            example=(torch.zeros(2, self.mels, self.frames),),
            inputs=("features",),
            outputs=("embedding", "tokens"),
            dynamic_axes={
                "features": {0: "batch"},
                "embedding": {0: "batch"},
                "tokens": {0: "batch"},
            },
        )
        return {"model": graph}

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Describe the shape of every block: all tokens attend to all tokens."""
        shape = BlockShape(
            width=self.width, positions=self.token_count, keys=self.token_count, batch=1
        )
        return {block.name: shape for block in self.blocks}

    def make_example_requests(self, steps: float, beams: int) -> dict[str, ExampleRequest]:
        """Make one window of sound; a request reads one."""
        return {"model": ExampleRequest((torch.randn(1, self.mels, self.frames),), 1.0)}


def _select_tower_config(config: PretrainedConfig, family: EncoderFamily) -> PretrainedConfig:
    """Select the configuration of one tower.

    CLIP states the width of the embedding for both towers together.
    """
    if not family.config_attribute:
        return config
    tower_config = getattr(config, family.config_attribute)
    if hasattr(tower_config, "projection_dim") and hasattr(config, "projection_dim"):
        tower_config.projection_dim = config.projection_dim
    return tower_config


def _find_image_family(config: PretrainedConfig, context: LoadContext) -> EncoderFamily:
    """Find the row of an image tower; a VisionEncoderDecoder holds a tower of another type."""
    if config.model_type != "vision-encoder-decoder":
        family = find_family(
            "image_encoder", config.model_type, table=IMAGE_FAMILIES, context=context
        )
        class_names = [name for name in config.architectures or () if name in BLIP_CLASSES]
        if config.model_type == "blip" and class_names:
            family = replace(family, class_name=class_names[0])
        return family
    tower_type = config.encoder.model_type
    family = find_family("image_encoder", tower_type, table=IMAGE_FAMILIES, context=context)
    return replace(
        family,
        class_name="VisionEncoderDecoderModel",
        config_attribute="",
        find_tower=get_encoder,
        options={},
    )


def load_image_encoder(context: LoadContext) -> Model:
    """Load the image tower of a transformers folder or hub id.

    Raises:
        ModelError: if the model can't be loaded or its family is not supported.
    """
    config = load_config(context)
    family = _find_image_family(config, context)
    # Weights of a pooling layer may be missing where nobody reads its output.
    reads_pooler = family.compute_embedding is select_pooled
    library_model = load_library_model(
        context,
        family.class_name,
        config=_select_tower_config(config, family),
        unread=() if reads_pooler else POOLER,
        **family.options,
    )
    tower = family.find_tower(library_model)
    own_sides = read_sides(tower.config.image_size)
    preprocess = read_preprocessing(context, own_sides)
    _fit_tower_(tower, family, sides=read_sides(preprocess["size"]), context=context)
    return ImageEncoder(tower, family, preprocess=preprocess)


def _fit_tower_(
    tower: nn.Module, family: EncoderFamily, *, sides: tuple[int, int], context: LoadContext
) -> None:
    """Make a tower ready for the pictures of its processor, or raise `ModelError`."""
    source = describe_source(context)
    planes = int(getattr(tower.config, "num_channels", 3))
    if planes != 3:
        raise ModelError(
            f"{source}: num_channels: {planes}; pictures here have 3, red, green, blue"
        )
    own_sides = read_sides(tower.config.image_size)
    if family.fit_positions_ is not None:
        family.fit_positions_(tower, sides)
    elif sides != own_sides:
        raise ModelError(
            f"{source}: its image processor gives {sides[0]} x {sides[1]} pixels (height x width),"
            f" and its model takes {own_sides[0]} x {own_sides[1]};"
            " correct size or crop_size of the processor"
        )


def load_text_encoder(context: LoadContext) -> Model:
    """Load the text tower of a transformers folder or hub id.

    Raises:
        ModelError: if the model can't be loaded or its family is not supported.
    """
    config = load_config(context)
    family = find_family("text_encoder", config.model_type, table=TEXT_FAMILIES, context=context)
    tower_config = _select_tower_config(config, family)
    length = int(tower_config.max_position_embeddings) - family.unused_positions
    sentence = read_sentence_setup(context)
    tokenizer_config = load_json(context, TOKENIZER_CONFIG)
    # Sentence encoders were trained on shorter texts than their tables allow.
    for limit in (sentence.max_tokens, tokenizer_config.get("model_max_length")):
        if limit:
            length = min(int(limit), length)
    if context.max_tokens:
        length = min(length, context.max_tokens)
    tower = load_library_model(context, family.class_name, config=tower_config, **family.options)
    tokenizer_json = load_tokenizer_json(context)
    return TextEncoder(
        tower,
        family,
        tokenizer_json=tokenizer_json,
        context=length,
        masked=not config.model_type.startswith(UNMASKED_TEXT_TYPES),
        pad=find_padding_id(tokenizer_config, tokenizer_json),
        sentence=sentence,
    )


def load_audio_encoder(context: LoadContext) -> Model:
    """Load the encoder of a Whisper folder or hub id.

    Raises:
        ModelError: if the model can't be loaded or its family is not supported.
    """
    config = load_config(context)
    family = find_family("audio_encoder", config.model_type, table=AUDIO_FAMILIES, context=context)
    library_model = load_library_model(context, family.class_name, config=config)
    if not hasattr(library_model, "encoder"):
        raise ModelError(f"{describe_source(context)}: has no encoder")
    library_model.encoder.config._attn_implementation = "eager"
    return AudioEncoder(library_model.encoder)
