"""open_clip's image towers, text towers, and CoCa's caption decoder."""

from __future__ import annotations

import copy
import difflib
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.errors import MissingPackage, ModelError
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
from mmcompress.models.families.decoding import read_generation
from mmcompress.models.hub import (
    is_unreachable,
    load_tokenizer_json,
    refuse_pickles,
    summarize_error,
)
from mmcompress.models.layouts import find_blocks, find_convolutions, normalize_


class ImageEncoder(ImageEncoderModel):
    """pixels [b, 3, s, s] -> embedding [b, d] of length 1, patch tokens [b, n, w]."""

    def __init__(self, tower: Any, preprocess: dict[str, Any]):
        super().__init__()
        self.tower = tower
        tower.output_tokens = True
        normalize_(tower.transformer)
        size, width = tower.image_size, int(tower.conv1.out_channels)
        places = int(tower.grid_size[0] * tower.grid_size[1])
        self.blocks = (
            add_tokens_block(self, "tower.ln_pre", extra=1, count=places),
            *find_blocks(self, "tower.transformer"),
        )
        self.finish_setup(
            int(size[0] if isinstance(size, tuple | list) else size), width, preprocess=preprocess
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding, tokens = self.tower(pixels)
        return F.normalize(embedding, dim=-1), tokens


class ConvEncoder(ImageEncoderModel):
    """pixels [b, 3, s, s] -> embedding [b, d] of length 1, tokens [b, n, w]: the places of the last feature map."""

    def __init__(self, tower: Any, preprocess: dict[str, Any]):
        super().__init__()
        self.tower = tower
        self.blocks = find_convolutions(self, "tower")
        size = tower.image_size
        size = int(size[0] if isinstance(size, tuple | list) else size)
        places: dict[str, int] = {}
        with ExitStack() as stack:
            for b in self.blocks:
                record = lambda m, args, name=b.name: places.update(
                    {name: args[0].shape[2] * args[0].shape[3]}
                )
                handle = self.get_submodule(b.writers[0].path).register_forward_pre_hook(record)
                stack.callback(handle.remove)
            self.finish_setup(size, 0, preprocess=preprocess)
        self.places = places

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        t = self.tower
        if hasattr(t, "trunk"):  # timm
            features = t.trunk.forward_features(pixels)
            embedding = t.head(t.trunk.forward_head(features))
        else:  # ModifiedResNet
            features = t.layer4(t.layer3(t.layer2(t.layer1(t.stem(pixels)))))
            embedding = t.attnpool(features)
        return F.normalize(embedding, dim=-1), features.flatten(2).transpose(1, 2)

    def list_block_shapes(self, steps: float, beams: int) -> dict[str, BlockShape]:
        found = {}
        for b in self.blocks:
            first: Any = self.get_submodule(b.writers[0].path)
            last: Any = self.get_submodule(b.reader)
            depthwise: Any = next(
                (m for p in b.per_channel if isinstance(m := self.get_submodule(p), nn.Conv2d)),
                None,
            )
            stride = max(m.stride[0] for m in (first, last, depthwise) if m is not None)
            kernels = (
                first.kernel_size[0],
                last.kernel_size[0],
                stride,
                depthwise.kernel_size[0] if depthwise else 0,
            )
            code = int("".join(map(str, kernels)))
            found[b.name] = BlockShape(
                width=first.in_channels,
                positions=self.places[b.name],
                keys=code,
                batch=1,
                head=last.out_channels,
            )
        return found


class TextEncoder(TextEncoderModel):
    """ids [b, t] -> embedding [b, d] of length 1; t is the tower's context length."""

    def __init__(self, tower: Any, tokenizer_json: str):
        super().__init__()
        self.tower = tower
        tower.output_tokens = False
        normalize_(tower.transformer)
        self.blocks = find_blocks(self, "tower.transformer")
        self.tokenizer_json = tokenizer_json
        eos = (
            tower.eos_id if tower.pool_type == "eos" else tower.vocab_size - 1
        )  # the highest id marks the end
        self.finish_setup(
            int(tower.context_length),
            int(tower.width),
            vocabulary=int(tower.vocab_size),
            pad=int(tower.pad_id),
            eos=int(eos),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.tower(ids), dim=-1)


NO_PRETRAINED = "random"
"""In place of a tag: weights as they are before training."""


@lru_cache(maxsize=2)
def _clip(name: str, pretrained: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """An open_clip model with both towers, weights from safetensors only, and its preprocessing."""
    try:
        import open_clip
    except ImportError as e:
        raise MissingPackage("open_clip_torch", "compress") from e
    what = f"open_clip:{name}" + (f"@{pretrained}" if pretrained else "")
    known = open_clip.list_models()
    if not name.startswith(("local-dir:", "hf-hub:")) and name.replace("/", "-") not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ModelError(f"{what}: open_clip has no model of this name{hint}")
    if pretrained is None and not name.startswith("local-dir:"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(
            f"{what}: names no weights: add @TAG (known: {tags}), @FILE.safetensors, or @random to try it"
        )
    tag = None if pretrained == NO_PRETRAINED else pretrained
    try:
        with refuse_pickles(what):
            model = open_clip.create_model(
                name, pretrained=tag, force_custom_text=True, weights_only=True
            )
        config = open_clip.get_model_preprocess_cfg(model)
    except ModelError:
        raise
    except Exception as e:  # open_clip raises RuntimeError, FileNotFoundError, hub errors
        if tag and not Path(tag).exists() and is_unreachable(e):
            raise ModelError(
                f"{what}: the hub can't be reached and no copy is cached; give a local folder"
            ) from e
        raise ModelError(f"open_clip can't load '{what}': {summarize_error(e)}") from e
    keep = ("mean", "std", "interpolation", "resize_mode")
    return model.float().eval(), {
        k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k in keep
    }


def clip_tokenizer_json() -> str:
    """CLIP's tokenizer as JSON, from the vocabulary that open_clip brings (OpenAI CLIP's, MIT licence)."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    given = SimpleTokenizer()
    start, end = "<start_of_text>", "<end_of_text>"
    merges = sorted(given.bpe_ranks, key=given.bpe_ranks.__getitem__)
    tok = Tokenizer(models.BPE(given.encoder, merges, end_of_word_suffix="</w>", unk_token=end))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tok.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    split = pre_tokenizers.Split(pattern, "removed", invert=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ids = [(start, given.encoder[start]), (end, given.encoder[end])]
    tok.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=ids
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([start, end])
    return str(tok.to_str())


def _source(context: LoadContext) -> str:
    return f"local-dir:{context.path}" if context.path else context.name


def load_image_encoder(context: LoadContext) -> Model:
    clip, preprocess = _clip(_source(context), context.pretrained)
    if hasattr(clip.visual, "transformer"):
        return ImageEncoder(clip.visual, preprocess)
    if hasattr(clip.visual, "trunk") or hasattr(clip.visual, "layer4"):
        return ConvEncoder(clip.visual, preprocess)
    raise ModelError(
        f"{_source(context)}: image tower {type(clip.visual).__name__} is not supported"
    )


def build_caption_decoder(
    clip: Any, tokenizer_json: str, *, candidates: int, max_tokens: int
) -> Model:
    """The caption decoder of a CoCa model; it reads the tokens of its image tower, a node of its own."""

    lm = CaptionDecoder(clip).eval()
    width = int(clip.text.token_embedding.embedding_dim)
    norm = nn.LayerNorm(width, clip.text_decoder.ln_final.eps, elementwise_affine=False)
    return TextDecoder(
        lm,
        DECODER_FAMILIES["coca"],
        tokenizer_json=tokenizer_json,
        generation=read_generation(lm, lm, candidates=candidates, max_tokens=max_tokens),
        project=norm,
    )


def load_text_decoder(context: LoadContext) -> Model:
    """CoCa's caption decoder. Raises `ModelError`."""
    clip, _ = _clip(_source(context), context.pretrained)
    if not hasattr(clip, "text_decoder"):
        raise ModelError(
            f"{_source(context)}: only CoCa models have a caption decoder in open_clip"
        )
    if not hasattr(clip.text, "token_embedding"):
        raise ModelError(
            f"{_source(context)}: text tower {type(clip.text).__name__} is not supported"
        )
    # a copy: the text encoder of the same checkpoint shares the first layers
    return build_caption_decoder(
        copy.deepcopy(clip),
        _tokenizer(clip, context),
        candidates=context.candidates,
        max_tokens=context.max_tokens or 20,
    )


def _tokenizer(clip: Any, context: LoadContext) -> str:
    own = context.path is not None and (context.path / "tokenizer.json").is_file()
    standard = not own and clip.text.vocab_size == 49408
    return clip_tokenizer_json() if standard else load_tokenizer_json(context)


def load_text_encoder(context: LoadContext) -> Model:
    clip, _ = _clip(_source(context), context.pretrained)
    if not hasattr(clip.text, "transformer") or not hasattr(clip.text, "token_embedding"):
        raise ModelError(
            f"{_source(context)}: text tower {type(clip.text).__name__} is not supported"
        )
    return TextEncoder(clip.text, _tokenizer(clip, context))
