"""Sources a spec can name: every family from a folder as its library writes it, and clear errors for what can't be."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from urllib.error import URLError

import pytest
from families import TEXT, TOKENIZER, VISION, _stirred, _whisper_config

from mmcompress.errors import ModelError
from mmcompress.models.sources import load_model
from mmcompress.spec.schema import Node


def _write(folder, model, tokenizer=True):
    from transformers import CLIPImageProcessor

    model.save_pretrained(folder)
    if hasattr(model.config, "vision_config") or model.main_input_name == "pixel_values":
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        processor.save_pretrained(folder)
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

    c = T5Config(
        vocab_size=131,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=1,
    )
    return T5ForConditionalGeneration(c)


def _ved():
    from transformers import (
        BertConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )

    c = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**VISION), BertConfig(**TEXT)
    )
    c.decoder_start_token_id = 0
    return VisionEncoderDecoderModel(c)


def _git():
    from transformers import GitConfig, GitForCausalLM

    return GitForCausalLM(GitConfig(vision_config=VISION, **TEXT))


def _llava():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    image = CLIPVisionConfig(**VISION)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=image, text_config=text, image_token_index=59)
    )


def _vit_classifier():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**VISION))


def _roberta_masked():
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**TEXT))


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
    (_ved, "image_encoder"),
    (_vit_classifier, "image_encoder"),
    (_roberta_masked, "text_encoder"),
    (_git, "image_encoder"),
    (_git, "text_decoder"),
    (_llava, "image_encoder"),
    (_llava, "text_decoder"),
]


@pytest.mark.parametrize(("make", "kind"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_family_loads_from_the_folder_its_library_writes(make, kind, tmp_path):
    whole = _stirred(make())
    model = load_model(
        Node(
            kind=kind,
            inputs={},
            source=f"transformers:{_write(tmp_path, whole)}",
            options={"max_tokens": 12},
        )
    )
    assert model.kind == kind and model.blocks
    values = {round(p.double().sum().item(), 6) for p in whole.parameters()}
    mine = [round(p.double().sum().item(), 6) for p in model.parameters()]
    assert sum(v in values for v in mine) > 0.7 * len(mine), (
        "its weights are not those of the checkpoint"
    )


def test_a_text_as_long_as_the_tower_takes_has_a_place_for_every_token(tmp_path):
    """RoBERTa counts positions from the padding token on: two of its table are never taken."""
    import torch

    model = load_model(
        Node(
            kind="text_encoder",
            inputs={},
            source=f"transformers:{_write(tmp_path, _roberta_masked())}",
        )
    )
    assert model.config["context_length"] == TEXT["max_position_embeddings"] - 2
    ids = torch.full((1, model.config["context_length"]), 7)
    assert model(ids).isfinite().all()


def test_the_tokenizer_made_for_open_clip_is_open_clips():
    from open_clip import get_tokenizer
    from tokenizers import Tokenizer

    from mmcompress.models.families.open_clip import clip_tokenizer_json

    mine, theirs = Tokenizer.from_str(clip_tokenizer_json()), get_tokenizer("ViT-B-32")
    for text in (
        "a fox left of a robot",
        "It's 42 caf\u00e9s, isn't it?",
        "  MANY   spaces\n",
        "\u4f60\u597d \U0001f98a!",
    ):
        want = theirs([text])[0].tolist()
        assert mine.encode(text).ids == want[: want.index(49407) + 1], text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32", r"names no weights: add @TAG \(known: .*openai"),
        ("ViT-B-32@openai", "hub can't be reached"),
        ("ViT-B-32@{tmp}/weights.pt", "is a pickle, a format that can run code"),
        ("ViT-B32@openai", "no model of this name; did you mean ViT-B-32 or"),
        ("no such thing@random", "no model of this name$"),
    ],
)
def test_an_open_clip_source_that_cannot_be_used_is_told(tmp_path, monkeypatch, name, message):
    import torch

    from mmcompress.models.families import open_clip

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.save({"w": torch.zeros(1)}, tmp_path / "weights.pt")
    open_clip._load_clip.cache_clear()
    load = torch.load
    with pytest.raises(ModelError, match=message):
        load_model(
            Node(kind="image_encoder", inputs={}, source="open_clip:" + name.format(tmp=tmp_path))
        )
    assert torch.load is load


def test_packed_attention_that_is_no_plain_self_attention_is_refused():
    import torch

    from mmcompress.models.layouts import normalize_

    whole = torch.nn.MultiheadAttention(32, 4, batch_first=True, bias=False).eval()
    x, mask = torch.randn(2, 5, 32), torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    want = whole(x, x, x, attn_mask=mask)[0]
    box = torch.nn.Sequential(whole)
    normalize_(box)
    assert torch.allclose(box[0](x, x, x, attn_mask=mask)[0], want, atol=1e-6)
    with pytest.raises(ValueError, match="not plain self-attention"):
        box[0](x, torch.randn(2, 3, 32), torch.randn(2, 3, 32))
    with pytest.raises(ValueError, match="not plain self-attention"):
        box[0](x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="another width"):
        normalize_(
            torch.nn.Sequential(
                torch.nn.MultiheadAttention(32, 4, kdim=16, vdim=16, batch_first=True)
            )
        )


def test_a_prompt_goes_ahead_of_what_is_written(tmp_path):
    from families import TOKENIZER as words
    from tokenizers import Tokenizer

    tok, source = (
        Tokenizer.from_str(words()),
        f"transformers:{_write(tmp_path / 'a', _stirred(_blip()))}",
    )
    node = Node(
        kind="text_decoder", inputs={}, source=source, options={"max_tokens": 12, "prompt": "a cat"}
    )
    g = load_model(node).config["generation"]
    assert g["prompt"] == [g["bos"], *tok.encode("a cat", add_special_tokens=False).ids]
    llava = f"transformers:{_write(tmp_path / 'b', _stirred(_llava()))}"
    model = load_model(
        Node(
            kind="text_decoder",
            inputs={},
            source=llava,
            options={"max_tokens": 12, "prompt": "a cat <image> left of"},
        )
    )
    ids = lambda text: tok.encode(text, add_special_tokens=False).ids
    assert model.ids_before_image.tolist() == [0, *ids("a cat ")] and model.config["generation"][
        "prompt"
    ] == ids(" left of")
    with pytest.raises(ModelError, match="leave nothing of max_tokens 4"):
        load_model(
            Node(
                kind="text_decoder",
                inputs={},
                source=source,
                options={"max_tokens": 4, "prompt": "a cat left of a cat"},
            )
        )
    git = f"transformers:{_write(tmp_path / 'c', _stirred(_git()))}"
    with pytest.raises(ModelError, match="reads the image before all words"):
        load_model(
            Node(
                kind="text_decoder",
                inputs={},
                source=git,
                options={"max_tokens": 12, "prompt": "a cat <image>"},
            )
        )


QUICK = {
    "search.trials": 2,
    "search.level_switches": 0,
    "search.linearization_rounds": 0,
    "search.workers": 1,
    "distill.steps": 2,
}
"""A short search on one worker."""


BACKWARDS_CRITERION = """
import torch
from mmcompress.registry import IMPORTANCE

