"""Texts are cut, padded, cleaned and read as the library of the model does it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from library_checkpoints import TEXT, VISION, make_tokenizer, stir
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
)

from mmcompress.errors import BundleError, ModelError
from mmcompress.models.sources import load_model
from mmcompress.runtime.clean_text import CLEANERS
from mmcompress.runtime.text import TextReader, load_tokenizer, parse_tokenizer
from mmcompress.spec.schema import Node

LONG_TEXT = " ".join(["a red heart left of a blue star"] * 6)
"""A text that is longer than any context here."""

TEXTS = ("a red heart", "A Blue Star, left of it!", "", LONG_TEXT)


def load_text_encoder(folder, **options):
    node = Node(kind="text_encoder", inputs={}, source=f"transformers:{folder}", **options)
    return load_model(node)


def embed(model, text):
    """Embed one text as a bundle does: the reader on the manifest's config, then the model."""
    reader = TextReader(parse_tokenizer(model.tokenizer_json), model.config)
    ids = reader.read([text]).ids
    with torch.no_grad():
        return ids[0].tolist(), model(torch.from_numpy(ids))[0].numpy()


def measure_cosine(own, library):
    vector = library.reshape(-1).numpy()
    return float(own @ vector / np.linalg.norm(vector))


def save_text_model(folder: Path, model, tokenizer=None) -> None:
    stir(model).save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)


def make_clip(**text: object) -> CLIPModel:
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**TEXT, **text}, vision_config=VISION, projection_dim=16)
    return CLIPModel(config)


def reorder_tokenizer(**ids: int) -> Tokenizer:
    """The tokenizer of the tests, with other ids for some of its special tokens."""
    content = json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    for token, index in ids.items():
        name = {"end": "</s>", "pad": "<pad>"}[token]
        other = next(one for one, value in vocabulary.items() if value == index)
        old = vocabulary[name]
        vocabulary[name], vocabulary[other] = index, old
        for added in content["added_tokens"]:
            swapped = {name: index, other: old}
            added["id"] = swapped.get(added["content"], added["id"])
        for special in content["post_processor"].get("special_tokens", {}).values():
            swapped_ids = {old: index, index: old}
            special["ids"] = [swapped_ids.get(one, one) for one in special["ids"]]
    content["added_tokens"].sort(key=lambda added: added["id"])
    return Tokenizer.from_str(json.dumps(content))


def wrap(tokenizer: Tokenizer, length: int = 24, **options: object):
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokens |= options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **tokens)


@pytest.mark.parametrize("named_end", [2, 130])
def test_clip_reads_its_embedding_at_the_end_of_a_text_of_any_length(named_end, tmp_path):
    """Old configurations of CLIP name 2 as the end; the highest id of a text is then taken."""
    tokenizer = wrap(reorder_tokenizer(end=130))
    save_text_model(tmp_path, make_clip(eos_token_id=named_end), tokenizer)
    model = load_text_encoder(tmp_path)
    library = AutoModel.from_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        expected = read(text, truncation=True, return_tensors="pt")
        ids, embedding = embed(model, text)
        expected_ids = expected["input_ids"][0].tolist()
        assert ids[: len(expected_ids)] == expected_ids
        with torch.no_grad():
            features = library.get_text_features(**expected).pooler_output
        assert measure_cosine(embedding, features) > 0.9999, text


def test_a_long_text_of_bert_ends_in_its_separator(tmp_path):
    """BERT's configuration names no end token: it must not be taken for padding."""
    torch.manual_seed(0)
    config = BertConfig(**{**TEXT, "eos_token_id": None, "bos_token_id": None})
    save_text_model(tmp_path, BertModel(config))
    model = load_text_encoder(tmp_path)
    library = AutoModel.from_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "a <pad> heart <pad>"):
        expected = read(text, truncation=True, return_tensors="pt")
        ids, embedding = embed(model, text)
        assert ids == expected["input_ids"][0].tolist()
        with torch.no_grad():
            tokens = library(**expected).last_hidden_state
        assert measure_cosine(embedding, tokens.mean(1)) > 0.9999, text


def check_siglip(folder, texts=TEXTS):
    """Compare with `padding="max_length"`, as SigLIP's documentation asks for; return the model."""
    own = load_text_encoder(folder)
    read = AutoTokenizer.from_pretrained(folder)
    library = AutoModel.from_pretrained(folder)
    for text in texts:
        expected = read(text, truncation=True, padding="max_length", return_tensors="pt")
        ids, embedding = embed(own, text)
        assert ids == expected["input_ids"][0].tolist(), text
        with torch.no_grad():
            features = library.get_text_features(input_ids=expected["input_ids"]).pooler_output
        assert measure_cosine(embedding, features) > 0.9999, text
    return own


