"""Sources a spec can name: every family from a folder as its library writes it, and clear errors for what can't be."""

from __future__ import annotations

import pytest
from families import TEXT, TOKENIZER, VISION, _stirred, _whisper_config

from mmcompress.errors import ModelError
from mmcompress.models.sources import load_model
from mmcompress.spec.schema import Node


def _write(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        (folder / "tokenizer.json").write_text(TOKENIZER())
    return str(folder)


def _clip():
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def _siglip():
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))


def _blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {**TEXT, "sep_token_id": 2, "encoder_hidden_size": 32}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION))


def _bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT))


def _vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**VISION))


def _whisper():
    from transformers import WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(_whisper_config())


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    c = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1)
    return T5ForConditionalGeneration(c)


def _ved():
    from transformers import BertConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    c = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), BertConfig(**TEXT))
    c.decoder_start_token_id = 0
    return VisionEncoderDecoderModel(c)


def _git():
    from transformers import GitConfig, GitForCausalLM

    return GitForCausalLM(GitConfig(vision_config=VISION, **TEXT))


def _llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    image = CLIPVisionConfig(**VISION)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=image, text_config=text, image_token_index=59))


CASES = [
    (_clip, "image_encoder"),
    (_clip, "text_encoder"),
    (_siglip, "image_encoder"),
    (_siglip, "text_encoder"),
    (_vit, "image_encoder"),
    (_bert, "text_encoder"),
    (_blip, "image_encoder"),
    (_blip, "text_decoder"),
    (_whisper, "audio_encoder"),
    (_whisper, "text_decoder"),
    (_t5, "text_decoder"),
    (_ved, "text_decoder"),
    (_git, "image_encoder"),
    (_git, "text_decoder"),
    (_llava, "image_encoder"),
    (_llava, "text_decoder"),
]


@pytest.mark.parametrize(("make", "kind"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_family_loads_from_the_folder_its_library_writes(make, kind, tmp_path):
    whole = _stirred(make())
    model = load_model(Node(kind, {}, f"transformers:{_write(tmp_path, whole)}", max_tokens=12))
    assert model.kind == kind and model.blocks
    values = {round(float(p.double().sum()), 6) for p in whole.parameters()}
    mine = [round(float(p.double().sum()), 6) for p in model.parameters()]
    assert sum(v in values for v in mine) > 0.7 * len(mine), "its weights are not those of the checkpoint"


def test_a_users_own_module_goes_through_the_whole_run(tiny, tmp_path):
    from mmcompress import workflow

    text = (tiny / "spec.yaml").read_text().replace("source: ./clip", "source: python:own_tower:build", 1)
    text = text.replace("./", f"{tiny}/")
    (tmp_path / "own.yaml").write_text(text)
    summary = workflow.run(tmp_path / "own.yaml", tmp_path / "run")
    kept = summary.kept["vision"]
    assert set(kept) == {"0.attention", "0.cross_attention"}
    assert all(p.passed for p in summary.proofs) and summary.compressed.nodes["vision"].params > 0


@pytest.mark.slow
def test_a_convolutional_tower_goes_through_the_whole_run(tiny, tmp_path):
    from mmcompress import workflow

    source = "python:own_tower:build_convolutional"
    node = f"  look:\n    kind: image_encoder\n    source: {source}\n    inputs: {{image: image}}\n"
    text = (tiny / "spec.yaml").read_text().replace("  choose:", node + "  choose:").replace("./", f"{tiny}/")
    (tmp_path / "conv.yaml").write_text(text.replace("query: vision.embedding", "query: look.embedding"))
    summary = workflow.run(tmp_path / "conv.yaml", tmp_path / "run")
    assert len(summary.kept["look"]) == 10 and all(k >= 8 for k in summary.kept["look"].values())
    assert all(p.passed for p in summary.proofs)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("python:own_tower", "expected python:package.module:build"),
        ("python:no_such_module:build", "no_such_module"),
        ("python:own_tower:nothing", "nothing"),
        ("python:torch:zeros", "gave|must be"),
        ("transformers:nobody/no-such-model", "hub can't be reached"),
        ("nowhere/at/all", "no such folder"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(source, message):
    with pytest.raises((ModelError, TypeError), match=message):
        load_model(Node("image_encoder", {}, source))


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    from transformers import ConvNextConfig, ConvNextModel

    folder = _write(tmp_path, ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8])))
    with pytest.raises(ModelError, match=r"'convnext' is not supported \(known: .*dinov2"):
        load_model(Node("image_encoder", {}, f"transformers:{folder}"))


def test_weights_of_another_shape_are_named(tmp_path):
    import json

    folder = _write(tmp_path, _vit())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"missing or of another shape: .*mlp"):
        load_model(Node("image_encoder", {}, f"transformers:{folder}"))


def test_a_missing_tokenizer_and_a_pickle_are_refused(tmp_path):
    folder = _write(tmp_path, _bert(), tokenizer=False)
    with pytest.raises(ModelError, match=r"tokenizer.json is missing"):
        load_model(Node("text_encoder", {}, f"transformers:{folder}"))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04not a model")
    with pytest.raises(ModelError, match=r"no .safetensors file \(only pytorch_model.bin"):
        load_model(Node("text_encoder", {}, f"transformers:{folder}"))
