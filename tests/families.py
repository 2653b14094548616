"""Small random models of every family, as their libraries make them.

`library_says` of each returns what the library's own untouched copy puts out for the inputs of the
contract.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcompress.export.family_contract import prove_contract, prove_library_match
from mmcompress.models.base import Model
from mmcompress.models.families.transformers_encoders import EncoderFamily
from mmcompress.models.sources import load_model
from mmcompress.results.records import Proof
from mmcompress.spec.schema import Node

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
}
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
TEXT = {**SMALL, **SPECIAL, "vocab_size": 131, "max_position_embeddings": 24}
EAGER = {"attn_implementation": "eager"}


@functools.cache
def TOKENIZER() -> str:
    """The tokenizer of the demo as JSON."""
    from train_demo_models import build_tokenizer

    return str(build_tokenizer().to_str())


def _stirred(module: nn.Module) -> nn.Module:
    """Random weights that do something: biases, norms and embeddings away from where they start."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def _with(model: Model, says: Callable[..., object]) -> Model:
    """The model, with what its library says."""

    library = [says, *(cell.cell_contents for cell in getattr(says, "__closure__", None) or ())]
    modules = [part for part in library if isinstance(part, nn.Module)]

    def library_says(*inputs: Tensor) -> tuple[Tensor, ...]:
        for module in modules:
            module.double()
        outputs = says(*inputs)
        for module in modules:
            module.float()
        return outputs if isinstance(outputs, tuple) else (outputs,)

    model.library_says = library_says  # type: ignore[assignment]
    return model


class FixedEncoder(nn.Module):
    """Stands in for a library's encoder and puts out a context that is set from outside."""

    main_input_name = "pixel_values"
    context: Tensor

    def forward(self, *_: object, **__: object) -> object:
        class_token = self.context.new_zeros(len(self.context), 1, self.context.shape[2])
        layers = (None, torch.cat([class_token, self.context], 1), None)
        return SimpleNamespace(
            last_hidden_state=self.context, hidden_states=layers, attentions=None
        )


def _image(*, config: str, tower: str, model_type: str, **extra: object) -> Model:
    import transformers

    from mmcompress.models.families.transformers_encoders import IMAGE_FAMILIES

    library_config = getattr(transformers, config)(**VISION, **extra)
    library_config._attn_implementation = "eager"
    raw = _stirred(getattr(transformers, tower)(library_config))
    return _tower(raw, IMAGE_FAMILIES[model_type])


def _tower(raw: nn.Module, family: EncoderFamily) -> Model:
    from mmcompress.models.families.transformers_encoders import ImageEncoder

    library = copy.deepcopy(raw)

    def says(pixels: Tensor) -> tuple[Tensor, ...]:
        outputs = library(pixel_values=pixels)
        embedding = F.normalize(family.compute_embedding(outputs, pixels), dim=-1)
        return embedding, family.select_tokens(outputs)

    return _with(ImageEncoder(raw, family, preprocess={}), says)


def _part_of(*, model_type: str, make_whole: Callable[[], nn.Module]) -> Model:
    """The image tower in a model that is loaded whole."""
    from mmcompress.models.families.transformers_encoders import IMAGE_FAMILIES

    family = IMAGE_FAMILIES[model_type]
    return _tower(family.find_tower(_stirred(make_whole())), family)


def _text(*, config: str, tower: str, model_type: str, masked: bool, **extra: object) -> Model:
    import transformers

    from mmcompress.models.families.transformers_encoders import TEXT_FAMILIES, TextEncoder
    from mmcompress.models.tokenizer_files import LoadedTokenizer

    library_config = getattr(transformers, config)(**TEXT, **extra)
    library_config._attn_implementation = "eager"
    raw = _stirred(getattr(transformers, tower)(library_config))
    library = copy.deepcopy(raw)
    family = TEXT_FAMILIES[model_type]

    def says(ids: Tensor) -> Tensor:
        mask = ids != 1
        options = {"attention_mask": mask.long()} if masked else {}
        outputs = library(input_ids=ids, **options)
        return F.normalize(family.compute_embedding(outputs, mask), dim=-1)

    tokenizer = LoadedTokenizer(json=TOKENIZER(), pad=1)
    model = TextEncoder(raw, family, tokenizer=tokenizer, context=16, masked=masked)
    return _with(model, says)


