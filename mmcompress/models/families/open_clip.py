"""open_clip's image towers, text towers, and CoCa's caption decoder.

Shapes: B batch, T text tokens, N image tokens, W width, D width of
    the embedding.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip import factory
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import TextTransformer, VisionTransformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from mmcompress.errors import ModelError, suggest_nearest
from mmcompress.graph.blocks import ConvGeometry
from mmcompress.models.base import (
    BlockShape,
    ImageEncoderModel,
    LoadContext,
    Model,
    TextEncoderModel,
    add_tokens_block,
)
from mmcompress.models.checkpoint import check_tensors, read_checkpoint, read_tensor_names
from mmcompress.models.families.coca import LONGEST_CAPTION, CaptionDecoder
from mmcompress.models.families.cross_attention_decoder import (
    DECODER_FAMILIES,
    TextDecoder,
    read_settings,
)
from mmcompress.models.families.decoding import find_lead
from mmcompress.models.families.generation_settings import TextRequest, refuse_languages
from mmcompress.models.hub import (
    TRAINER_PREFIX,
    load_json,
    refuse_pickles,
    strip_wrappers,
    summarize_error,
)
from mmcompress.models.hub_files import (
    RANDOM_WEIGHTS_TAG,
    TAG_LIBRARY,
    WEIGHT_FILES,
    HubModel,
    fetch_hub_file,
    find_cached_file,
    list_hub_files,
)
from mmcompress.models.layouts import find_blocks, find_convolutions, normalize_
from mmcompress.models.shapes import (
    fill_with_shapes_,
    is_loading_shapes_only,
    make_shape_tensors,
)
from mmcompress.models.tokenizer_files import (
    LoadedTokenizer,
    describe_tokenizer,
    load_tokenizer,
)

FOLDER_PREFIX = "local-dir:"
"""What open_clip writes before a folder."""
SAFETENSORS_SUFFIX = ".safetensors"
"""End of the names of files in the one format that is read."""
CLIP_VOCABULARY_SIZE = 49408
"""Tokens of CLIP's own tokenizer; a text tower of this size uses it."""
PREPROCESS_CHOICES = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": ("shortest", "longest", "squash"),
}
"""Values of open_clip's `preprocess_cfg` that can be followed."""
OPEN_CLIP_CLEANINGS = ("whitespace", "lower", "canonicalize")
"""Cleanings of a text that open_clip has by name."""
UNFOLLOWED_TOKENIZER_OPTIONS = (
    "trust_remote_code",
    "reduction_mask",
    "additional_special_tokens",
)
"""Options of open_clip's tokenizers that are refused. They run code of a hub, give texts that
differ at each call, or add tokens that the built tokenizer does not have."""

MAX_CACHED_MODELS = 2
"""Models that stay in memory, because both towers of a pipeline mostly come from one source."""


def _read_image_sides(tower: nn.Module) -> tuple[int, int]:
    """Read (height, width) of the image in pixels; open_clip keeps a number or a pair."""
    size = tower.image_size
    if isinstance(size, tuple | list):
        return (int(size[0]), int(size[-1]))
    return (int(size), int(size))


