"""open_clip's image towers, text towers, and CoCa's caption decoder.

Shapes: B batch, S side of the image in pixels, T text tokens, N image tokens, W width, D width of
    the embedding.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import open_clip
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import TextTransformer, VisionTransformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.graph.blocks import ConvGeometry
from mmcompress.models.base import (
    BlockShape,
    ImageEncoderModel,
    LoadContext,
    Model,
    TextEncoderModel,
    add_tokens_block,
)
from mmcompress.models.families.coca import CaptionDecoder
from mmcompress.models.families.cross_attention_decoder import DECODER_FAMILIES, TextDecoder
from mmcompress.models.families.decoding import DEFAULT_MAX_TOKENS, read_generation_settings
from mmcompress.models.hub import (
    is_unreachable,
    load_json,
    refuse_pickles,
    summarize_error,
)
from mmcompress.models.layouts import find_blocks, find_convolutions, normalize_
from mmcompress.models.tokenizer_files import (
    LoadedTokenizer,
    describe_tokenizer,
    load_tokenizer,
)

RANDOM_WEIGHTS_TAG = "random"
"""Stands in the place of a tag of open_clip: weights as they are before training."""
CLIP_VOCABULARY_SIZE = 49408
"""Tokens of CLIP's own tokenizer; a text tower of this size uses it."""
OPEN_CLIP_CLEANINGS = ("whitespace", "lower", "canonicalize")
"""Cleanings of a text that open_clip has by name."""
UNFOLLOWED_TOKENIZER_OPTIONS = (
    "trust_remote_code",
    "reduction_mask",
    "additional_special_tokens",
)
"""Options of open_clip's tokenizers that are refused: code of a hub, texts that differ at each
call, and tokens that the built tokenizer does not have."""
PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""Keys of open_clip's preprocessing that the runtime reads; the size comes from the tower."""
MAX_CACHED_MODELS = 2
"""Models that stay in memory, because both towers of a pipeline mostly come from one source."""


def _read_image_size(tower: nn.Module) -> int:
    """Read the side of the image in pixels; open_clip keeps a number or a pair."""
    size = tower.image_size
    return int(size[0] if isinstance(size, tuple | list) else size)


class ImageEncoder(ImageEncoderModel):
    """Encode pixels [B, 3, S, S] to an embedding [B, D] of length 1 and patch tokens [B, N, W].

    Args:
        tower: open_clip's vision transformer; changed in place.
        preprocess: keys of `mmcompress.runtime.images.preprocess_image`, without the size.
    """

    def __init__(self, tower: VisionTransformer, preprocess: dict[str, object]):
        super().__init__()
        self.tower = tower
        # A decoder may read the patch tokens.
        tower.output_tokens = True
        normalize_(tower.transformer)
        patch_count = int(tower.grid_size[0] * tower.grid_size[1])
        tokens_block = add_tokens_block(self, "tower.ln_pre", extra=1, count=patch_count)
        self.blocks = (tokens_block, *find_blocks(self, "tower.transformer"))
        width = int(tower.conv1.out_channels)
        self.finish_setup(_read_image_size(tower), width, preprocess=preprocess)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding_BD, tokens_BNW = self.tower(pixels)
        return F.normalize(embedding_BD, dim=-1), tokens_BNW