def count_up(model):
    return {block.name: torch.arange(block.units).float() + 1 for block in model.blocks}

def score_backwards(inputs):
    return {name: count_up(model) for name, model in inputs.models.items()}

IMPORTANCE.add("backwards", score_backwards)
"""
"""A plugin with a criterion of one's own."""


CONVOLUTIONAL_NODE = """\
  look:
    kind: image_encoder
    source: python:own_tower:build_convolutional
    inputs: {image: image}
"""
"""A second own module, whose channels are cut."""


@pytest.mark.end_to_end
@pytest.mark.slow
def test_own_modules_and_plugins_reach_the_workers_and_go_through_the_whole_run(
    tiny, tmp_path, monkeypatch, machine, one_artifact
):
    from mmcompress.run import run_targets as workflow

    (tmp_path / "backwards_criterion.py").write_text(BACKWARDS_CRITERION)
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    own_source = "source: python:own_tower:build"
    text = (tiny / "spec.yaml").read_text().replace("source: ./clip", own_source, 1)
    text = text.replace("  choose:", CONVOLUTIONAL_NODE + "  choose:")
    text = text.replace("query: vision.embedding", "query: look.embedding")
    (tmp_path / "own.yaml").write_text(text.replace("./", f"{tiny}/"))
    changes = {
        "plugins": ["backwards_criterion"],
        "prune.importance": "backwards",
        "search.executor": "process",
    }
    summary = workflow.run(
        tmp_path / "own.yaml",
        tmp_path / "run",
        overrides=QUICK | changes,
        policy=one_artifact,
        **machine,
    )
    assert summary.search.failed == 0 and summary.search.trials >= 1
    kept = summary.kept_units["vision"]
    assert set(kept) == {"0.attention", "0.cross_attention"}
    convolutions = summary.kept_units["look"]
    assert len(convolutions) == 10 and all(count >= 8 for count in convolutions.values())
    assert all(p.passed for p in summary.proofs) and summary.compressed.nodes["vision"].params > 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("python:own_tower", "expected python:package.module:build"),
        ("python:no_such_module:build", "no_such_module"),
        ("python:own_tower:nothing", "nothing"),
        ("open_clip:./nowhere", "no such folder"),
        ("python:torch:zeros", r"zeros\(\) raised TypeError: .*own|zeros\(\) raised TypeError"),
        ("python:torch:int64", "int64 is no function"),
        ("python:math:isfinite", r"isfinite\(\) raised TypeError: must be real number"),
        ("transformers:nobody/no-such-model", "hub can't be reached"),
        (
            "nowhere/at/all",
            r"no such folder \(or use embedded:, open_clip:, transformers:, hf-hub:, pip:, python:\)",
        ),
        ("openclip:ViT-B-32@openai", "unknown kind 'openclip'; did you mean 'open_clip:'"),
    ],
)
def test_a_source_that_cannot_be_used_is_named(source, message):
    with pytest.raises(ModelError, match=message):
        load_model(Node(kind="image_encoder", inputs={}, source=source))