def _whisper_config():  # type: ignore[no-untyped-def]
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=131,
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
    library = copy.deepcopy(raw)

    def says(features: Tensor) -> tuple[Tensor, ...]:
        tokens = library(features).last_hidden_state
        return F.normalize(tokens.mean(1), dim=-1), tokens

    return _with(AudioEncoder(raw), says)


def _decoder(library_model: nn.Module, model_type: str, *, beams: int = 3) -> Model:
    from mmcompress.models.families.cross_attention_decoder import assemble_decoder

    raw = copy.deepcopy(_stirred(library_model))

    def says(ids: Tensor, context: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        if raw.config.is_encoder_decoder:
            return raw(encoder_outputs=BaseModelOutput(context), decoder_input_ids=ids).logits
        return raw(input_ids=ids, encoder_hidden_states=context).logits

    model = assemble_decoder(
        library_model,
        model_type,
        tokenizer_json=TOKENIZER(),
        candidates=beams,
        max_tokens=14,
    )
    return _with(model, says)


def _mbart() -> Model:
    from transformers import MBartConfig, MBartForCausalLM

    config = MBartConfig(
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
    return _decoder(MBartForCausalLM(config), "mbart")


def _causal(*, config: str, lm: str, model_type: str) -> Model:
    import transformers

    make_config = getattr(transformers, config)
    library_config = make_config(**TEXT, is_decoder=True, add_cross_attention=True, **EAGER)
    return _decoder(getattr(transformers, lm)(library_config), model_type)


def _blip() -> Model:
    from transformers import BlipTextConfig, BlipTextLMHeadModel

    config = BlipTextConfig(
        **TEXT, encoder_hidden_size=48, sep_token_id=2, is_decoder=True, **EAGER
    )
    return _decoder(BlipTextLMHeadModel(config), "blip_text_model")


def _blip_matching() -> Model:
    from mmcompress.models.families.fusion_encoders import FUSION_FAMILIES, FusionEncoder
    from mmcompress.models.tokenizer_files import LoadedTokenizer

    library_model = blip_matching_model()
    raw = copy.deepcopy(library_model)

    def says(ids: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        raw.vision_model = FixedEncoder()
        raw.vision_model.context = context
        pixels = torch.zeros(len(ids), 3, 32, 32)
        outputs = raw(input_ids=ids, pixel_values=pixels, attention_mask=(ids != 1).long())
        tokens = outputs.question_embeds
        log_probabilities = outputs.itm_score.log_softmax(-1)
        log_odds = log_probabilities[:, 1] - log_probabilities[:, 0]
        return F.normalize(tokens[:, 0], dim=-1), tokens, log_odds

    tokenizer = LoadedTokenizer(json=TOKENIZER(), pad=1)
    model = FusionEncoder(
        library_model, FUSION_FAMILIES["blip"], tokenizer=tokenizer, context_length=16
    )
    return _with(model, says)


def blip_matching_model(vocabulary: int = 60) -> nn.Module:
    """A small BLIP of transformers that tells how well a text matches a picture."""
    from transformers import BlipConfig, BlipForImageTextRetrieval

    text = {**TEXT, "vocab_size": vocabulary, "sep_token_id": 2, "encoder_hidden_size": 32}
    config = BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16)
    config._attn_implementation = "eager"
    return _stirred(BlipForImageTextRetrieval(config))


def _own_fusion_encoder() -> Model:
    from own_fusion import OwnFusionEncoder

    model = _stirred(OwnFusionEncoder(TOKENIZER(), vocabulary=60))
    return _with(model, copy.deepcopy(model))


def _vision_encoder_decoder(*, decoder_config: str) -> Model:
    import transformers
    from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    make_text_config = getattr(transformers, decoder_config)
    text = make_text_config(**TEXT, is_decoder=True, add_cross_attention=True)
    image = ViTConfig(**{**VISION, "hidden_size": 48})
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    config.decoder_start_token_id = 0
    return _decoder(VisionEncoderDecoderModel(config), "vision-encoder-decoder")


def _whisper() -> Model:
    from transformers import WhisperForConditionalGeneration

    library_model = WhisperForConditionalGeneration(_whisper_config())
    library_model.generation_config.no_timestamps_token_id = 5
    library_model.generation_config.suppress_tokens = [7, 8, 9, 20, 21, 22, 30]
    library_model.generation_config.begin_suppress_tokens = [2, 11, 12]
    return _decoder(library_model, "whisper", beams=1)


def _t5(*, gated: bool) -> Model:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
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
    return _decoder(T5ForConditionalGeneration(config), "t5")


def _git() -> Model:
    from mmcompress.models.families.prefix_decoder import assemble_prefix_decoder

    library_model = _stirred(_git_whole())
    raw = copy.deepcopy(library_model)
    raw.git.image_encoder = FixedEncoder()

    def says(ids: Tensor, context: Tensor) -> Tensor:
        raw.git.image_encoder.context = context
        pixels = torch.zeros(len(ids), 3, 32, 32)
        return raw(pixel_values=pixels, input_ids=ids).logits[:, -ids.shape[1] :]

    model = assemble_prefix_decoder(
        library_model, "git", tokenizer_json=TOKENIZER(), candidates=3, max_tokens=14
    )
    return _with(model, says)


def _git_whole() -> nn.Module:
    from transformers import GitConfig, GitForCausalLM

    return GitForCausalLM(GitConfig(vision_config={**VISION, "hidden_size": 48}, **TEXT, **EAGER))


def _llava(*, prompt: str = "") -> Model:
    from mmcompress.models.families.prefix_decoder import assemble_prefix_decoder

    library_model = _stirred(_llava_whole(260 if prompt else 60))
    raw = copy.deepcopy(library_model)
    raw.model.vision_tower = FixedEncoder()
    model = assemble_prefix_decoder(
        library_model,
        "llava",
        tokenizer_json=TOKENIZER(),
        candidates=3,
        max_tokens=14,
        prompt=prompt,
    )

    def says(ids: Tensor, context: Tensor) -> Tensor:
        raw.model.vision_tower.context = context
        words = model.ids_before_image.expand(len(ids), -1)
        image = torch.full((len(ids), context.shape[1]), raw.config.image_token_id)
        pixels = torch.zeros(len(ids), 3, 32, 32)
        outputs = raw(pixel_values=pixels, input_ids=torch.cat([words, image, ids], 1))
        return outputs.logits[:, -ids.shape[1] :]

    return _with(model, says)


def _llava_whole(vocabulary: int = 60) -> nn.Module:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**VISION, "hidden_size": 48}),
        text_config=LlamaConfig(**{**TEXT, "vocab_size": vocabulary}, num_key_value_heads=2),
        image_token_index=1,  # which no input of the contract holds
    )
    config._attn_implementation = "eager"
    return LlavaForConditionalGeneration(config)