class ImageEncoder(ImageEncoderModel):
    """Encode pixels [B, 3, height, width] to an embedding [B, D] and patch tokens [B, N, W].

    The embedding has length 1.

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
        self.finish_setup(_read_image_sides(tower), width, preprocess=preprocess)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding_BD, tokens_BNW = self.tower(pixels)
        return F.normalize(embedding_BD, dim=-1), tokens_BNW


class ConvEncoder(ImageEncoderModel):
    """Encode pixels [B, 3, height, width] to an embedding [B, D] and tokens [B, N, W].

    The embedding has length 1; the tokens are the positions of the last feature map.

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
            self.finish_setup(_read_image_sides(tower), 0, preprocess=preprocess)

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
def _load_clip(
    name: str, pretrained: str | None, *, revision: str, shapes_only: bool
) -> tuple[nn.Module, dict[str, object]]:
    """Load an open_clip model with both towers, from safetensors only, and its preprocessing.

    All callers share what comes back: an encoder that changes a tower must copy it first.

    Args:
        name: A name of open_clip's list, or `local-dir:` and a folder.
        pretrained: A tag or a file of weights; None for a folder.
        revision: A branch, tag or commit of the model at a hub that the tag names.
        shapes_only: Whether the weights are left out and their shapes are checked alone.
    """
    source = f"open_clip:{name}"
    if pretrained:
        source += f"@{pretrained}"
    _check_model_name(source, name)
    folder = None
    if name.startswith(FOLDER_PREFIX):
        folder = Path(name.removeprefix(FOLDER_PREFIX))
        if not shapes_only or any((folder / file).exists() for file in WEIGHT_FILES["open_clip"]):
            read_checkpoint(folder, WEIGHT_FILES["open_clip"])
    elif pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(
            f"{source}: names no weights: add @TAG (known: {tags}), @FILE.safetensors, "
            f"or @random to try it"
        )
    tag = None if pretrained == RANDOM_WEIGHTS_TAG else pretrained
    weights_file: Path | None = None
    if tag is not None:
        weights_file = find_tagged_weights(
            source, name, tag=tag, revision=revision, shapes_only=shapes_only
        )
    try:
        with refuse_pickles(source), strip_wrappers_of_weights(), read_weights_from(weights_file):
            # `force_custom_text` makes the text tower a module of its own.
            options: dict[str, Any] = {"force_custom_text": True, "weights_only": True}
            if shapes_only:
                model = _create_shapes(name, tag, options=options)
            else:
                model = open_clip.create_model(name, pretrained=tag, **options)
        library_preprocess = open_clip.get_model_preprocess_cfg(model)
    except ModelError:
        raise
    except Exception as error:  # open_clip raises RuntimeError, FileNotFoundError and hub errors
        raise ModelError(f"open_clip can't load '{source}': {summarize_error(error)}") from error
    return model.float().eval(), _keep_preprocessing(source, library_preprocess)


def find_tagged_model(name: str, tag: str, *, revision: str = "") -> HubModel | None:
    """Return the model at a hub that the weights behind a tag come from; None without one.

    Args:
        name: A name of open_clip's list.
        tag: A tag; a file names no model.
        revision: A branch, tag or commit of the hub; empty for the main branch.
    """
    hub_name, _, _ = str(_get_tag_config(name, tag).get("hf_hub", "")).rpartition("/")
    if not hub_name:
        return None
    return HubModel(name=hub_name, revision=revision, library=TAG_LIBRARY)


def find_tagged_weights(
    source: str, name: str, *, tag: str, revision: str, shapes_only: bool
) -> Path | None:
    """Fetch the weights behind a tag into the cache of the hub.

    open_clip itself takes every failure for a file that the hub does not have, and goes on with a
    pickle. It knows no revisions either.

    Args:
        source: The source as the spec names it, for messages.
        name: The architecture, as open_clip calls it.
        tag: The tag of the weights, or a file.
        revision: A branch, tag or commit; empty for the main branch.
        shapes_only: Whether no weights are read.

    Returns:
        The file of the weights; None where open_clip finds it, or where shapes are asked for alone.

    Raises:
        ModelError: The file of weights is damaged, or the hub does not give it.
    """
    if Path(tag).is_file():
        if Path(tag).suffix != SAFETENSORS_SUFFIX:
            raise ModelError(
                f"{source}: {tag} is a pickle, a format that can run code;"
                " convert it to .safetensors"
            )
        check_tensors(tag, read_tensor_names(Path(tag)))
        return None
    tag_config = _get_tag_config(name, tag)
    if not tag_config:
        raise ModelError(
            f"{source}: '{tag}' is no file and no tag of open_clip;"
            f" {suggest_nearest(tag, open_clip.list_pretrained_tags_by_model(name))}"
        )
    hub_model = find_tagged_model(name, tag, revision=revision)
    if hub_model is None:
        if revision:
            raise ModelError(f"{source}: the weights of '{tag}' come from no hub of revisions")
        return None
    file_name = str(tag_config["hf_hub"]).rpartition("/")[2]
    wanted = [file_name] if file_name.endswith(SAFETENSORS_SUFFIX) else []
    wanted += WEIGHT_FILES["open_clip"]
    for wanted_name in wanted:
        cached = find_cached_file(hub_model.name, wanted_name, revision=revision)
        if cached is not None:
            return cached
    listing = list_hub_files(hub_model)
    for wanted_name in wanted:
        if wanted_name in listing.files and not shapes_only:
            return fetch_hub_file(hub_model, wanted_name, commit=listing.commit)
    return None