OWN_MODELS = """
from torch import nn
from own_tower import Tower
from mmcompress.models.base import ImageEncoderModel, Model
import torch

class Bare(ImageEncoderModel):
    def forward(self, pixels):
        return torch.ones(1, 4), torch.ones(1, 2, 4)

def build_bare(context):
    return Bare()

def build_without(context):
    tower = Tower()
    del tower.{field}
    return tower

def build_odd(context):
    tower = Tower()
    tower.{field} = {value}
    return tower

def build_failing(context):
    raise KeyError("weights")

def build_plain(context):
    return nn.Linear(3, 3)
"""


@pytest.mark.parametrize(
    ("function", "field", "value", "message"),
    [
        ("build_bare", "blocks", None, r"the model sets no blocks; see Model in mmcompress.models"),
        ("build_without", "blocks", None, r"the model sets no blocks"),
        ("build_without", "config", None, r"the model sets no config"),
        ("build_without", "dims", None, r"the model sets no dims"),
        ("build_odd", "blocks", "None", r"the model sets no blocks"),
        ("build_odd", "blocks", "[]", r"the model sets blocks to a list, not a tuple"),
        ("build_odd", "blocks", "(3,)", r"the model's blocks hold a int; each must be a Block"),
        ("build_odd", "dims", "4", r"the model sets dims to a int, not a dict"),
        (
            "build_odd",
            "kind",
            "'text_decoder'",
            r"gave one of kind text_decoder, not one of kind image_encoder",
        ),
        ("build_failing", "x", None, r"raised KeyError: 'weights' \(.*own_\w+.py:\d+\)"),
        ("build_plain", "x", None, r"gave Linear, not one of kind image_encoder"),
    ],
)
def test_an_own_model_that_keeps_no_contract_is_told(
    tmp_path, monkeypatch, function, field, value, message
):
    module = f"own_{function}_{field}_{abs(hash(value))}"
    text = OWN_MODELS.replace("{field}", field).replace("{value}", str(value))
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    source = f"python:{module}:{function}"
    with pytest.raises(ModelError, match=message) as caught:
        load_model(Node(kind="image_encoder", inputs={}, source=source))
    assert source in str(caught.value)


