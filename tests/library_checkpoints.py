"""Checkpoints with tiny random weights, each as its library saves it: model, processor, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from families import TOKENIZER
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
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


def stir(model):
    """Random weights that do something, so that no two inputs are answered alike."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
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
    stir(BlipForConditionalGeneration(config)).save_pretrained(folder)
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
