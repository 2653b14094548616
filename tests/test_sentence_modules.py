"""Folders of sentence-transformers: pooling, further steps, prompts and limits.

The expected values are those of the library's documentation, on transformers' own tokens.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from library_checkpoints import TEXT, make_tokenizer, save_sentence_encoder, stir
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, RobertaConfig, RobertaModel

from mmcompress.errors import ModelError
from mmcompress.models.sources import load_model
from mmcompress.runtime.text import TextReader, parse_tokenizer
from mmcompress.spec.schema import Node

TEXTS = ("a red heart", "A Blue Star left of it", "", " ".join(["a red heart"] * 12))


def load(folder):
    return load_model(Node(kind="text_encoder", inputs={}, source=f"transformers:{folder}"))


def embed(model, texts):
    """Embed texts in one batch, as a bundle does."""
    reader = TextReader(parse_tokenizer(model.tokenizer_json), model.config)
    with torch.no_grad():
        return model(torch.from_numpy(reader.read(texts).ids)).numpy()


def run_library(folder, text, *, length=24):
    """Return the tokens [t, w] that transformers gives a text."""
    read = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder)
    encoded = read(text, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        return model(**encoded).last_hidden_state[0].double()


def check(folder, expect, *, before="", length=24):
    """Compare the embeddings of a folder with those that `expect` makes of the library's tokens."""
    embeddings = embed(load(folder), list(TEXTS))
    for embedding, text in zip(embeddings, TEXTS, strict=True):
        expected = expect(run_library(folder, before + text, length=length))
        cosine = float(embedding @ expected.numpy() / np.linalg.norm(expected))
        assert cosine > 0.9999, text


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def add_step(folder, name, config, weights=None):
    """Add a step to a folder: a line of `modules.json` and a folder of its own."""
    modules = json.loads((folder / "modules.json").read_text())
    path = f"{len(modules)}_{name}"
    step_type = f"sentence_transformers.models.{name}"
    number = len(modules)
    modules.append({"idx": number, "name": str(number), "path": path, "type": step_type})
    write_json(folder / "modules.json", modules)
    write_json(folder / path / "config.json", config)
    if weights is not None:
        save_file(weights, folder / path / "model.safetensors")


def average_by_position(x):
    positions = torch.arange(1, len(x) + 1)[:, None]
    return (x * positions).sum(0) / positions.sum()


POOLINGS = {
    "pooling_mode_cls_token": lambda x: x[0],
    "pooling_mode_max_tokens": lambda x: x.amax(0),
    "pooling_mode_mean_tokens": lambda x: x.mean(0),
    "pooling_mode_mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
    "pooling_mode_weightedmean_tokens": average_by_position,
    "pooling_mode_lasttoken": lambda x: x[-1],
}


@pytest.mark.parametrize("key", POOLINGS)
@pytest.mark.examples(2)
def test_tokens_are_pooled_as_the_folder_says(key, tmp_path):
    save_sentence_encoder(tmp_path, **{key: True})
    check(tmp_path, POOLINGS[key])


def test_several_poolings_are_joined_in_the_order_of_the_library(tmp_path):
    keys = ("pooling_mode_mean_sqrt_len_tokens", "pooling_mode_cls_token")
    save_sentence_encoder(tmp_path, **dict.fromkeys(keys, True))
    check(tmp_path, lambda x: torch.cat([x[0], x.sum(0) / len(x) ** 0.5]))


@pytest.mark.parametrize("mode", ["lasttoken", ["max", "cls"]])
def test_poolings_are_named_by_newer_files_too(mode, tmp_path):
    save_sentence_encoder(tmp_path)
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": mode})
    if mode == "lasttoken":
        check(tmp_path, lambda x: x[-1])
    else:
        check(tmp_path, lambda x: torch.cat([x.amax(0), x[0]]))