OPEN_CLIP_TEXT = {
    "context_length": 16,
    "vocab_size": 60,
    "width": 32,
    "heads": 4,
    "layers": 2,
    "pad_id": 1,
    "eos_id": 2,
}


def _open_clip_image(**vision: object) -> Model:
    from open_clip.model import CLIP

    text = {**OPEN_CLIP_TEXT, "pool_type": "eos"}
    clip = _stirred(CLIP(16, {"image_size": 64, **vision}, text))
    return _visual(clip.visual)


def _open_clip_text() -> Model:
    from open_clip.transformer import TextTransformer

    from mmcompress.models.families.open_clip import TextEncoder
    from mmcompress.models.tokenizer_files import LoadedTokenizer

    tower = _stirred(TextTransformer(**OPEN_CLIP_TEXT, pool_type="eos", output_dim=16))
    library = copy.deepcopy(tower)

    def says(ids: Tensor) -> Tensor:
        return F.normalize(library(ids), dim=-1)

    return _with(TextEncoder(tower, LoadedTokenizer(json=TOKENIZER())), says)


def _visual(tower: nn.Module) -> Model:
    from mmcompress.models.families.open_clip import ConvEncoder, ImageEncoder

    library = copy.deepcopy(tower)
    is_transformer = hasattr(tower, "transformer")

    def says(pixels: Tensor) -> tuple[Tensor, ...]:
        if is_transformer:
            library.output_tokens = True
            embedding, tokens = library(pixels)
            return F.normalize(embedding, dim=-1), tokens
        return (F.normalize(library(pixels), dim=-1),)

    encoder_class = ImageEncoder if is_transformer else ConvEncoder
    return _with(encoder_class(tower, {}), says)


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


