"""Small random models of every family, as their libraries make them.

`library_says` of each is what the library's own untouched copy puts out for the inputs of the contract.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from mmcompress.models.base import Model

TOKENIZER = functools.cache(lambda: _tokenizer())


def _tokenizer() -> str:
    from train_demo_models import build_tokenizer

    return str(build_tokenizer().to_str())  # type: ignore[attr-defined]


SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, **SPECIAL, "vocab_size": 60, "max_position_embeddings": 24}
EAGER = {"attn_implementation": "eager"}


def _stirred(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights that do something: biases, norms and embeddings away from where they start."""
    g = torch.Generator().manual_seed(7)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return module.eval()


def _with(model: Model, says: Callable[..., object]) -> Model:
    """The model, with what its library says."""
    model.library_says = lambda *given: out if isinstance(out := says(*given), tuple) else (out,)  # type: ignore[assignment]
    return model


class Says(torch.nn.Module):
    """In place of a library's encoder, puts out a given context."""

    main_input_name = "pixel_values"

    def forward(self, *_: object, **__: object) -> object:
        first = torch.zeros(len(self.context), 1, self.context.shape[2])
        layers = (None, torch.cat([first, self.context], 1), None)
        return SimpleNamespace(last_hidden_state=self.context, hidden_states=layers)


def _image(config: str, tower: str, model_type: str, **extra: object) -> Model:
    import transformers

    from mmcompress.models.families import transformers_encoders as encoders

    c = getattr(transformers, config)(**VISION, **extra)
    c._attn_implementation = "eager"
    return _tower(_stirred(getattr(transformers, tower)(c)), encoders.IMAGE_FAMILIES[model_type])


def _tower(raw: torch.nn.Module, row: object) -> Model:
    from mmcompress.models.families import transformers_encoders as encoders

    whole = copy.deepcopy(raw)

    def says(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = whole(pixel_values=pixels)
        return F.normalize(row.embed(out, pixels), dim=-1), row.tokens(out)  # type: ignore[attr-defined]

    return _with(encoders.ImageEncoder(raw, row, preprocess={}), says)  # type: ignore[arg-type]


def _part_of(model_type: str, whole: torch.nn.Module) -> Model:
    """The image tower in a model that is loaded whole."""
    from mmcompress.models.families import transformers_encoders as encoders

    row = encoders.IMAGE_FAMILIES[model_type]
    return _tower(row.find_tower(_stirred(whole)), row)


def _text(config: str, tower: str, model_type: str, masked: bool, **extra: object) -> Model:
    import transformers

    from mmcompress.models.families import transformers_encoders as encoders

    c = getattr(transformers, config)(**TEXT, **extra)
    c._attn_implementation = "eager"
    tower_, row = _stirred(getattr(transformers, tower)(c)), encoders.TEXT_FAMILIES[model_type]
    whole = copy.deepcopy(tower_)

    def says(ids: torch.Tensor) -> torch.Tensor:
        mask = ids != 1
        out = whole(input_ids=ids, **({"attention_mask": mask.long()} if masked else {}))
        return F.normalize(row.embed(out, mask), dim=-1)

    return _with(
        encoders.TextEncoder(tower_, row, tokenizer_json=TOKENIZER(), context=16, masked=masked),
        says,
    )


def _whisper_config():  # type: ignore[no-untyped-def]
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=60,
        num_mel_bins=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        d_model=32,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=24,
        max_target_positions=24,
        decoder_start_token_id=0,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        attn_implementation="eager",
        **SPECIAL,
    )


