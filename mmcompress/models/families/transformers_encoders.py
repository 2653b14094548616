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
    mark_tokens,
)
from mmcompress.models.families.image_processors import read_preprocessing
from mmcompress.models.families.sentence_modules import (
    SentenceHead,
    count_prompt_tokens,
    load_sentence_head,
    read_sentence_settings,
)
from mmcompress.models.hub import (
    POOLER,
    describe_source,
    find_family,
    load_config,
    load_library_model,
)
from mmcompress.models.layouts import find_blocks, normalize_
from mmcompress.models.tokenizer_files import (
    LoadedTokenizer,
    load_tokenizer,
    lower_case_first,
)
from mmcompress.runtime.audio import TOKENS_PER_SECOND
from mmcompress.runtime.text import parse_tokenizer

WITHOUT_POOLER = {"add_pooling_layer": False}
"""Option of transformers: leave out a layer whose output nobody reads here."""
UNMASKED_TEXT_TYPES = ("clip", "siglip")
"""Starts of the model types whose text towers see padding, as they did in training."""
CLIP_LEGACY_END = 2
"""End token that old configurations of CLIP name. Transformers then takes the highest id of a text
for its end."""
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
    counts_from_padding: bool = False
    """Whether positions are counted from the padding id on, so that the first ones are unused."""


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
        counts_from_padding=True,
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


def _join_path(parent: str, child: str) -> str:
    """Join two parts of a module's path, leaving out empty ones."""
    return ".".join(part for part in (parent, child) if part)


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
        embeddings = _join_path(_join_path("tower", stack_parent), "embeddings")
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
        tokenizer: the tokenizer, and how texts are padded and cut.
        context: tokens of the longest text.
        masked: whether padding is hidden from the tower.
        prompt: what stands before every text.
        head: what makes one vector of the tokens, in the place of the family's own.
    """

    def __init__(
        self,
        tower: nn.Module,
        family: EncoderFamily,
        *,
        tokenizer: LoadedTokenizer,
        context: int,
        masked: bool,
        prompt: str = "",
        head: SentenceHead | None = None,
    ):
        super().__init__()
        self.tower = tower
        self.family = family
        self.masked = masked
        self.head = head
        self.tokenizer_json = tokenizer.json
        normalize_(tower.get_submodule(family.stack))
        self.blocks = find_blocks(self, f"tower.{family.stack}")
        eos = _find_end_token(tower.config, tokenizer)
        self.pad = _choose_padding(tower.config, tokenizer, eos=eos, masked=masked)
        settings = tokenizer.list_settings()
        # Behind the words, padding changes no answer of a tower that is causal or ignores it.
        if tokenizer.pad_side == "left" and _reads_padding(tower.config):
            settings["pad_side"] = "left"
        if prompt:
            settings["prompt"] = prompt
        self.finish_setup(
            context,
            int(tower.config.hidden_size),
            vocabulary=int(tower.config.vocab_size),
            pad=self.pad,
            eos=self.pad if eos is None else eos,
            any_length=masked,
            text_settings=settings,
        )

    def forward(self, ids: Tensor) -> Tensor:
        mask_BT = mark_tokens(ids, self.pad)
        options = {"attention_mask": mask_BT.long()} if self.masked else {}
        outputs = self.tower(input_ids=ids, **options)
        if self.head is not None:
            embedding_BD = self.head(outputs.last_hidden_state, mask_BT)
        else:
            embedding_BD = self.family.compute_embedding(outputs, mask_BT)
        return F.normalize(embedding_BD, dim=-1)


def _reads_padding(config: PretrainedConfig) -> bool:
    """Tell whether padding changes the embedding: SigLIP's is that of the last position."""
    return config.model_type.startswith("siglip")


def _find_end_token(config: PretrainedConfig, tokenizer: LoadedTokenizer) -> int | None:
    """Find the token that ends a text: the tokenizer's, else the one that the configuration names.

    Configurations keep wrong ones: old ones of CLIP say 2, BERT's say nothing, and the class
    defaults of SigLIP lie outside its vocabulary.
    """
    separator = getattr(config, "sep_token_id", None)
    for candidate in (tokenizer.eos, config.eos_token_id, separator):
        if candidate is not None and 0 <= int(candidate) < config.vocab_size:
            return int(candidate)
    return None