def make_siglip(**text: object) -> SiglipModel:
    torch.manual_seed(0)
    return SiglipModel(SiglipConfig(text_config={**TEXT, **text}, vision_config=VISION))


@pytest.mark.parametrize("side", ["right", "left"])
def test_siglip_pads_with_the_id_and_on_the_side_of_its_tokenizer(side, tmp_path):
    """The configuration of SigLIP 2 says 1, its tokenizer 0; the last position is read."""
    save_text_model(tmp_path, make_siglip(), wrap(reorder_tokenizer(pad=0), padding_side=side))
    own = check_siglip(tmp_path)
    assert own.config["pad"] == 0
    assert own.config.get("pad_side", "right") == side


def test_siglip_2_reads_small_letters_and_pads_to_64(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyzA\u2581,!"
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocabulary = {token: index for index, token in enumerate((*specials, *letters))}
    tokenizer = Siglip2Tokenizer(vocabulary, [], model_max_length=64, padding_side="right")
    model = make_siglip(max_position_embeddings=64, vocab_size=len(vocabulary))
    save_text_model(tmp_path, model, tokenizer)
    own = check_siglip(tmp_path, ("A red HEART, left", "", "a red heart " * 9))
    assert own.config["pad"] == 0
    assert own.config["context_length"] == 64


def test_the_tokenizer_of_the_first_siglip_is_read_without_sentencepiece(tmp_path):
    """Its class removes punctuation and capitals ahead of its vocabulary."""
    save_text_model(tmp_path, make_siglip())
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    own = load_text_encoder(tmp_path)
    assert own.config["clean"] == "siglip"
    assert embed(own, "A Red HEART!!")[0] == embed(own, " a  red heart ")[0]
    # what `SiglipTokenizer.canonicalize_text` answers where sentencepiece is installed
    assert CLEANERS["siglip"]("it's_a  (small)\tHEART.") == "itsa small heart"


def change_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def test_padding_and_truncation_in_a_file_are_those_of_another_use(tmp_path):
    """all-MiniLM-L6-v2's own file pads and cuts at 128: 7 tokens became 128."""
    torch.manual_seed(0)
    save_text_model(tmp_path, BertModel(BertConfig(**TEXT)))
    change_json(
        tmp_path / "tokenizer.json",
        padding={
            "strategy": {"Fixed": 20},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
        truncation={
            "direction": "Right",
            "max_length": 6,
            "strategy": "LongestFirst",
            "stride": 0,
        },
    )
    own = load_text_encoder(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert embed(own, text)[0] == read(text, truncation=True)["input_ids"]
    deployed = load_tokenizer(tmp_path / "tokenizer.json")
    assert deployed.encode("a red heart").ids == read("a red heart")["input_ids"]
    without_settings = tmp_path / "tokenizer_config.json"
    without_settings.unlink()
    assert len(embed(load_text_encoder(tmp_path), "a red heart")[0]) == 5


def test_a_captioner_reads_no_padding_from_its_file(tmp_path):
    from library_checkpoints import save_blip

    save_blip(tmp_path)
    plain = load_model(Node(kind="text_decoder", inputs={}, source=f"transformers:{tmp_path}"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=11, pad_id=1, pad_token="<pad>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    padded = load_model(Node(kind="text_decoder", inputs={}, source=f"transformers:{tmp_path}"))
    assert padded.tokenizer_json == plain.tokenizer_json


def test_a_vocabulary_of_an_old_kind_is_converted(tmp_path):
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "heart", "##s", ","]
    stir(BertModel(BertConfig(**{**TEXT, "vocab_size": 10}))).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    library = BertTokenizer.from_pretrained(tmp_path)
    text = "A red, Hearts"
    assert embed(load_text_encoder(tmp_path), text)[0] == library(text)["input_ids"]


@pytest.mark.slow
def test_a_vocabulary_that_can_not_be_converted_names_the_cure(tmp_path):
    stir(make_siglip()).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x0b")
    with pytest.raises(ModelError, match=r"of spiece\.model here: .*save_pretrained\(FOLDER\)"):
        load_text_encoder(tmp_path)


def test_tokens_beyond_the_embeddings_are_refused_by_name(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<new>")])
    save_text_model(tmp_path, make_siglip(), tokenizer)
    with pytest.raises(ModelError, match=r"beyond the 131 embeddings .*'<new>' \(131\)"):
        load_text_encoder(tmp_path)


def test_a_fusion_encoder_cuts_texts_as_its_tokenizer_does(tmp_path):
    from families import blip_matching_model

    blip_matching_model(131).save_pretrained(tmp_path)
    make_tokenizer(length=12).save_pretrained(tmp_path)
    node = Node(kind="fusion_encoder", inputs={}, source=f"transformers:{tmp_path}")
    model = load_model(node)
    reader = TextReader(parse_tokenizer(model.tokenizer_json), model.config)
    read = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert reader.read([text]).ids[0].tolist() == read(text, truncation=True)["input_ids"]


ODD_TEXTS = (
    "It\u2019s \u201cfine\u201d",
    "salt &amp;amp; pepper &lt;b&gt; &rsquo;",
    "<b>&hellip;</b>\nsalt &amp; pepper",
    "\ufb01ne \uff26\uff55\uff4c\uff4c\u3000width",
    "a\r\nb\rc\u2028d\x85e",
    "\x1b[31mred\x1b[0m \ufeffe\u0301 \ud83d\ude00 \ud83d",
    "Hello_world, it's: OK!",
    "\x93quoted\x94 \u0130stanbul \u03a3\u0391\u03a3",
    "",
)


@pytest.mark.parametrize("name", ["whitespace", "lower", "canonicalize"])
def test_texts_are_cleaned_as_open_clip_cleans_them(name):
    from open_clip.tokenizer import get_clean_fn

    clean = get_clean_fn(name)
    for text in (*ODD_TEXTS, *TEXTS):
        assert CLEANERS[name](text) == clean(text), text


def test_an_unknown_cleaning_is_refused():
    with pytest.raises(BundleError, match="clean: 'polish' is unknown"):
        TextReader(
            parse_tokenizer(make_tokenizer().backend_tokenizer.to_str()), {"clean": "polish"}
        )


def save_open_clip(folder: Path, *, tokenizer=None, **text_config: object):
    """Save a tiny model as open_clip's folders are; return open_clip's own model of it."""
    import open_clip
    from open_clip.model import CustomTextCLIP
    from safetensors.torch import save_file

    text = {
        "context_length": 24,
        "vocab_size": 131,
        "width": 32,
        "heads": 4,
        "layers": 1,
        "no_causal_mask": True,
        "pool_type": "last",
        "hf_tokenizer_name": "own",
        **text_config,
    }
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    built = {key: value for key, value in text.items() if not key.startswith("tokenizer_")}
    model = stir(CustomTextCLIP(**{**config, "text_cfg": built}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model, open_clip


def check_open_clip(folder, model, open_clip):
    own = load_model(Node(kind="text_encoder", inputs={}, source=str(folder)))
    read = open_clip.get_tokenizer(f"local-dir:{folder}")
    for text in (*TEXTS, *ODD_TEXTS):
        expected = read([text])
        ids, embedding = embed(own, text)
        assert ids == expected[0].tolist(), text
        with torch.no_grad():
            assert measure_cosine(embedding, model.encode_text(expected)) > 0.9999
    return own


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace", None])
def test_open_clip_pads_and_cleans_as_its_configuration_says(clean, tmp_path):
    options = {"tokenizer_kwargs": {"clean": clean}} if clean else {}
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = None
    own = check_open_clip(tmp_path, *save_open_clip(tmp_path, tokenizer=tokenizer, **options))
    assert own.config["pad"] == 1


def test_open_clip_replaces_the_separator_where_it_is_told_to(tmp_path):
    options = {"tokenizer_kwargs": {"strip_sep_token": True}}
    tokenizer = make_tokenizer()
    tokenizer.sep_token = "</s>"
    own = check_open_clip(tmp_path, *save_open_clip(tmp_path, tokenizer=tokenizer, **options))
    assert own.config["replaced_ids"] == [[2, 0]]


@pytest.mark.slow
def test_open_clips_own_tokenizer_repairs_and_lowers_texts(tmp_path):
    options = {"hf_tokenizer_name": None, "vocab_size": 49408, "pool_type": "argmax"}
    own = check_open_clip(tmp_path, *save_open_clip(tmp_path, **options))
    assert own.config["clean"] == "lower"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tokenizer_mode": "clips"}, r"text_cfg\.tokenizer_mode"),
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, r"tokenizer_kwargs\.reduction_mask"),
        ({"tokenizer_kwargs": {"clean": "polish"}}, r"tokenizer_kwargs\.clean: 'polish'"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, r"kwargs\.trust_remote_code"),
    ],
)
def test_settings_of_open_clip_that_are_not_followed_are_refused_by_name(options, key, tmp_path):
    save_open_clip(tmp_path, tokenizer=make_tokenizer(), **options)
    with pytest.raises(ModelError, match=key):
        load_model(Node(kind="text_encoder", inputs={}, source=str(tmp_path)))