def _raise_from(error, *causes):
    """Raise an error that the last of the causes led to, each one wrapped by the next."""
    for wrapped in causes:
        try:
            raise wrapped from error
        except Exception as caught:
            error = caught
    raise error


def _hub_error(name, *message, status=None):
    """An error of the hub's library; one that answers a request carries the response."""
    import huggingface_hub.errors as errors

    if status is None:
        return getattr(errors, name)(*message)
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(errors, name)(*message, response=response)


@pytest.mark.parametrize(
    ("error", "wrappers", "message"),
    [
        (_hub_error("GatedRepoError", "Nein.", status=403), [OSError("Nein.")], "ask for consent"),
        (
            _hub_error("RepositoryNotFoundError", "Nein.", status=401),
            [OSError("Nein.")],
            "hub has no model of this name, or it is private",
        ),
        (_hub_error("LocalEntryNotFoundError", "Nein."), [], "hub can't be reached"),
        (
            _hub_error("OfflineModeIsEnabled", "Nein."),
            [ValueError("Nein.")],
            "hub can't be reached",
        ),
        (
            _hub_error("HfHubHTTPError", "Nein.", status=503),
            [OSError("Nein.")],
            "the hub answered 503, a failure of its own",
        ),
        (socket.gaierror(-2, "Nein."), [KeyError("Nein."), OSError("Nein.")], "can't be reached"),
        (TimeoutError(), [OSError("Nein.")], "hub can't be reached"),
        (URLError("Nein."), [OSError("Nein.")], "hub can't be reached"),
        (
            _hub_error("HfHubHTTPError", "Nein.", status=400),
            [OSError("Nein.")],
            "'a/b': the hub answered 400: Nein",
        ),
        (
            ValueError("the connector of this cached model is restricted"),
            [],
            "'a/b': can't be fetched: the connector",
        ),
    ],
)
def test_an_error_of_the_hub_is_told_by_its_class_and_not_by_its_words(
    monkeypatch, error, wrappers, message
):
    """No message here holds a word to go by, and the last one holds them all."""
    from mmcompress.models import hub_files

    def fail(*_, **__):
        _raise_from(error, *wrappers)

    monkeypatch.setattr(hub_files, "HfApi", lambda **_: SimpleNamespace(model_info=fail))
    with pytest.raises(ModelError, match=message):
        load_model(Node(kind="image_encoder", inputs={}, source="transformers:a/b"))


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path):
    from transformers import ConvNextConfig, ConvNextModel

    folder = _write(
        tmp_path, ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8]))
    )
    with pytest.raises(ModelError, match=r"'convnext' is not supported \(known: .*dinov2"):
        load_model(Node(kind="image_encoder", inputs={}, source=f"transformers:{folder}"))


def test_weights_of_another_shape_are_named(tmp_path):
    import json

    folder = _write(tmp_path, _vit())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"missing or of another shape: .*mlp"):
        load_model(Node(kind="image_encoder", inputs={}, source=f"transformers:{folder}"))


def test_a_missing_tokenizer_and_a_pickle_are_refused(tmp_path):
    folder = _write(tmp_path, _bert(), tokenizer=False)
    with pytest.raises(ModelError, match=r"tokenizer.json is missing"):
        load_model(Node(kind="text_encoder", inputs={}, source=f"transformers:{folder}"))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04not a model")
    with pytest.raises(ModelError, match=r"no .safetensors file \(only pytorch_model.bin"):
        load_model(Node(kind="text_encoder", inputs={}, source=f"transformers:{folder}"))


def test_a_decoder_with_an_encoder_of_texts_is_refused_by_name(tmp_path):
    """Not by a list of missing weights: they are tied to those of the encoder."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 60}
    MBartForConditionalGeneration(MBartConfig(**sizes)).save_pretrained(tmp_path)
    node = Node(kind="text_decoder", source=str(tmp_path), inputs={})
    with pytest.raises(ModelError, match=r"is_encoder_decoder.*AutoModelForCausalLM"):
        load_model(node)