def _choose_padding(
    config: PretrainedConfig, tokenizer: LoadedTokenizer, *, eos: int | None, masked: bool
) -> int:
    """Choose the id that fills a text up.

    A tower that reads padding needs the tokenizer's. Elsewhere padding must not be taken for the
    end of a text: a mask looks for it, and CLIP reads its embedding there.
    """
    candidates = [tokenizer.pad, config.pad_token_id, 0, 1]
    usable_ids = [
        int(one) for one in candidates if one is not None and 0 <= one < config.vocab_size
    ]
    if _reads_padding(config) or eos is None:
        return usable_ids[0]
    if masked:
        return next(one for one in usable_ids if one != eos)
    if config.eos_token_id == CLIP_LEGACY_END:
        # The highest id is taken for the end, and the first one of several.
        return next(one for one in usable_ids if one <= eos)
    return next(one for one in usable_ids if one == eos or one != config.eos_token_id)


class AudioEncoder(Model):
    """Encode log-mel features [B, M, F] to an embedding [B, W] of length 1 and tokens [B, N, W].

    The embedding is the mean of the tokens. A token is 20 ms long. A window cut short to N tokens
    reads the first 2 N + 2 frames, two more than it covers. Then its last token equals that of the
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
            self, "window", extra=0, count=int(config.max_source_positions), prefix_only=True
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
        family = find_family(config.model_type, table=IMAGE_FAMILIES, context=context)
        class_names = [name for name in config.architectures or () if name in BLIP_CLASSES]
        if config.model_type == "blip" and class_names:
            family = replace(family, class_name=class_names[0])
        return family
    tower_type = config.encoder.model_type
    family = find_family(tower_type, table=IMAGE_FAMILIES, context=context)
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
            f" and its model takes {own_sides[0]} x {own_sides[1]}."
            " Correct size or crop_size of the processor"
        )


def load_text_encoder(context: LoadContext) -> Model:
    """Load the text tower of a transformers folder or hub id.

    Raises:
        ModelError: if the model can't be loaded or its family is not supported.
    """
    config = load_config(context)
    family = find_family(config.model_type, table=TEXT_FAMILIES, context=context)
    tower_config = _select_tower_config(config, family)
    tower = load_library_model(context, family.class_name, config=tower_config, **family.options)
    tokenizer = load_tokenizer(context)
    settings = read_sentence_settings(context)
    if settings.lower_case:
        tokenizer = replace(tokenizer, json=lower_case_first(tokenizer.json))
    own_tokenizer = parse_tokenizer(tokenizer.json)
    prompt_tokens = count_prompt_tokens(settings.prompt, own_tokenizer) if settings.prompt else 0
    length = _find_context_length(
        tower_config, family, limits=(tokenizer.max_length, settings.max_length, context.max_tokens)
    )
    reserved_tokens = own_tokenizer.num_special_tokens_to_add(False) + prompt_tokens
    if length <= reserved_tokens:
        raise ModelError(
            f"{describe_source(context)}: texts of {length} tokens hold nothing but the"
            f" {reserved_tokens} of the prompt and of start and end; raise max_tokens"
        )
    head = None
    if family.compute_embedding is average_tokens:
        head = load_sentence_head(context, prompt_tokens=prompt_tokens)
    return TextEncoder(
        tower,
        family,
        tokenizer=tokenizer,
        context=length,
        masked=not config.model_type.startswith(UNMASKED_TEXT_TYPES),
        prompt=settings.prompt,
        head=head,
    )


def _find_context_length(
    config: PretrainedConfig, family: EncoderFamily, *, limits: tuple[int, ...]
) -> int:
    """Find how many tokens a text may have: the smallest of all limits.

    Sentence encoders were trained on shorter texts than their tables of positions allow.

    Args:
        config: the configuration of the tower.
        family: where the library keeps its parts.
        limits: tokens that tokenizer, folder and spec allow; 0 where they say nothing.
    """
    length = int(config.max_position_embeddings)
    if family.counts_from_padding:
        length -= int(config.pad_token_id) + 1
    return min([length, *(limit for limit in limits if limit)])


def load_audio_encoder(context: LoadContext) -> Model:
    """Load the encoder of a Whisper folder or hub id.

    Raises:
        ModelError: if the model can't be loaded or its family is not supported.
    """
    config = load_config(context)
    family = find_family(config.model_type, table=AUDIO_FAMILIES, context=context)
    library_model = load_library_model(context, family.class_name, config=config)
    if not hasattr(library_model, "encoder"):
        raise ModelError(f"{describe_source(context)}: has no encoder")
    library_model.encoder.config._attn_implementation = "eager"
    return AudioEncoder(library_model.encoder)