@contextmanager
def read_weights_from(file: Path | None) -> Iterator[None]:
    """Let open_clip read a file in place of what it would fetch while the block runs.

    Args:
        file: The file; None: open_clip fetches what it wants to.
    """
    library_download = factory.download_pretrained

    def take_file(*_: object, **__: object) -> str:
        return str(file)

    if file is not None:
        factory.download_pretrained = take_file
    try:
        yield
    finally:
        factory.download_pretrained = library_download


def _get_tag_config(name: str, tag: str) -> dict[str, object]:
    """Return what open_clip knows of the weights behind a tag; empty for an unknown tag."""
    return dict(open_clip.get_pretrained_cfg(name.replace("/", "-"), tag) or {})


def _create_shapes(name: str, tag: str | None, *, options: dict[str, Any]) -> nn.Module:
    """Create a model whose tensors have shapes and no numbers, and compare them with the weights.

    Weights behind a tag are not fetched, so their shapes are not compared.

    Raises:
        RuntimeError: Weights are missing or of another shape, as open_clip tells it.
    """
    checkpoint = _find_local_weights(name, tag)
    if tag is not None and checkpoint is None:
        options = {
            **options,
            "force_preprocess_cfg": _keep_preprocessing(name, _get_tag_config(name, tag)),
        }
    with torch.device("meta"):
        model = open_clip.create_model(name, load_weights=False, device="meta", **options)
    if checkpoint is not None:
        library_load = factory.load_state_dict
        factory.load_state_dict = _read_shapes
        try:
            with warnings.catch_warnings():
                # nothing is copied into a model without numbers, as is meant here
                warnings.simplefilter("ignore", UserWarning)
                factory.load_checkpoint(model, str(checkpoint))
        finally:
            factory.load_state_dict = library_load
    fill_with_shapes_(model)
    return model


def _find_local_weights(name: str, tag: str | None) -> Path | None:
    """Return the file of weights on this machine; None when there is none yet."""
    if name.startswith(FOLDER_PREFIX):
        folder = Path(name.removeprefix(FOLDER_PREFIX))
        names = [file for file in WEIGHT_FILES["open_clip"] if (folder / file).exists()]
        return folder / names[0] if names else None
    if tag is not None and Path(tag).is_file():
        return Path(tag)
    return None


def _read_shapes(checkpoint_path: str, **_: object) -> dict[str, Tensor]:
    """Read what open_clip would load from a file, as tensors without numbers."""
    weights = make_shape_tensors(read_tensor_names(Path(checkpoint_path)))
    return dict(zip(strip_wrappers(list(weights)), weights.values(), strict=True))


@contextmanager
def strip_wrappers_of_weights() -> Iterator[None]:
    """Let open_clip read the weights of a wrapped model while the block runs."""
    library_load = factory.load_state_dict

    def load_stripped(*arguments: object, **options: object) -> dict[str, Tensor]:
        weights = library_load(*arguments, **options)
        names = strip_wrappers(list(weights))
        if all(name.startswith(TRAINER_PREFIX) for name in names):
            names = [name.removeprefix(TRAINER_PREFIX) for name in names]
        return dict(zip(names, weights.values(), strict=True))

    factory.load_state_dict = load_stripped
    try:
        yield
    finally:
        factory.load_state_dict = library_load


def _check_model_name(source: str, name: str) -> None:
    """Refuse a name that open_clip does not know, and suggest the nearest ones."""
    if name.startswith(FOLDER_PREFIX):
        return
    known_names = open_clip.list_models()
    if name.replace("/", "-") in known_names:
        return
    close_names = difflib.get_close_matches(name, known_names, 3)
    hint = f"; did you mean {' or '.join(close_names)}?" if close_names else ""
    raise ModelError(f"{source}: open_clip has no model of this name{hint}")