class ConvEncoder(ImageEncoderModel):
    """Encode pixels [B, 3, S, S] to an embedding [B, D] of length 1 and tokens [B, N, W].

    The tokens are the positions of the last feature map.

    Args:
        tower: open_clip's ModifiedResNet or timm model; changed in place.
        preprocess: keys of `mmcompress.runtime.images.preprocess_image`, without the size.
    """

    def __init__(self, tower: nn.Module, preprocess: dict[str, object]):
        super().__init__()
        self.tower = tower
        self.blocks = find_convolutions(self, "tower")
        self.position_counts: dict[str, int] = {}
        with ExitStack() as stack:
            for block in self.blocks:
                hook = _make_position_counter(self.position_counts, block.name)
                first_convolution = self.get_submodule(block.writers[0].path)
                handle = first_convolution.register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            # The setup runs the tower once, which calls the hooks.
            self.finish_setup(_read_image_size(tower), 0, preprocess=preprocess)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tower = self.tower
        if hasattr(tower, "trunk"):  # timm
            features = tower.trunk.forward_features(pixels)
            embedding_BD = tower.head(tower.trunk.forward_head(features))
        else:  # ModifiedResNet
            features = tower.stem(pixels)
            for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
                features = stage(features)
            embedding_BD = tower.attnpool(features)
        tokens_BNW = features.flatten(2).transpose(1, 2)
        return F.normalize(embedding_BD, dim=-1), tokens_BNW

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        """Describe every pair of convolutions, with its kernels and its stride."""
        shapes = {}
        for block in self.blocks:
            first = self.get_submodule(block.writers[0].path)
            last = self.get_submodule(block.reader)
            depthwise = self._find_depthwise_convolution(block.per_channel)
            stride = max(first.stride[0], last.stride[0])
            depthwise_kernel = 0
            if depthwise is not None:
                stride = max(stride, depthwise.stride[0])
                depthwise_kernel = depthwise.kernel_size[0]
            geometry = ConvGeometry(
                first_kernel=first.kernel_size[0],
                last_kernel=last.kernel_size[0],
                stride=stride,
                depthwise_kernel=depthwise_kernel,
            )
            shapes[block.name] = BlockShape(
                width=first.in_channels,
                positions=self.position_counts[block.name],
                keys=1,
                batch=1,
                head=last.out_channels,
                conv=geometry,
            )
        return shapes

    def _find_depthwise_convolution(self, paths: tuple[str, ...]) -> nn.Conv2d | None:
        """Find the convolution among the modules that treat each channel on its own."""
        for path in paths:
            module = self.get_submodule(path)
            if isinstance(module, nn.Conv2d):
                return module
        return None