def make_dense(activation, *, width=32):
    torch.manual_seed(1)
    weights = {"linear.weight": torch.randn(8, width), "linear.bias": torch.randn(8)}
    config = {"in_features": width, "out_features": 8, "bias": True}
    return config | {"activation_function": activation}, weights


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("torch.nn.modules.linear.Identity", lambda x: x),
        ("torch.nn.modules.activation.Tanh", torch.tanh),
    ],
)
@pytest.mark.examples(1)
def test_dense_layers_and_norms_behind_the_pooling_are_run(activation, function, tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    norm = {"norm.weight": torch.rand(32), "norm.bias": torch.rand(32)}
    add_step(tmp_path, "LayerNorm", {"dimension": 32}, norm)
    config, weights = make_dense(activation)
    add_step(tmp_path, "Dense", config, weights)
    add_step(tmp_path, "Normalize", {})

    def expect(x):
        mean = torch.nn.functional.layer_norm(
            x.mean(0).float(), (32,), norm["norm.weight"], norm["norm.bias"]
        )
        return function(weights["linear.weight"] @ mean + weights["linear.bias"])

    check(tmp_path, expect)
    assert load(tmp_path).dims["embedding"] == 8


def write_prompts(folder, **content):
    write_json(folder / "config_sentence_transformers.json", content)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("key", ["pooling_mode_mean_tokens", "pooling_mode_cls_token"])
@pytest.mark.examples(1)
def test_the_default_prompt_stands_before_every_text(key, include, tmp_path):
    save_sentence_encoder(tmp_path, **{key: True, "include_prompt": include})
    prompts = {"query": "a star", "document": "a key"}
    write_prompts(tmp_path, prompts={**prompts, "query": "a star "}, default_prompt_name="query")
    # the prompt has three tokens with that of the start
    check(tmp_path, lambda x: POOLINGS[key](x if include else x[3:]), before="a star ")


def test_prompts_without_a_default_change_nothing(tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    write_prompts(tmp_path, prompts={"query": "a star "}, default_prompt_name=None)
    check(tmp_path, lambda x: x.mean(0))


def test_texts_are_cut_and_lowered_as_the_folder_says(tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.save_pretrained(tmp_path)
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 9, "do_lower_case": True})
    embeddings = embed(load(tmp_path), list(TEXTS))
    for embedding, text in zip(embeddings, TEXTS, strict=True):
        expected = run_library(tmp_path, text.lower(), length=9).mean(0)
        assert float(embedding @ expected.numpy() / np.linalg.norm(expected)) > 0.9999, text


def test_the_positions_of_roberta_begin_behind_its_padding(tmp_path):
    torch.manual_seed(0)
    config = RobertaConfig(**{**TEXT, "pad_token_id": 4})
    stir(RobertaModel(config)).save_pretrained(tmp_path)
    make_tokenizer(length=100).save_pretrained(tmp_path)
    assert load(tmp_path).config["context_length"] == 24 - 5
    check(tmp_path, lambda x: x.mean(0), length=19)


def change_pooling(folder, **content):
    path = folder / "1_Pooling" / "config.json"
    write_json(path, {**json.loads(path.read_text()), **content})


def add_dense(folder, **content):
    config, weights = make_dense("torch.nn.modules.linear.Identity")
    add_step(folder, "Dense", config | content, weights)


REFUSALS = {
    "attention": (
        lambda folder: change_pooling(folder, pooling_mode="attention"),
        "pooling_mode: 'attention' is unknown",
    ),
    "key": (
        lambda folder: change_pooling(folder, pooling_mode_new=True),
        "1_Pooling/config.json: pooling_mode_new: not followed",
    ),
    "step": (lambda folder: add_step(folder, "LSTM", {}), "a step of type '.*LSTM' is not"),
    "activation": (
        lambda folder: add_dense(folder, activation_function="torch.nn.modules.activation.PReLU"),
        "activation_function: '.*PReLU' is not followed",
    ),
    "residual": (
        lambda folder: add_dense(folder, use_residual=True),
        "2_Dense/config.json: use_residual: not followed",
    ),
    "pickle": (
        lambda folder: add_step(folder, "Dense", make_dense("torch.nn.Tanh")[0]),
        "2_Dense/model.safetensors is missing; .* save the model anew with safetensors",
    ),
    "prompt": (
        lambda folder: write_prompts(folder, prompts={"a": "b"}, default_prompt_name="query"),
        "default_prompt_name: 'query' is none of the prompts",
    ),
    "comparison": (
        lambda folder: write_prompts(folder, similarity_fn_name="dot"),
        "similarity_fn_name: 'dot' is not followed",
    ),
    "length": (
        lambda folder: write_json(folder / "sentence_bert_config.json", {"max_seq_length": 2}),
        "texts of 2 tokens hold nothing",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_followed_is_refused_by_name(case, tmp_path):
    save_sentence_encoder(tmp_path, pooling_mode_mean_tokens=True)
    change, message = REFUSALS[case]
    change(tmp_path)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("module", "cure"),
    [
        ("Transformer", r"save it anew once: SentenceTransformer\("),
        ("CLIPModel", r"give the model itself as the source: .*0_CLIPModel"),
    ],
)
def test_a_model_in_a_folder_of_its_own_is_refused_with_the_cure(
    tmp_path, module, cure, has_config
):
    """Versions of the library before 2 keep it so; their root has a config of one key."""
    save_sentence_encoder(tmp_path / f"0_{module}", pooling_mode_mean_tokens=True)
    name = f"sentence_transformers.models.{module}"
    modules = [{"idx": 0, "name": "0", "path": f"0_{module}", "type": name}]
    write_json(tmp_path / "modules.json", modules)
    if has_config:
        write_json(tmp_path / "config.json", {"__version__": "0.3.0"})
    with pytest.raises(ModelError, match=f"its first module '0_{module}' is a folder.*{cure}"):
        load(tmp_path)