def _keep_preprocessing(source: str, library_preprocess: dict[str, Any]) -> dict[str, object]:
    """Keep of open_clip's preprocessing what the runtime reads, as JSON has it.

    Raises:
        ModelError: A value can't be followed.
    """
    for key, choices in PREPROCESS_CHOICES.items():
        value = library_preprocess.get(key)
        if value is not None and value not in choices:
            raise ModelError(
                f"{source}: preprocess_cfg.{key}: {value!r} can't be followed"
                f" (known: {', '.join(choices)})"
            )
    # the library takes the same values where the configuration says nothing
    preprocess: dict[str, object] = {
        "mean": _read_planes(library_preprocess, "mean", default=OPENAI_DATASET_MEAN),
        "std": _read_planes(library_preprocess, "std", default=OPENAI_DATASET_STD),
        "interpolation": library_preprocess.get("interpolation") or "bicubic",
        "resize_mode": library_preprocess.get("resize_mode") or "shortest",
    }
    size = library_preprocess.get("size")
    is_oblong = isinstance(size, tuple | list) and size[0] != size[-1]
    if is_oblong and preprocess["resize_mode"] == "shortest":
        # the library's transform forgets the filter here
        preprocess["interpolation"] = "bicubic"
    fill = library_preprocess.get("fill_color") or 0
    if fill:
        preprocess["fill_color"] = int(fill)
    return preprocess


def _read_planes(
    library_preprocess: dict[str, Any], key: str, *, default: tuple[float, ...]
) -> list[float]:
    """Read three numbers, or one for all planes."""
    value = library_preprocess.get(key) or default
    return list(value) if isinstance(value, tuple | list) else [value] * 3


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
    return f"{FOLDER_PREFIX}{context.path}" if context.path else context.name


def _load_source(context: LoadContext) -> tuple[nn.Module, dict[str, object]]:
    """Load the model of a source with both towers, and its preprocessing."""
    return _load_clip(
        _name_source(context),
        context.pretrained,
        revision=context.revision,
        shapes_only=is_loading_shapes_only(),
    )


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
    clip, preprocess = _load_source(context)
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
    clip, _ = _load_source(context)
    if not hasattr(clip.text, "transformer") or not hasattr(clip.text, "token_embedding"):
        raise _make_text_tower_error(clip, context)
    return TextEncoder(copy.deepcopy(clip.text), _load_tokenizer(clip.text, context))


def load_text_decoder(context: LoadContext) -> Model:
    """Load the caption decoder of a CoCa model of open_clip.

    Raises:
        ModelError: if the model can't be loaded or has no caption decoder.
    """
    refuse_languages(context.language, context.task, model_type="coca")
    clip, _ = _load_source(context)
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
        max_tokens=context.max_tokens,
        prompt=context.prompt,
    )


def build_caption_decoder(
    coca: nn.Module, tokenizer_json: str, *, candidates: int, max_tokens: int, prompt: str = ""
) -> Model:
    """Build the caption decoder of a CoCa model; its image tower is a node of its own.

    Args:
        coca: open_clip's CoCa; changed in place.
        tokenizer_json: a fast tokenizer as JSON.
        candidates: number of captions for each image, which is the number of beams.
        max_tokens: tokens of the longest caption; 0: as many as the library writes.
        prompt: what every caption starts with; may be empty.
    """
    lm = CaptionDecoder(coca).eval()
    width = int(coca.text.token_embedding.embedding_dim)
    # Scale and shift of this norm are part of the weights of cross-attention.
    norm = nn.LayerNorm(width, coca.text_decoder.ln_final.eps, elementwise_affine=False)
    # transformers' `generate` would write another number of tokens by default
    longest = max_tokens or min(LONGEST_CAPTION, lm.config.max_position_embeddings)
    request = TextRequest(candidates=candidates, max_tokens=longest, prompt=prompt)
    return TextDecoder(
        lm,
        DECODER_FAMILIES["coca"],
        tokenizer_json=tokenizer_json,
        generation=read_settings(lm, lm, tokenizer_json=tokenizer_json, request=request),
        project=norm,
        lead=find_lead(tokenizer_json, prompt),
    )