def _make_position_counter(
    position_counts: dict[str, int], block_name: str
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Make a hook that stores how many positions the feature map before a module has."""

    def count_positions(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        feature_map = inputs[0]
        position_counts[block_name] = feature_map.shape[2] * feature_map.shape[3]

    return count_positions


class TextEncoder(TextEncoderModel):
    """Encode ids [B, T] to an embedding [B, D] of length 1; T is the context length of the tower.

    Args:
        tower: open_clip's text transformer; changed in place.
        tokenizer: the tokenizer, and how texts are padded and cleaned.
    """

    def __init__(self, tower: TextTransformer, tokenizer: LoadedTokenizer):
        super().__init__()
        self.tower = tower
        tower.output_tokens = False
        normalize_(tower.transformer)
        self.blocks = find_blocks(self, "tower.transformer")
        self.tokenizer_json = tokenizer.json
        # Where nothing names the end token, the tower reads the embedding at the highest id.
        named_eos = tower.eos_id if tower.pool_type == "eos" else tower.vocab_size - 1
        eos = named_eos if tokenizer.eos is None else tokenizer.eos
        settings = tokenizer.list_settings()
        if tokenizer.pad_side == "left":
            settings["pad_side"] = "left"
        self.finish_setup(
            int(tower.context_length),
            int(tower.width),
            vocabulary=int(tower.vocab_size),
            pad=int(tower.pad_id if tokenizer.pad is None else tokenizer.pad),
            eos=int(eos),
            text_settings=settings,
        )

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.tower(ids), dim=-1)


@lru_cache(maxsize=MAX_CACHED_MODELS)
def _load_clip(name: str, pretrained: str | None) -> tuple[nn.Module, dict[str, object]]:
    """Load an open_clip model with both towers, from safetensors only, and its preprocessing.

    All callers share what comes back: an encoder that changes a tower must copy it first.
    """
    source = f"open_clip:{name}"
    if pretrained:
        source += f"@{pretrained}"
    _check_model_name(source, name)
    if pretrained is None and not name.startswith("local-dir:"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(
            f"{source}: names no weights: add @TAG (known: {tags}), @FILE.safetensors, "
            f"or @random to try it"
        )
    tag = None if pretrained == RANDOM_WEIGHTS_TAG else pretrained
    try:
        with refuse_pickles(source):
            # `force_custom_text` makes the text tower a module of its own.
            model = open_clip.create_model(
                name, pretrained=tag, force_custom_text=True, weights_only=True
            )
        library_preprocess = open_clip.get_model_preprocess_cfg(model)
    except ModelError:
        raise
    except Exception as error:  # open_clip raises RuntimeError, FileNotFoundError and hub errors
        if tag and not Path(tag).exists() and is_unreachable(error):
            raise ModelError(
                f"{source}: the hub can't be reached and no copy is cached; give a local folder"
            ) from error
        raise ModelError(f"open_clip can't load '{source}': {summarize_error(error)}") from error
    return model.float().eval(), _keep_preprocessing(library_preprocess)


def _check_model_name(source: str, name: str) -> None:
    """Refuse a name that open_clip does not know, and suggest the nearest ones."""
    if name.startswith(("local-dir:", "hf-hub:")):
        return
    known_names = open_clip.list_models()
    if name.replace("/", "-") in known_names:
        return
    close_names = difflib.get_close_matches(name, known_names, 3)
    hint = f"; did you mean {' or '.join(close_names)}?" if close_names else ""
    raise ModelError(f"{source}: open_clip has no model of this name{hint}")


def _keep_preprocessing(library_preprocess: dict[str, object]) -> dict[str, object]:
    """Keep the preprocessing that the runtime reads, with lists for tuples as JSON has them."""
    preprocess = {}
    for key, value in library_preprocess.items():
        if key in PREPROCESS_KEYS:
            preprocess[key] = list(value) if isinstance(value, tuple) else value
    return preprocess


def clip_tokenizer_json() -> str:
    """Build CLIP's tokenizer as JSON.

    The vocabulary is the one that open_clip brings: OpenAI CLIP's, MIT licence.
    """
    library_tokenizer = SimpleTokenizer()
    vocabulary = library_tokenizer.encoder
    start = "<start_of_text>"
    end = "<end_of_text>"
    merges = sorted(library_tokenizer.bpe_ranks, key=library_tokenizer.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=end))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    word_pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(word_pattern, "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])],
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([start, end])
    return str(tokenizer.to_str())


def _name_source(context: LoadContext) -> str:
    """Name a source as open_clip does: a local folder or a model of its list."""
    return f"local-dir:{context.path}" if context.path else context.name


def _load_tokenizer(text_tower: nn.Module, context: LoadContext) -> LoadedTokenizer:
    """Load the tokenizer that open_clip uses for a source, with its cleaning and padding.

    A folder may bring a `tokenizer.json` that its configuration does not name. That file is used
    where CLIP's own vocabulary does not fit.

    Raises:
        ModelError: the tokenizer can't be loaded, or a setting of it is not followed.
    """
    source = _name_source(context)
    text_config = _read_text_config(context)
    options = dict(text_config.get("tokenizer_kwargs") or {})
    _check_tokenizer_options(text_config, options, source=source)
    is_clips_size = text_tower.vocab_size == CLIP_VOCABULARY_SIZE
    if context.path and not text_config.get("hf_tokenizer_name") and not is_clips_size:
        return replace(load_tokenizer(context), pad=int(text_tower.pad_id), pad_side="right")
    try:
        library_tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # transformers and hubs raise what they like
        raise ModelError(
            f"{source}: open_clip can't load its tokenizer: {summarize_error(error)}; give a local"
            " folder with tokenizer.json and tokenizer_config.json"
        ) from error
    if isinstance(library_tokenizer, SimpleTokenizer):
        tokenizer_json = clip_tokenizer_json()
        return LoadedTokenizer(
            json=tokenizer_json,
            pad=0,
            eos=library_tokenizer.eot_token_id,
            clean=str(options.get("clean", "lower")),
        )
    inner = library_tokenizer.tokenizer
    is_plain = isinstance(library_tokenizer, HFTokenizer)
    clean = str(options.get("clean", "whitespace")) if is_plain else "canonicalize"
    replaced_ids: tuple[tuple[int, int], ...] = ()
    if options.get("strip_sep_token"):
        replaced_ids = ((int(inner.sep_token_id), 0),)
    try:
        return replace(describe_tokenizer(inner), clean=clean, replaced_ids=replaced_ids)
    except Exception as error:  # converters raise what they like
        raise ModelError(
            f"{source}: its tokenizer has no fast form: {summarize_error(error)}; save one beside"
            " the weights (tokenizer.json)"
        ) from error


def _read_text_config(context: LoadContext) -> dict[str, object]:
    """Read what open_clip knows of the text side of a source."""
    if context.path:
        model_config = load_json(context, "open_clip_config.json").get("model_cfg") or {}
    else:
        model_config = open_clip.get_model_config(context.name) or {}
    return dict(model_config.get("text_cfg") or {})


def _check_tokenizer_options(
    text_config: dict[str, object], options: dict[str, object], *, source: str
) -> None:
    """Refuse settings of a tokenizer that are not followed, by their names."""
    if text_config.get("tokenizer_mode"):
        raise ModelError(f"{source}: text_cfg.tokenizer_mode: not followed")
    for key in UNFOLLOWED_TOKENIZER_OPTIONS:
        if options.get(key):
            raise ModelError(f"{source}: text_cfg.tokenizer_kwargs.{key}: not followed")
    clean = options.get("clean", "lower")
    if clean not in OPEN_CLIP_CLEANINGS:
        raise ModelError(
            f"{source}: text_cfg.tokenizer_kwargs.clean: '{clean}' is unknown"
            f" (known: {', '.join(OPEN_CLIP_CLEANINGS)})"
        )


def _make_text_tower_error(clip: nn.Module, context: LoadContext) -> ModelError:
    """Make the error about a text tower whose layers are not open_clip's own."""
    tower_class = type(clip.text).__name__
    return ModelError(f"{_name_source(context)}: text tower {tower_class} is not supported")


def load_image_encoder(context: LoadContext) -> Model:
    """Load the image tower of an open_clip model.

    Raises:
        ModelError: if the model can't be loaded or its image tower is not supported.
    """
    clip, preprocess = _load_clip(_name_source(context), context.pretrained)
    # The cached model stays as the library made it: the encoder changes a copy.
    if hasattr(clip.visual, "transformer"):
        return ImageEncoder(copy.deepcopy(clip.visual), copy.deepcopy(preprocess))
    if hasattr(clip.visual, "trunk") or hasattr(clip.visual, "layer4"):
        return ConvEncoder(copy.deepcopy(clip.visual), copy.deepcopy(preprocess))
    tower_class = type(clip.visual).__name__
    raise ModelError(f"{_name_source(context)}: image tower {tower_class} is not supported")


def load_text_encoder(context: LoadContext) -> Model:
    """Load the text tower of an open_clip model.

    Raises:
        ModelError: if the model can't be loaded or its text tower is not supported.
    """
    clip, _ = _load_clip(_name_source(context), context.pretrained)
    if not hasattr(clip.text, "transformer") or not hasattr(clip.text, "token_embedding"):
        raise _make_text_tower_error(clip, context)
    return TextEncoder(copy.deepcopy(clip.text), _load_tokenizer(clip.text, context))


def load_text_decoder(context: LoadContext) -> Model:
    """Load the caption decoder of a CoCa model of open_clip.

    Raises:
        ModelError: if the model can't be loaded or has no caption decoder.
    """
    clip, _ = _load_clip(_name_source(context), context.pretrained)
    if not hasattr(clip, "text_decoder"):
        raise ModelError(
            f"{_name_source(context)}: only CoCa models have a caption decoder in open_clip"
        )
    if not hasattr(clip.text, "token_embedding"):
        raise _make_text_tower_error(clip, context)
    # The text encoder of the same checkpoint shares the first layers.
    return build_caption_decoder(
        copy.deepcopy(clip),
        _load_tokenizer(clip.text, context).json,
        candidates=context.candidates,
        max_tokens=context.max_tokens or DEFAULT_MAX_TOKENS,
    )


def build_caption_decoder(
    coca: nn.Module, tokenizer_json: str, *, candidates: int, max_tokens: int
) -> Model:
    """Build the caption decoder of a CoCa model; its image tower is a node of its own.

    Args:
        coca: open_clip's CoCa; changed in place.
        tokenizer_json: a fast tokenizer as JSON.
        candidates: number of captions for each image, which is the number of beams.
        max_tokens: tokens of the longest caption.
    """
    lm = CaptionDecoder(coca).eval()
    width = int(coca.text.token_embedding.embedding_dim)
    # Scale and shift of this norm are part of the weights of cross-attention.
    norm = nn.LayerNorm(width, coca.text_decoder.ln_final.eps, elementwise_affine=False)
    return TextDecoder(
        lm,
        DECODER_FAMILIES["coca"],
        tokenizer_json=tokenizer_json,
        generation=read_generation_settings(lm, lm, candidates=candidates, max_tokens=max_tokens),
        project=norm,
    )
