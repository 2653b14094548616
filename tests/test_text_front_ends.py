"""Texts become the token ids that their library makes of them, and pool as their folder says."""

from __future__ import annotations

import json

import pytest
import torch
from library_checkpoints import make_tokenizer, save_clip, save_sentence_encoder
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from mmcompress.errors import ModelError
from mmcompress.models.sources import load_model
from mmcompress.models.tokenizer_files import find_added_end
from mmcompress.spec.schema import Node

LONG = "a fox above a robot " * 9


def load_text_encoder(folder):
    return load_model(Node(kind="text_encoder", source=str(folder), inputs={}))


def embed(model, text):
    """Embed a text as a bundle does."""
    from mmcompress.data.base import Pairs
    from mmcompress.kinds.base import Batch, NodeSetup
    from mmcompress.kinds.text_encoder.trainable import TrainableTextEncoder

    setup = NodeSetup(
        name="words",
        config=model.config,
        tokenizer_json=model.tokenizer_json,
        sources={},
        feeds_list=False,
        is_unjoined=True,
        labels_by_teacher=False,
    )
    node = TrainableTextEncoder(setup)
    ids, _ = node.collate(Pairs(inputs=(text,), texts=(text,)))
    with torch.no_grad():
        return node.forward(model, Batch({"words": ids}), outputs={})["embedding"][0]


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one, other.flatten(), dim=0))


def read_tokens(folder, text, **options):
    """Return the library's tokens [1, t, w] of a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(text, truncation=True, max_length=24, return_tensors="pt", **options)
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder).eval()
        return model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).last_hidden_state


@pytest.mark.parametrize("text", ["a fox", LONG, ""])
def test_clip_with_the_legacy_end_token_pools_where_its_library_does(tmp_path, text):
    save_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        library = AutoModel.from_pretrained(tmp_path).eval()
        features = library.get_text_features(input_ids=ids)
    expected = getattr(features, "pooler_output", features)[0]
    assert cosine(embed(load_text_encoder(tmp_path), text), expected) > 0.9999


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        ("pooling_mode_cls_token", lambda tokens: tokens[:, 0]),
        ("pooling_mode_mean_tokens", lambda tokens: tokens.mean(1)),
        ("pooling_mode_max_tokens", lambda tokens: tokens.amax(1)),
        (
            "pooling_mode_mean_sqrt_len_tokens",
            lambda tokens: tokens.sum(1) / tokens.shape[1] ** 0.5,
        ),
    ],
)
def test_tokens_pool_as_the_folder_says(tmp_path, mode, pool):
    save_sentence_encoder(tmp_path, **{mode: True})
    expected = pool(read_tokens(tmp_path, LONG))
    assert cosine(embed(load_text_encoder(tmp_path), LONG), expected) > 0.9999


def test_dense_layers_and_prompts_are_followed(tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "2_Dense").mkdir()
    weight = torch.randn(8, 32)
    bias = torch.randn(8)
    save_file(
        {"linear.weight": weight, "linear.bias": bias}, tmp_path / "2_Dense" / "model.safetensors"
    )
    dense = {"in_features": 32, "activation_function": "torch.nn.modules.activation.Tanh"}
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(dense))
    prompts = {"prompts": {"query": "robot: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    pooled = read_tokens(tmp_path, "robot: a fox").mean(1)
    expected = torch.tanh(pooled @ weight.T + bias)
    assert cosine(embed(load_text_encoder(tmp_path), "a fox"), expected) > 0.9999


def test_a_tokenizer_that_pads_and_cuts_by_itself_does_neither_here(tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["padding"] = {
        "strategy": {"Fixed": 20},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    content["truncation"] = {
        "direction": "Right",
        "max_length": 6,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    model = load_text_encoder(tmp_path)
    own = json.loads(model.tokenizer_json)
    assert own["padding"] is None and own["truncation"] is None
    expected = read_tokens(tmp_path, LONG, padding=False).mean(1)
    assert cosine(embed(model, LONG), expected) > 0.9999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken is not followed"),
        ({"include_prompt": False}, "include_prompt: false is not followed"),
    ],
)
def test_a_pooling_that_is_not_followed_is_refused_by_its_key(tmp_path, change, message):
    save_sentence_encoder(tmp_path, **change)
    with pytest.raises(ModelError, match=message):
        load_text_encoder(tmp_path)


def test_a_module_that_is_not_followed_is_refused_by_its_name(tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules.append({"path": "2_CNN", "type": "sentence_transformers.models.CNN"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"modules.json: 'CNN' is not followed"):
        load_text_encoder(tmp_path)


def test_a_token_beyond_the_embedding_is_told_when_the_model_is_loaded(tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zeppelin"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"beyond the embedding of 131: .* 'zeppelin', id 131"):
        load_text_encoder(tmp_path)


def test_the_token_behind_a_text_is_that_of_its_tokenizer():
    tokenizer = make_tokenizer()
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    end = find_added_end(tokenizer.backend_tokenizer.to_str())
    assert end == (whole[-1] if whole != plain else None)