def _audio() -> Model:
    from transformers import WhisperModel

    from mmcompress.models.families.transformers_encoders import AudioEncoder

    raw = _stirred(WhisperModel(_whisper_config()).encoder)
    whole = copy.deepcopy(raw)

    def says(features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = whole(features).last_hidden_state
        return F.normalize(tokens.mean(1), dim=-1), tokens

    return _with(AudioEncoder(raw), says)


def _decoder(whole: torch.nn.Module, model_type: str, beams: int = 3) -> Model:
    from mmcompress.models.families.cross_attention_decoder import assemble_decoder

    raw = copy.deepcopy(_stirred(whole))

    def says(ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        if raw.config.is_encoder_decoder:
            given = BaseModelOutput(context)
            return raw(encoder_outputs=given, decoder_input_ids=ids).logits
        return raw(input_ids=ids, encoder_hidden_states=context).logits

    return _with(
        assemble_decoder(
            whole, model_type, tokenizer_json=TOKENIZER(), candidates=beams, max_tokens=14
        ),
        says,
    )


def _mbart() -> Model:
    from transformers import MBartConfig, MBartForCausalLM

    c = MBartConfig(
        vocab_size=60,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        encoder_layers=0,
        max_position_embeddings=24,
        is_decoder=True,
        is_encoder_decoder=False,
        scale_embedding=False,
        forced_eos_token_id=None,
        **SPECIAL,
        **EAGER,
    )
    return _decoder(MBartForCausalLM(c), "mbart")


def _causal(config: str, lm: str, model_type: str) -> Model:
    import transformers

    c = getattr(transformers, config)(**TEXT, is_decoder=True, add_cross_attention=True, **EAGER)
    return _decoder(getattr(transformers, lm)(c), model_type)


def _blip() -> Model:
    from transformers import BlipTextConfig, BlipTextLMHeadModel

    c = BlipTextConfig(**TEXT, encoder_hidden_size=48, sep_token_id=2, is_decoder=True, **EAGER)
    return _decoder(BlipTextLMHeadModel(c), "blip_text_model")


def _vision_encoder_decoder(inner: str) -> Model:
    import transformers
    from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    text = getattr(transformers, inner)(**TEXT, is_decoder=True, add_cross_attention=True)
    image = ViTConfig(**{**VISION, "hidden_size": 48})
    c = VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    c.decoder_start_token_id = 0
    return _decoder(VisionEncoderDecoderModel(c), "vision-encoder-decoder")


def _whisper() -> Model:
    from transformers import WhisperForConditionalGeneration

    whole = WhisperForConditionalGeneration(_whisper_config())
    whole.generation_config.no_timestamps_token_id = 5
    whole.generation_config.suppress_tokens = [7, 8, 9, 20, 21, 22, 30]
    whole.generation_config.begin_suppress_tokens = [2, 11, 12]
    return _decoder(whole, "whisper", beams=1)


def _t5(gated: bool) -> Model:
    from transformers import T5Config, T5ForConditionalGeneration

    c = T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return _decoder(T5ForConditionalGeneration(c), "t5")


def _git() -> Model:
    from mmcompress.models.families.prefix_decoder import assemble_prefix_decoder

    raw = copy.deepcopy(whole := _stirred(_git_whole()))
    raw.git.image_encoder = Says()

    def says(ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        raw.git.image_encoder.context = context
        return raw(pixel_values=torch.zeros(len(ids), 3, 32, 32), input_ids=ids).logits[
            :, -ids.shape[1] :
        ]

    return _with(assemble_prefix_decoder(whole, "git", TOKENIZER(), 3, 14), says)


def _git_whole() -> torch.nn.Module:
    from transformers import GitConfig, GitForCausalLM

    return GitForCausalLM(GitConfig(vision_config={**VISION, "hidden_size": 48}, **TEXT, **EAGER))


def _llava(prompt: str = "") -> Model:
    from mmcompress.models.families.prefix_decoder import assemble_prefix_decoder

    raw = copy.deepcopy(whole := _stirred(_llava_whole(260 if prompt else 60)))
    raw.model.vision_tower = Says()
    model = assemble_prefix_decoder(whole, "llava", TOKENIZER(), 3, 14, prompt)

    def says(ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        raw.model.vision_tower.context = context
        image = torch.full((len(ids), context.shape[1]), raw.config.image_token_id)
        every = torch.cat([model.before.expand(len(ids), -1), image, ids], 1)
        found = raw(pixel_values=torch.zeros(len(ids), 3, 32, 32), input_ids=every)
        return found.logits[:, -ids.shape[1] :]

    return _with(model, says)


def _llava_whole(vocabulary: int = 60) -> torch.nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    c = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "hidden_size": 48}),
        text_config=LlamaConfig(**{**TEXT, "vocab_size": vocabulary}, num_key_value_heads=2),
        image_token_index=1,  # which no input of the contract holds
    )
    c._attn_implementation = "eager"
    return LlavaForConditionalGeneration(c)


def _open_clip(vision: dict[str, object], kind: str = "image") -> Model:
    from open_clip.model import CLIP

    from mmcompress.models.families import open_clip

    text = {
        "context_length": 16,
        "vocab_size": 60,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "pad_id": 1,
        "eos_id": 2,
    }
    clip = _stirred(CLIP(16, {"image_size": 64, **vision}, {**text, "pool_type": "eos"}))
    if kind == "text":
        tower = _stirred(_text_tower(text))
        whole = copy.deepcopy(tower)
        return _with(
            open_clip.TextEncoder(tower, TOKENIZER()), lambda ids: F.normalize(whole(ids), dim=-1)
        )
    return _visual(clip.visual)


def _visual(tower: torch.nn.Module) -> Model:
    from mmcompress.models.families import open_clip

    whole, attends = copy.deepcopy(tower), hasattr(tower, "transformer")

    def says(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if attends:
            whole.output_tokens = True
            embedding, tokens = whole(pixels)
            return F.normalize(embedding, dim=-1), tokens
        return (F.normalize(whole(pixels), dim=-1),)

    return _with((open_clip.ImageEncoder if attends else open_clip.ConvEncoder)(tower, {}), says)  # type: ignore[arg-type]


def _text_tower(text: dict[str, object]) -> torch.nn.Module:
    from open_clip.transformer import TextTransformer

    return TextTransformer(**text, pool_type="eos", output_dim=16)  # type: ignore[arg-type]


def _coca() -> Model:
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(
        image_size=32,
        patch_size=8,
        width=32,
        layers=2,
        heads=4,
        mlp_ratio=2.0,
        output_dim=16,
        attentional_pool=True,
        attn_pooler_queries=6,
        attn_pooler_heads=4,
        output_tokens=True,
    )
    return _visual(_stirred(tower))


def coca_model() -> torch.nn.Module:
    """A small CoCa of open_clip."""
    from open_clip.coca_model import CoCa

    text = {
        "context_length": 16,
        "vocab_size": 60,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "embed_cls": True,
    }
    multimodal = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
    vision = {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "layers": 1,
        "head_width": 8,
        "output_tokens": True,
    }
    vision |= {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 6}
    coca = CoCa(32, multimodal, {**text, "output_tokens": True, "pad_id": 0}, vision)
    torch.nn.init.normal_(
        coca.text_decoder.text_projection, std=0.2
    )  # the library leaves it as memory was
    return _stirred(coca)


def _coca_decoder() -> Model:
    from mmcompress.models.families import open_clip

    raw = coca_model()
    whole = copy.deepcopy(raw)

    def says(ids: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        words = whole._encode_text(ids)[1]
        return whole.text_decoder(context, words)

    return _with(
        open_clip.build_caption_decoder(raw, TOKENIZER(), candidates=3, max_tokens=14), says
    )


VIT = {"width": 32, "layers": 2, "head_width": 8, "patch_size": 16}
TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
FAMILIES: dict[str, Callable[[], Model]] = {
    "open_clip ViT": lambda: _open_clip(VIT),
    "open_clip text tower": lambda: _open_clip(VIT, "text"),
    "open_clip CoCa image tower": _coca,
    "open_clip CoCa caption decoder": _coca_decoder,
    "open_clip ModifiedResNet": lambda: _open_clip(
        {"layers": [1, 1, 1, 1], "width": 32, "head_width": 64}
    ),
    "open_clip timm ResNet": lambda: _open_clip({**TIMM, "timm_model_name": "resnet18"}),
    "open_clip timm ResNet bottleneck": lambda: _open_clip({**TIMM, "timm_model_name": "resnet26"}),
    "open_clip timm EfficientNet": lambda: _open_clip(
        {**TIMM, "timm_model_name": "efficientnet_b0"}
    ),
    "transformers CLIP image": lambda: _image(
        "CLIPVisionConfig", "CLIPVisionModelWithProjection", "clip"
    ),
    "transformers SigLIP image": lambda: _image(
        "SiglipVisionConfig", "SiglipVisionModel", "siglip"
    ),
    "transformers ViT": lambda: _image("ViTConfig", "ViTModel", "vit"),
    "transformers DINOv2": lambda: _image("Dinov2Config", "Dinov2Model", "dinov2"),
    "transformers DINOv2 gated": lambda: _image(
        "Dinov2Config", "Dinov2Model", "dinov2", use_swiglu_ffn=True
    ),
    "transformers BLIP image": lambda: _image("BlipVisionConfig", "BlipVisionModel", "blip"),
    "transformers CLIP text": lambda: _text(
        "CLIPTextConfig", "CLIPTextModelWithProjection", "clip", False
    ),
    "transformers SigLIP text": lambda: _text(
        "SiglipTextConfig", "SiglipTextModel", "siglip", False
    ),
    "transformers BERT / MiniLM": lambda: _text("BertConfig", "BertModel", "bert", True),
    "transformers RoBERTa": lambda: _text("RobertaConfig", "RobertaModel", "roberta", True),
    "transformers Whisper encoder": _audio,
    "transformers mBART": _mbart,
    "transformers GPT-2, cross-attending": lambda: _causal("GPT2Config", "GPT2LMHeadModel", "gpt2"),
    "transformers BERT, cross-attending": lambda: _causal("BertConfig", "BertLMHeadModel", "bert"),
    "transformers BLIP captioner": _blip,
    "transformers VisionEncoderDecoder, GPT-2": lambda: _vision_encoder_decoder("GPT2Config"),
    "transformers VisionEncoderDecoder, BERT": lambda: _vision_encoder_decoder("BertConfig"),
    "transformers Whisper decoder": _whisper,
    "transformers GIT": _git,
    "transformers GIT image": lambda: _part_of("git", _git_whole()),
    "transformers LLaVA image": lambda: _part_of("llava", _llava_whole()),
    "transformers LLaVA, grouped-query, gated": _llava,
    "transformers LLaVA, with a prompt": lambda: _llava("a cat <image> left of"),
    "transformers T5": lambda: _t5(False),
    "transformers T5 gated": lambda: _t5(True),
}