def coca_model() -> nn.Module:
    """A small CoCa of open_clip."""
    from open_clip.coca_model import CoCa

    text = {
        "context_length": 16,
        "vocab_size": 60,
        "width": 32,
        "heads": 4,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
        "pad_id": 0,
    }
    multimodal = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2}
    vision = {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "layers": 1,
        "head_width": 8,
        "output_tokens": True,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "attn_pooler_queries": 6,
    }
    coca = CoCa(32, multimodal, text, vision)
    # The library leaves this weight as memory was.
    torch.nn.init.normal_(coca.text_decoder.text_projection, std=0.2)
    return _stirred(coca)


def _coca_decoder() -> Model:
    from mmcompress.models.families.open_clip import build_caption_decoder

    raw = coca_model()
    library = copy.deepcopy(raw)

    def says(ids: Tensor, context: Tensor) -> Tensor:
        words = library._encode_text(ids)[1]
        return library.text_decoder(context, words)

    model = build_caption_decoder(raw, TOKENIZER(), candidates=3, max_tokens=14)
    return _with(model, says)


TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear"}
FAMILIES: dict[str, Callable[[], Model]] = {
    "open_clip ViT": partial(
        _open_clip_image,
        width=32,
        layers=2,
        head_width=8,
        patch_size=16,
    ),
    "open_clip text tower": _open_clip_text,
    "open_clip CoCa image tower": _coca,
    "open_clip CoCa caption decoder": _coca_decoder,
    "open_clip ModifiedResNet": partial(
        _open_clip_image,
        width=32,
        layers=[1, 1, 1, 1],
        head_width=64,
    ),
    "open_clip timm ResNet": partial(
        _open_clip_image,
        timm_model_name="resnet18",
        **TIMM,
    ),
    "open_clip timm ResNet bottleneck": partial(
        _open_clip_image,
        timm_model_name="resnet26",
        **TIMM,
    ),
    "open_clip timm EfficientNet": partial(
        _open_clip_image,
        timm_model_name="efficientnet_b0",
        **TIMM,
    ),
    "transformers CLIP image": partial(
        _image,
        config="CLIPVisionConfig",
        tower="CLIPVisionModelWithProjection",
        model_type="clip",
    ),
    "transformers SigLIP image": partial(
        _image,
        config="SiglipVisionConfig",
        tower="SiglipVisionModel",
        model_type="siglip",
    ),
    "transformers ViT": partial(
        _image,
        config="ViTConfig",
        tower="ViTModel",
        model_type="vit",
    ),
    "transformers DINOv2": partial(
        _image,
        config="Dinov2Config",
        tower="Dinov2Model",
        model_type="dinov2",
    ),
    "transformers DINOv2 gated": partial(
        _image,
        config="Dinov2Config",
        tower="Dinov2Model",
        model_type="dinov2",
        use_swiglu_ffn=True,
    ),
    "transformers BLIP image": partial(
        _image,
        config="BlipVisionConfig",
        tower="BlipVisionModel",
        model_type="blip",
    ),
    "transformers CLIP text": partial(
        _text,
        config="CLIPTextConfig",
        tower="CLIPTextModelWithProjection",
        model_type="clip",
        masked=False,
    ),
    "transformers SigLIP text": partial(
        _text,
        config="SiglipTextConfig",
        tower="SiglipTextModel",
        model_type="siglip",
        masked=False,
    ),
    "transformers BERT / MiniLM": partial(
        _text,
        config="BertConfig",
        tower="BertModel",
        model_type="bert",
        masked=True,
    ),
    "transformers RoBERTa": partial(
        _text,
        config="RobertaConfig",
        tower="RobertaModel",
        model_type="roberta",
        masked=True,
    ),
    "transformers Whisper encoder": _audio,
    "transformers mBART": _mbart,
    "transformers GPT-2, cross-attending": partial(
        _causal,
        config="GPT2Config",
        lm="GPT2LMHeadModel",
        model_type="gpt2",
    ),
    "transformers BERT, cross-attending": partial(
        _causal,
        config="BertConfig",
        lm="BertLMHeadModel",
        model_type="bert",
    ),
    "transformers BLIP captioner": _blip,
    "transformers BLIP image-text matching": _blip_matching,
    "own fusion encoder": _own_fusion_encoder,
    "transformers VisionEncoderDecoder, GPT-2": partial(
        _vision_encoder_decoder,
        decoder_config="GPT2Config",
    ),
    "transformers VisionEncoderDecoder, BERT": partial(
        _vision_encoder_decoder,
        decoder_config="BertConfig",
    ),
    "transformers Whisper decoder": _whisper,
    "transformers GIT": _git,
    "transformers GIT image": partial(
        _part_of,
        model_type="git",
        make_whole=_git_whole,
    ),
    "transformers LLaVA image": partial(
        _part_of,
        model_type="llava",
        make_whole=_llava_whole,
    ),
    "transformers LLaVA, grouped-query, gated": _llava,
    "transformers LLaVA, with a prompt": partial(
        _llava,
        prompt="a cat <image> left of",
    ),
    "transformers T5": partial(_t5, gated=False),
    "transformers T5 gated": partial(_t5, gated=True),
}
"""How to make each model, by the name in `reports/families.md`; to add one, copy a row."""


def prove_marian(folder: Path) -> list[Proof]:
    """Prove the contract for Marian's decoder, a family that only worked examples add.

    Args:
        folder: An empty folder for the checkpoint and the exports.
    """
    from transformers import MarianConfig, MarianForCausalLM

    config = MarianConfig(
        vocab_size=131,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=0,
        attn_implementation="eager",
        forced_eos_token_id=None,
        max_position_embeddings=24,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    torch.manual_seed(0)
    library_model = _stirred(MarianForCausalLM(config))
    checkpoint = folder / "marian"
    library_model.save_pretrained(checkpoint)
    (checkpoint / "tokenizer.json").write_text(TOKENIZER())
    node = Node(
        kind="text_decoder",
        inputs={},
        source=f"transformers:{checkpoint}",
        options={"candidates": 2, "max_tokens": 12},
    )
    model = load_model(node)

    def run_library(ids: Tensor, context: Tensor) -> tuple[Tensor]:
        exact = copy.deepcopy(library_model).double()
        return (exact(input_ids=ids, encoder_hidden_states=context).logits,)

    proofs = prove_library_match("node", model, run_library=run_library)
    return [*proofs, *prove_contract(model, folder / "proofs")]
