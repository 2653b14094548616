"""Checkpoints with tiny random weights, each as its library saves it: model, processor, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from families import TOKENIZER
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BitImageProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextLMHeadModel,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MBartConfig,
    MBartForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTextModel,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def make_tokenizer(length: int = 24) -> PreTrainedTokenizerFast:
    """The demo's tokenizer as transformers holds it: <s> text </s>, padded with <pad>."""
    from tokenizers import Tokenizer

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    own = Tokenizer.from_str(TOKENIZER())
    known = {name: token for name, token in tokens.items() if own.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=length, **known)


def stir(model, spread: float = 0.1):
    """Random weights that do something, so that no two inputs are answered alike."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_clip(folder: Path) -> None:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    stir(CLIPModel(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=make_tokenizer()).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    torch.manual_seed(0)
    stir(SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))).save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(image_processor=images, tokenizer=make_tokenizer()).save_pretrained(folder)


def save_vit(folder: Path) -> None:
    torch.manual_seed(0)
    stir(ViTModel(ViTConfig(**VISION))).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def save_sentence_encoder(folder: Path, **pooling: bool) -> None:
    """A BERT as sentence-transformers saves it; `pooling` are the modes of `1_Pooling`."""
    torch.manual_seed(0)
    stir(BertModel(BertConfig(**TEXT))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, **pooling}
    config = {"word_embedding_dimension": 32, **modes}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))


def save_blip(folder: Path) -> None:
    torch.manual_seed(0)
    text = {**TEXT, "sep_token_id": 2, "encoder_hidden_size": 32, "is_decoder": True}
    config = BlipConfig(text_config=text, vision_config=VISION)
    model = stir(BlipForConditionalGeneration(config), spread=0.2)
    # so that some texts end by themselves
    model.text_decoder.cls.predictions.bias.data[2] += 0.8
    model.save_pretrained(folder)
    _save_blip_processor(folder)


def save_blip_matching(folder: Path) -> None:
    torch.manual_seed(0)
    text = {**TEXT, "sep_token_id": 2, "encoder_hidden_size": 32}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16)
    stir(BlipForImageTextRetrieval(config)).save_pretrained(folder)
    _save_blip_processor(folder)


def _save_blip_processor(folder: Path) -> None:
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(image_processor=images, tokenizer=make_tokenizer()).save_pretrained(folder)


def save_whisper(folder: Path) -> None:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=131,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=24,
        decoder_start_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = stir(WhisperForConditionalGeneration(config))
    model.generation_config.max_length = 16
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_tower(folder: Path, *, model: type, config: dict) -> None:
    """One tower alone, in the class that holds its answer."""
    torch.manual_seed(0)
    stir(model(model.config_class(**config))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)


def save_blip_decoder(folder: Path) -> None:
    text = {**TEXT, "sep_token_id": 2, "encoder_hidden_size": 32, "is_decoder": True}
    save_tower(folder, model=BlipTextLMHeadModel, config=text)


def save_dinov2(folder: Path, **options: object) -> None:
    """Made for other pictures than its processor gives, as DINOv2 is."""
    torch.manual_seed(0)
    config = Dinov2Config(**{**VISION, "image_size": 48}, **options)
    stir(Dinov2Model(config)).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 36}, crop_size=crop).save_pretrained(folder)


def save_roberta(folder: Path) -> None:
    torch.manual_seed(0)
    stir(RobertaModel(RobertaConfig(**TEXT))).save_pretrained(folder)
    make_tokenizer(22).save_pretrained(folder)


def save_git(folder: Path) -> None:
    torch.manual_seed(0)
    config = GitConfig(vision_config={**VISION, "hidden_size": 48}, **TEXT)
    stir(GitForCausalLM(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(image_processor=images, tokenizer=make_tokenizer()).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(64)
    # as Llama's: a text starts with <s>, and nothing is put behind it
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = {**TEXT, "vocab_size": 132, "max_position_embeddings": 64}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "hidden_size": 48}),
        text_config=LlamaConfig(**text, num_key_value_heads=2),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    stir(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def save_vision_encoder_decoder(folder: Path, *, text_config: type) -> None:
    torch.manual_seed(0)
    text = text_config(**TEXT, is_decoder=True, add_cross_attention=True)
    image = ViTConfig(**{**VISION, "hidden_size": 48})
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    config.decoder_start_token_id = 0
    config.pad_token_id = 1
    config.eos_token_id = 2
    model = stir(VisionEncoderDecoderModel(config), spread=0.3)
    model.generation_config.decoder_start_token_id = 0
    model.generation_config.pad_token_id = 1
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_mbart(folder: Path) -> None:
    torch.manual_seed(0)
    config = MBartConfig(
        vocab_size=131,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        encoder_layers=0,
        max_position_embeddings=24,
        is_decoder=True,
        is_encoder_decoder=False,
        forced_eos_token_id=None,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    stir(MBartForCausalLM(config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_cross_attending(folder: Path, *, config: type, model: type) -> None:
    """A decoder that reads the tokens of another checkpoint."""
    torch.manual_seed(0)
    made = config(**TEXT, is_decoder=True, add_cross_attention=True)
    stir(model(made)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_t5(folder: Path, **options: object) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=131,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=2,
        **options,
    )
    stir(T5ForConditionalGeneration(config)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


OPEN_CLIP_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "head_width": 8,
    "layers": 2,
}
OPEN_CLIP_TEXT = {"context_length": 16, "vocab_size": 131, "width": 32, "heads": 4, "layers": 2}
CLIP_VOCABULARY = 49408


def save_open_clip(folder: Path, *, own_vocabulary: bool = False, **config: object) -> None:
    """A model of open_clip, by its own functions: CLIP's vocabulary, or one that it saves beside."""
    import open_clip
    from open_clip.push_to_hf_hub import save_config_for_hf, save_for_hf
    from safetensors.torch import save_file

    text = {**OPEN_CLIP_TEXT, "vocab_size": CLIP_VOCABULARY}
    if own_vocabulary:
        text = {**OPEN_CLIP_TEXT, "hf_tokenizer_name": "own", "pool_type": "last"}
    model_config = {"embed_dim": 16, "vision_cfg": OPEN_CLIP_VISION, "text_cfg": text, **config}
    make_tokenizer().save_pretrained(folder)
    # the library builds the model of a folder by the configuration in it
    content = {"model_cfg": model_config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    name = f"local-dir:{folder}"
    model = open_clip.create_model(name, load_weights=False)
    if hasattr(model, "text_decoder"):
        # the library leaves this weight as memory was
        torch.nn.init.normal_(model.text_decoder.text_projection, std=0.2)
    stir(model)
    if own_vocabulary:
        tokenizer = open_clip.get_tokenizer(name)
        save_for_hf(model, tokenizer, model_config, str(folder), safe_serialization=True)
        return
    for file in folder.glob("*token*"):
        file.unlink()
    save_config_for_hf(model, folder / "open_clip_config.json", model_config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def save_open_clip_timm(folder: Path, *, name: str) -> None:
    vision = {
        "image_size": 64,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    save_open_clip(folder, vision_cfg=vision)


def save_open_clip_resnet(folder: Path) -> None:
    vision = {"image_size": 64, "width": 32, "layers": [1, 1, 1, 1], "head_width": 64}
    save_open_clip(folder, vision_cfg=vision)


def save_coca(folder: Path) -> None:
    text = {**OPEN_CLIP_TEXT, "vocab_size": CLIP_VOCABULARY, "context_length": 40}
    vision = {
        **OPEN_CLIP_VISION,
        "output_tokens": True,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "attn_pooler_queries": 6,
    }
    save_open_clip(
        folder,
        embed_dim=32,
        vision_cfg=vision,
        multimodal_cfg=text,
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        custom_text=True,
    )


@dataclass(frozen=True, kw_only=True)
class LibraryCase:
    """A checkpoint, and which claims of the README its fidelity proves."""

    save: Callable[[Path], None]
    """Writes the checkpoint of the encoder."""
    input_type: str
    """What the encoder reads: image, audio or text."""
    claims: tuple[tuple[str, str, str], ...]
    """(kind of node, library, family), as the README's table has them."""
    model_type: str = ""
    """What `config.json` of the encoder's checkpoint says; empty for open_clip."""
    writer_type: str = ""
    """The same of the generator's; empty where it is that of the encoder."""
    writer: str | None = None
    """Options of a generator that reads the encoder, as YAML; None for no generator."""
    save_writer: Callable[[Path], None] | None = None
    """Writes the checkpoint of the generator; None where it is that of the encoder."""
    is_matching: bool = False
    """Whether a fusion encoder of the encoder's checkpoint reads it and the written texts."""

    def list_rows(self) -> list[tuple[str, str]]:
        """The rows of the tables of families that it stands for, as (kind of node, model type)."""
        rows = [(f"{self.input_type}_encoder", self.model_type)]
        if self.writer is not None:
            rows.append(("text_decoder", self.writer_type or self.model_type))
        if self.is_matching:
            rows.append(("fusion_encoder", self.model_type))
        return rows


def _image(library: str, family: str) -> tuple[tuple[str, str, str], ...]:
    return (("image_encoder", library, family),)


def _text(library: str, family: str) -> tuple[tuple[str, str, str], ...]:
    return (("text_encoder", library, family),)


def _captions(library: str, *families: str) -> tuple[tuple[str, str, str], ...]:
    """The claims of a model that sees and writes."""
    image, writer = families
    return (*_image(library, image), ("text_decoder", library, writer))


GREEDY = "max_tokens: 9"
BEAMS = "max_tokens: 9, candidates: 3"

LIBRARY_CASES: dict[str, LibraryCase] = {
    "CLIP, picture": LibraryCase(
        model_type="clip", save=save_clip, input_type="image", claims=_image("transformers", "CLIP")
    ),
    "CLIP, text": LibraryCase(
        model_type="clip", save=save_clip, input_type="text", claims=_text("transformers", "CLIP")
    ),
    "SigLIP, picture": LibraryCase(
        model_type="siglip",
        save=save_siglip,
        input_type="image",
        claims=_image("transformers", "SigLIP"),
    ),
    "SigLIP, text": LibraryCase(
        model_type="siglip",
        save=save_siglip,
        input_type="text",
        claims=_text("transformers", "SigLIP"),
    ),
    "CLIP, image tower": LibraryCase(
        model_type="clip_vision_model",
        save=partial(save_tower, model=CLIPVisionModelWithProjection, config=VISION),
        input_type="image",
        claims=_image("transformers", "CLIP"),
    ),
    "CLIP, text tower": LibraryCase(
        model_type="clip_text_model",
        save=partial(save_tower, model=CLIPTextModelWithProjection, config=TEXT),
        input_type="text",
        claims=_text("transformers", "CLIP"),
    ),
    "SigLIP, image tower": LibraryCase(
        model_type="siglip_vision_model",
        save=partial(save_tower, model=SiglipVisionModel, config=VISION),
        input_type="image",
        claims=_image("transformers", "SigLIP"),
    ),
    "SigLIP, text tower": LibraryCase(
        model_type="siglip_text_model",
        save=partial(save_tower, model=SiglipTextModel, config=TEXT),
        input_type="text",
        claims=_text("transformers", "SigLIP"),
    ),
    "BLIP, image tower and decoder": LibraryCase(
        model_type="blip_vision_model",
        writer_type="blip_text_model",
        save=partial(save_tower, model=BlipVisionModel, config=VISION),
        input_type="image",
        claims=_captions("transformers", "BLIP", "BLIP"),
        writer=BEAMS,
        save_writer=save_blip_decoder,
    ),
    "ViT": LibraryCase(
        model_type="vit", save=save_vit, input_type="image", claims=_image("transformers", "ViT")
    ),
    "DINOv2": LibraryCase(
        model_type="dinov2",
        save=save_dinov2,
        input_type="image",
        claims=_image("transformers", "DINOv2"),
    ),
    "sentence encoder, mean": LibraryCase(
        model_type="bert",
        save=partial(save_sentence_encoder, pooling_mode_mean_tokens=True),
        input_type="text",
        claims=_text("transformers", "MiniLM"),
    ),
    "sentence encoder, first token": LibraryCase(
        model_type="bert",
        save=partial(save_sentence_encoder, pooling_mode_cls_token=True),
        input_type="text",
        claims=_text("transformers", "BERT"),
    ),
    "RoBERTa": LibraryCase(
        model_type="roberta",
        save=save_roberta,
        input_type="text",
        claims=_text("transformers", "RoBERTa"),
    ),
    "BLIP": LibraryCase(
        model_type="blip",
        save=save_blip,
        input_type="image",
        claims=_captions("transformers", "BLIP", "BLIP"),
        writer=GREEDY,
    ),
    "BLIP, beams and a prompt": LibraryCase(
        model_type="blip",
        save=save_blip,
        input_type="image",
        claims=(),
        writer=f"{BEAMS}, prompt: a red",
    ),
    "BLIP, matching": LibraryCase(
        model_type="blip",
        writer_type="mbart",
        save=save_blip_matching,
        input_type="image",
        claims=(("fusion_encoder", "transformers", "BLIP's image-text matching"),),
        writer=GREEDY,
        save_writer=save_mbart,
        is_matching=True,
    ),
    "GIT": LibraryCase(
        model_type="git",
        save=save_git,
        input_type="image",
        claims=_captions("transformers", "GIT", "GIT"),
        writer=BEAMS,
    ),
    "LLaVA": LibraryCase(
        model_type="llava",
        save=save_llava,
        input_type="image",
        claims=_captions("transformers", "LLaVA", "LLaVA"),
        writer=f'{BEAMS}, prompt: "a cat <image> left of"',
    ),
    "VisionEncoderDecoder, GPT-2": LibraryCase(
        model_type="vision-encoder-decoder",
        save=partial(save_vision_encoder_decoder, text_config=GPT2Config),
        input_type="image",
        claims=_captions("transformers", "VisionEncoderDecoder", "VisionEncoderDecoder"),
        writer=BEAMS,
    ),
    "VisionEncoderDecoder, BERT": LibraryCase(
        model_type="vision-encoder-decoder",
        save=partial(save_vision_encoder_decoder, text_config=BertConfig),
        input_type="image",
        claims=_captions("transformers", "VisionEncoderDecoder", "VisionEncoderDecoder"),
        writer=GREEDY,
    ),
    "Whisper": LibraryCase(
        model_type="whisper",
        save=save_whisper,
        input_type="audio",
        claims=(
            ("audio_encoder", "transformers", "Whisper"),
            ("text_decoder", "transformers", "Whisper"),
        ),
        writer=GREEDY,
    ),
    "mBART": LibraryCase(
        model_type="vit",
        writer_type="mbart",
        save=save_vit,
        input_type="image",
        claims=(("text_decoder", "transformers", "mBART"),),
        writer=BEAMS,
        save_writer=save_mbart,
    ),
    "GPT-2": LibraryCase(
        model_type="clip",
        writer_type="gpt2",
        save=save_clip,
        input_type="image",
        claims=(("text_decoder", "transformers", "GPT-2"),),
        writer=GREEDY,
        save_writer=partial(save_cross_attending, config=GPT2Config, model=GPT2LMHeadModel),
    ),
    "BERT": LibraryCase(
        model_type="vit",
        writer_type="bert",
        save=save_vit,
        input_type="image",
        claims=(("text_decoder", "transformers", "BERT"),),
        writer=GREEDY,
        save_writer=partial(save_cross_attending, config=BertConfig, model=BertLMHeadModel),
    ),
    "T5": LibraryCase(
        model_type="vit",
        writer_type="t5",
        save=save_vit,
        input_type="image",
        claims=(("text_decoder", "transformers", "T5"),),
        writer=BEAMS,
        save_writer=save_t5,
    ),
    "DINOv2, gated": LibraryCase(
        model_type="dinov2",
        save=partial(save_dinov2, use_swiglu_ffn=True),
        input_type="image",
        claims=_image("transformers", "DINOv2"),
    ),
    "T5, gated": LibraryCase(
        model_type="vit",
        writer_type="t5",
        save=save_vit,
        input_type="image",
        claims=(("text_decoder", "transformers", "T5"),),
        writer=GREEDY,
        save_writer=partial(save_t5, feed_forward_proj="gated-gelu"),
    ),
    "open_clip ViT": LibraryCase(
        save=save_open_clip, input_type="image", claims=_image("open_clip", "ViT")
    ),
    "open_clip text": LibraryCase(
        save=save_open_clip, input_type="text", claims=_text("open_clip", "text towers")
    ),
    "open_clip text, a vocabulary of its own": LibraryCase(
        save=partial(save_open_clip, own_vocabulary=True),
        input_type="text",
        claims=_text("open_clip", "text towers"),
    ),
    "open_clip ModifiedResNet": LibraryCase(
        save=save_open_clip_resnet,
        input_type="image",
        claims=_image("open_clip", "ModifiedResNet"),
    ),
    "open_clip timm ResNet": LibraryCase(
        save=partial(save_open_clip_timm, name="resnet18"),
        input_type="image",
        claims=_image("open_clip", "timm ResNet"),
    ),
    "open_clip timm ResNet, bottlenecks": LibraryCase(
        save=partial(save_open_clip_timm, name="resnet26"),
        input_type="image",
        claims=_image("open_clip", "timm ResNet"),
    ),
    "open_clip timm EfficientNet": LibraryCase(
        save=partial(save_open_clip_timm, name="efficientnet_b0"),
        input_type="image",
        claims=_image("open_clip", "timm EfficientNet"),
    ),
    "open_clip CoCa": LibraryCase(
        save=save_coca,
        input_type="image",
        claims=_captions("open_clip", "CoCa", "CoCa"),
        writer="max_tokens: 9, candidates: 1",
    ),
}
"""Every family of the README, on a checkpoint as its library saves it."""

CASES_BY_FAMILY = {
    "open_clip ViT": "open_clip ViT",
    "open_clip text tower": "open_clip text",
    "open_clip CoCa image tower": "open_clip CoCa",
    "open_clip CoCa caption decoder": "open_clip CoCa",
    "open_clip ModifiedResNet": "open_clip ModifiedResNet",
    "open_clip timm ResNet": "open_clip timm ResNet",
    "open_clip timm ResNet bottleneck": "open_clip timm ResNet, bottlenecks",
    "open_clip timm EfficientNet": "open_clip timm EfficientNet",
    "transformers CLIP image": "CLIP, picture",
    "transformers SigLIP image": "SigLIP, picture",
    "transformers ViT": "ViT",
    "transformers DINOv2": "DINOv2",
    "transformers DINOv2 gated": "DINOv2, gated",
    "transformers BLIP image": "BLIP, image tower and decoder",
    "transformers CLIP text": "CLIP, text",
    "transformers SigLIP text": "SigLIP, text",
    "transformers BERT / MiniLM": "sentence encoder, mean",
    "transformers RoBERTa": "RoBERTa",
    "transformers Whisper encoder": "Whisper",
    "transformers mBART": "mBART",
    "transformers GPT-2, cross-attending": "GPT-2",
    "transformers BERT, cross-attending": "BERT",
    "transformers BLIP captioner": "BLIP",
    "transformers BLIP image-text matching": "BLIP, matching",
    "transformers VisionEncoderDecoder, GPT-2": "VisionEncoderDecoder, GPT-2",
    "transformers VisionEncoderDecoder, BERT": "VisionEncoderDecoder, BERT",
    "transformers Whisper decoder": "Whisper",
    "transformers GIT": "GIT",
    "transformers GIT image": "GIT",
    "transformers LLaVA image": "LLaVA",
    "transformers LLaVA, grouped-query, gated": "LLaVA",
    "transformers LLaVA, with a prompt": "LLaVA",
    "transformers T5": "T5",
    "transformers T5 gated": "T5, gated",
}
"""The case that proves the fidelity of each family of `families.py`, but for the test's own one."""
