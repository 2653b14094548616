"""Small random models of every family, as their libraries make them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from mmcompress.models.base import Model

TOKENIZER = functools.cache(lambda: _tokenizer())


def _tokenizer() -> str:
    from mmcompress.models.embedded.train_clip_captioner import build_tokenizer

    return str(build_tokenizer().to_str())  # type: ignore[attr-defined]


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
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


def _image(config: str, tower: str, model_type: str, **extra: object) -> Model:
    import transformers

    from mmcompress.models import encoders

    c = getattr(transformers, config)(**VISION, **extra)
    c._attn_implementation = "eager"
    return encoders.ImageEncoder(_stirred(getattr(transformers, tower)(c)), encoders.IMAGE[model_type], {})


def _text(config: str, tower: str, model_type: str, masked: bool, **extra: object) -> Model:
    import transformers

    from mmcompress.models import encoders

    c = getattr(transformers, config)(**TEXT, **extra)
    c._attn_implementation = "eager"
    tower_ = _stirred(getattr(transformers, tower)(c))
    return encoders.TextEncoder(tower_, encoders.TEXT[model_type], TOKENIZER(), 16, masked)


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

    from mmcompress.models.encoders import AudioEncoder

    return AudioEncoder(_stirred(WhisperModel(_whisper_config()).encoder))


def _decoder(whole: torch.nn.Module, model_type: str, beams: int = 3) -> Model:
    from mmcompress.models.generators import assemble

    return assemble(_stirred(whole), model_type, TOKENIZER(), beams, 14)


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


def _vision_encoder_decoder() -> Model:
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    text = GPT2Config(**TEXT, is_decoder=True, add_cross_attention=True)
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
    from transformers import GitConfig, GitForCausalLM

    from mmcompress.models.prefix import assemble

    c = GitConfig(vision_config={**VISION, "hidden_size": 48}, **TEXT, **EAGER)
    return assemble(_stirred(GitForCausalLM(c)), "git", TOKENIZER(), 3, 14)


def _llava() -> Model:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from mmcompress.models.prefix import assemble

    c = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "hidden_size": 48}),
        text_config=LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=59,
    )
    c._attn_implementation = "eager"
    return assemble(_stirred(LlavaForConditionalGeneration(c)), "llava", TOKENIZER(), 3, 14)


def _open_clip(vision: dict[str, object], kind: str = "image") -> Model:
    from open_clip.model import CLIP

    from mmcompress.models import open_clip

    text = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2, "pad_id": 1, "eos_id": 2}
    clip = _stirred(CLIP(16, {"image_size": 64, **vision}, {**text, "pool_type": "eos"}))
    if kind == "text":
        return open_clip.TextEncoder(_stirred(_text_tower(text)), TOKENIZER())
    build = open_clip.ImageEncoder if hasattr(clip.visual, "transformer") else open_clip.ConvEncoder
    return build(clip.visual, {})  # type: ignore[arg-type]


def _text_tower(text: dict[str, object]) -> torch.nn.Module:
    from open_clip.transformer import TextTransformer

    return TextTransformer(**text, pool_type="eos", output_dim=16)  # type: ignore[arg-type]


def _coca() -> Model:
    from open_clip.transformer import VisionTransformer

    from mmcompress.models import open_clip

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
    return open_clip.ImageEncoder(_stirred(tower), {})


def coca_model() -> torch.nn.Module:
    """A small CoCa of open_clip."""
    from open_clip.coca_model import CoCa

    text = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2, "embed_cls": True}
    multimodal = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 8, "output_tokens": True}
    vision |= {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 6}
    coca = CoCa(32, multimodal, {**text, "output_tokens": True, "pad_id": 0}, vision)
    torch.nn.init.normal_(coca.text_decoder.text_projection, std=0.2)  # the library leaves it as memory was
    return _stirred(coca)


def _coca_decoder() -> Model:
    from mmcompress.models import open_clip

    return open_clip.caption_decoder(coca_model(), TOKENIZER(), 3, 14)


VIT = {"width": 32, "layers": 2, "head_width": 8, "patch_size": 16}
TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
FAMILIES: dict[str, Callable[[], Model]] = {
    "open_clip ViT": lambda: _open_clip(VIT),
    "open_clip text tower": lambda: _open_clip(VIT, "text"),
    "open_clip CoCa image tower": _coca,
    "open_clip CoCa caption decoder": _coca_decoder,
    "open_clip ModifiedResNet": lambda: _open_clip({"layers": [1, 1, 1, 1], "width": 32, "head_width": 64}),
    "open_clip timm ResNet": lambda: _open_clip({**TIMM, "timm_model_name": "resnet18"}),
    "open_clip timm ResNet bottleneck": lambda: _open_clip({**TIMM, "timm_model_name": "resnet26"}),
    "open_clip timm EfficientNet": lambda: _open_clip({**TIMM, "timm_model_name": "efficientnet_b0"}),
    "transformers CLIP image": lambda: _image("CLIPVisionConfig", "CLIPVisionModelWithProjection", "clip"),
    "transformers SigLIP image": lambda: _image("SiglipVisionConfig", "SiglipVisionModel", "siglip"),
    "transformers ViT": lambda: _image("ViTConfig", "ViTModel", "vit"),
    "transformers DINOv2": lambda: _image("Dinov2Config", "Dinov2Model", "dinov2"),
    "transformers DINOv2 gated": lambda: _image("Dinov2Config", "Dinov2Model", "dinov2", use_swiglu_ffn=True),
    "transformers BLIP image": lambda: _image("BlipVisionConfig", "BlipVisionModel", "blip"),
    "transformers CLIP text": lambda: _text("CLIPTextConfig", "CLIPTextModelWithProjection", "clip", False),
    "transformers SigLIP text": lambda: _text("SiglipTextConfig", "SiglipTextModel", "siglip", False),
    "transformers BERT / MiniLM": lambda: _text("BertConfig", "BertModel", "bert", True),
    "transformers RoBERTa": lambda: _text("RobertaConfig", "RobertaModel", "roberta", True),
    "transformers Whisper encoder": _audio,
    "transformers mBART": _mbart,
    "transformers GPT-2, cross-attending": lambda: _causal("GPT2Config", "GPT2LMHeadModel", "gpt2"),
    "transformers BERT, cross-attending": lambda: _causal("BertConfig", "BertLMHeadModel", "bert"),
    "transformers BLIP captioner": _blip,
    "transformers VisionEncoderDecoder, GPT-2": _vision_encoder_decoder,
    "transformers Whisper decoder": _whisper,
    "transformers GIT": _git,
    "transformers LLaVA, grouped-query, gated": _llava,
    "transformers T5": lambda: _t5(False),
    "transformers T5 gated": lambda: _t5(True),
}
