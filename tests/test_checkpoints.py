"""Folders that hold no whole model: each is refused with its name and the cure, before weights are read."""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct

import pytest
import torch
from families import TEXT, TOKENIZER, VISION
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from transformers.utils import logging as library_logging

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext
from mmcompress.models.checkpoint import read_checkpoint
from mmcompress.models.hub import load_reference_model
from mmcompress.models.hub_files import WEIGHT_FILES
from mmcompress.models.quiet_loading import quiet_loading
from mmcompress.models.shapes import load_shapes_only
from mmcompress.models.sources import load_model
from mmcompress.models.tokenizer_files import load_tokenizer_json
from mmcompress.spec.schema import Node

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny BERT as transformers saves it."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**TEXT)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(TOKENIZER())
    return folder


@pytest.fixture()
def copy(bert, tmp_path):
    return shutil.copytree(bert, tmp_path / "model")


def load(folder, kind="text_encoder"):
    return load_model(Node(kind=kind, inputs={}, source=f"transformers:{folder}"))


def refuse(folder, message, kind="text_encoder"):
    """Both the loading of weights and the check of headers alone refuse a folder, in the same words."""
    with pytest.raises(ModelError, match=message) as loaded:
        load(folder, kind)
    with load_shapes_only(), pytest.raises(ModelError) as checked:
        load(folder, kind)
    assert str(checked.value) == str(loaded.value)


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_bytes(data, how):
    if how == "cut":
        return data[: len(data) // 2]
    if how == "one byte short":
        return data[:-1]
    if how == "one byte more":
        return data + b"\0"
    if how == "cut in the header":
        return data[:100]
    if how == "damaged header":
        return data.replace(b'"dtype"', b'"dtipe"', 1)
    if how == "header too long":
        return struct.pack("<Q", 1 << 60) + data[8:]
    known = {
        "pointer": POINTER,
        "empty": b"",
        "web page": b"<!doctype html><title>404",
        "pickle": b"PK\x03\x04 not safetensors at all",
        "no tensors": struct.pack("<Q", 2) + b"{}",
        "four bytes": b"1234",
    }
    return known[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("pointer", r"model.safetensors: a pointer of git-lfs, .*run 'git lfs pull'"),
        ("empty", r"model.safetensors: the file is empty; copy or download it again"),
        ("web page", r"model.safetensors: a web page, not the file itself"),
        ("pickle", r"model.safetensors: no safetensors file in spite of its name"),
        ("four bytes", r"model.safetensors: no safetensors file in spite of its name"),
        ("no tensors", r"the weights are empty"),
        (
            "cut",
            r"model.safetensors: cut short: it has [\d,]+ bytes where its header tells of [\d,]+",
        ),
        ("one byte short", r"cut short"),
        ("one byte more", r"too long"),
        ("cut in the header", r"cut short: it has 100 bytes"),
        ("damaged header", r"its header is damaged"),
        ("header too long", r"no safetensors file in spite of its name"),
    ],
)
def test_weights_that_are_no_whole_file_are_told_with_the_cure(copy, how, message):
    path = copy / "model.safetensors"
    path.write_bytes(damage_bytes(path.read_bytes(), how))
    refuse(copy, message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "a pointer of git-lfs"),
        (b"", "the file is empty"),
        (b"{", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"<html>", "a web page"),
    ],
    ids=["pointer", "empty", "cut", "not UTF-8", "too deep", "web page"],
)
def test_a_damaged_file_beside_the_weights_is_told(copy, name, content, message):
    (copy / name).write_bytes(content)
    refuse(copy, rf"{name}: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized by fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized by bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantized by bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized by mxfp4"),
        ({"compression_config": {"format": "pack-quantized"}}, "quantized by pack-quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "by hqq .*text_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_quantized_checkpoint_is_refused_by_name_with_the_cure(copy, changes, message):
    rewrite_config(copy, **changes)
    refuse(copy, message + r".*; this tool cuts and trains float weights: .*dequantize\(\)")


@pytest.mark.parametrize(
    ("rename", "dtype", "message"),
    [
        ("{}.qweight", torch.int32, r"qweight' is quantized \(I32\)"),
        ("{}.weight", torch.int8, r"weight' is quantized \(I8\)"),
        ("{}.weight", torch.uint8, r"weight' is quantized \(U8\)"),
        ("{}.weight", torch.float8_e4m3fn, r"weight' is quantized \(F8_E4M3, fp8\)"),
        ("{}.weight.absmax", torch.float32, r"absmax' is quantized"),
        ("{}.SCB", torch.float32, r"SCB' is quantized"),
        ("{}.weight_scale_inv", torch.float32, r"weight_scale_inv' is quantized"),
        ("{}.lora_A.default.weight", torch.float32, r"belongs to an adapter of PEFT; merge"),
        ("{}.base_layer.weight", torch.float32, r"belongs to an adapter of PEFT; merge"),
    ],
)
def test_quantized_layers_and_adapters_are_known_by_their_tensors(copy, rename, dtype, message):
    weights = load_file(copy / "model.safetensors")
    layer = "encoder.layer.0.output.dense"
    value = weights.pop(f"{layer}.weight")
    save_file(weights | {rename.format(layer): value.to(dtype)}, copy / "model.safetensors")
    refuse(copy, message)


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_refused_with_the_way_to_merge_it(copy, with_config):
    if not with_config:
        (copy / "config.json").unlink()
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refuse(copy, r"an adapter of PEFT .*from_pretrained\('org/base'\).*merge_and_unload\(\)")


def test_weights_of_other_formats_and_names_are_told(copy):
    path = copy / "model.safetensors"
    path.rename(copy / "weights.safetensors")
    refuse(copy, r"no model.safetensors, only weights.safetensors; rename")
    (copy / "weights.safetensors").rename(copy / "model.gguf")
    refuse(copy, r"no .safetensors file \(only model.gguf: ")
    (copy / "model.gguf").unlink()
    refuse(copy, r"the folder holds no weights")


def test_missing_parts_of_the_weights_are_named(bert, tmp_path):
    model = AutoModel.from_pretrained(bert)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER())
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 2 and load(tmp_path).blocks
    names = read_checkpoint(tmp_path, WEIGHT_FILES["transformers"])
    assert {name: tensor.shape for name, tensor in names.items()} == {
        name: tuple(value.shape) for name, value in model.state_dict().items()
    }
    parts[1].unlink()
    refuse(tmp_path, rf"parts that are missing: {parts[1].name}; copy or download all parts")
    parts[1].write_bytes(POINTER)
    refuse(tmp_path, rf"{parts[1].name}: a pointer of git-lfs")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    refuse(tmp_path, r"index.json: names no weights")


PREFIXES = ["model.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("shapes_only", [False, True])
def test_names_of_a_wrapped_model_are_stripped(bert, copy, prefix, shapes_only):
    weights = load_file(copy / "model.safetensors")
    renamed = {f"{prefix}{name}": value for name, value in weights.items()}
    save_file(renamed, copy / "model.safetensors")
    ids = torch.tensor([[0, 5, 6, 2]])
    expected = AutoModel.from_pretrained(bert)(ids).last_hidden_state.mean(1)
    if shapes_only:
        with load_shapes_only():
            assert load(copy).blocks
        return
    answer = load(copy)(ids)
    assert torch.nn.functional.cosine_similarity(answer, expected).item() > 0.999999


def test_a_part_that_was_compiled_on_its_own_is_stripped(bert, copy):
    weights = load_file(copy / "model.safetensors")
    renamed = {name.replace("encoder.", "encoder._orig_mod."): v for name, v in weights.items()}
    save_file(renamed, copy / "model.safetensors")
    ids = torch.tensor([[0, 5, 6, 2]])
    assert torch.equal(load(copy)(ids), load(bert)(ids))


def test_settings_of_generation_are_read_beside_stripped_weights(tmp_path):
    config = T5Config(
        vocab_size=160,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config.eos_token_id = 7
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER())
    plain = load(tmp_path, "text_decoder").config["generation"]
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"module.{n}": v for n, v in weights.items()}, tmp_path / "model.safetensors")
    assert load(tmp_path, "text_decoder").config["generation"] == plain


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("net.", r"weights are missing .*all stored names start with 'net.': save them without it"),
        ("model.net.", r"all stored names start with 'model.'"),
    ],
)
def test_another_prefix_is_named(copy, prefix, message):
    weights = load_file(copy / "model.safetensors")
    save_file({f"{prefix}{n}": v for n, v in weights.items()}, copy / "model.safetensors")
    refuse(copy, message)


def test_weights_of_open_clip_are_checked_and_stripped_too(tiny, tmp_path):
    folder = shutil.copytree(tiny / "clip", tmp_path / "clip")
    path = folder / "open_clip_model.safetensors"
    whole = path.read_bytes()
    node = Node(kind="image_encoder", inputs={}, source=str(folder))
    weights = load_file(path)
    pixels = torch.rand(1, 3, 32, 32)
    expected = load_model(Node(kind="image_encoder", inputs={}, source=str(tiny / "clip")))(pixels)
    for prefix in PREFIXES:
        from mmcompress.models.families import open_clip

        open_clip._load_clip.cache_clear()
        save_file({f"{prefix}{n}": v for n, v in weights.items()}, path)
        assert torch.equal(load_model(node)(pixels)[0], expected[0])
    open_clip._load_clip.cache_clear()
    for content, message in ((POINTER, "git-lfs"), (whole[:-7], "cut short"), (b"", "empty")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"open_clip_model.safetensors: .*{message}"):
            load_model(node)
        with load_shapes_only(), pytest.raises(ModelError, match=message):
            load_model(node)
    save_file({n: v for n, v in weights.items() if "conv1" not in n}, path)
    for _ in range(2):
        with pytest.raises(ModelError, match="conv1"):
            load_model(node)
    with load_shapes_only(), pytest.raises(ModelError, match="conv1"):
        load_model(node)


def test_shapes_alone_give_the_model_that_the_weights_give(tiny):
    node = Node(kind="image_encoder", inputs={}, source=str(tiny / "clip"))
    for kind in ("image_encoder", "text_encoder"):
        node = Node(kind=kind, inputs={}, source=str(tiny / "clip"))
        whole = load_model(node)
        with load_shapes_only():
            shapes = load_model(node)
        assert shapes.config == whole.config and shapes.blocks == whole.blocks
        assert shapes.dims == whole.dims
        sizes = {name: value.shape for name, value in shapes.named_parameters()}
        assert sizes == {name: value.shape for name, value in whole.named_parameters()}


def test_numbers_that_are_not_finite_are_told(copy):
    weights = load_file(copy / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][3, 4] = float("nan")
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"output.dense.*holds numbers that are not finite"):
        load(copy)


def test_a_library_named_in_the_source_decides_which_config_is_read(tmp_path, tiny):
    """A folder of both libraries, as CLIP's are at the hub, loads by the one that is asked for."""
    CLIPModel(
        CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    ).save_pretrained(tmp_path)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(tmp_path)
    for path in (tiny / "clip").iterdir():
        shutil.copy(path, tmp_path)
    by_name = {
        source: load_model(Node(kind="image_encoder", inputs={}, source=source)).dims["embedding"]
        for source in (f"transformers:{tmp_path}", f"open_clip:{tmp_path}", str(tmp_path))
    }
    assert list(by_name.values()) == [16, 32, 32]
    with pytest.raises(ModelError, match=r"holds no open_clip_config.json: no model was saved"):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        (tmp_path / "a").mkdir()
        load_model(Node(kind="image_encoder", inputs={}, source=f"open_clip:{tmp_path / 'a'}"))


def test_a_vocabulary_alone_is_converted_as_transformers_does(copy):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "left", "of"]
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.txt").write_text("\n".join(words))
    text = load_tokenizer_json(LoadContext(kind="text_encoder", path=copy))
    expected = BertTokenizerFast(vocab=str(copy / "vocab.txt"))("cats left of a cat").input_ids
    from tokenizers import Tokenizer

    assert Tokenizer.from_str(text).encode("cats left of a cat").ids == expected
    (copy / "vocab.txt").write_bytes(POINTER)
    refuse(copy, r"vocab.txt: a pointer of git-lfs")
    (copy / "vocab.txt").unlink()
    refuse(copy, r"tokenizer.json is missing beside the weights; save the tokenizer there")


def test_a_config_that_fits_no_model_is_an_error_and_no_traceback(tmp_path):
    ViTModel(ViTConfig(**VISION)).save_pretrained(tmp_path)
    plain = (tmp_path / "config.json").read_text()
    for changes in ({"hidden_size": -4}, {"num_attention_heads": 0}, {"hidden_size": "wide"}):
        (tmp_path / "config.json").write_text(plain)
        rewrite_config(tmp_path, **changes)
        with pytest.raises(ModelError):
            load(tmp_path, "image_encoder")


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "model."])
def test_the_reference_of_a_proof_reads_a_wrapped_model_too(bert, copy, prefix):
    weights = load_file(copy / "model.safetensors")
    save_file({f"{prefix}{n}": v for n, v in weights.items()}, copy / "model.safetensors")
    expected = AutoModel.from_pretrained(bert).state_dict()
    config = BertConfig.from_pretrained(copy)
    actual = load_reference_model(AutoModel, copy, config=config).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_file_of_weights_that_the_config_names_is_refused(copy):
    rewrite_config(copy, transformers_weights="other.safetensors")
    refuse(copy, r"config.json: transformers_weights names a file of weights of its own")


class Listener(logging.Handler):
    """Keeps the messages that a logger lets through."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture()
def library_messages():
    """What transformers tells; its settings of verbosity and bars are as they were afterwards."""
    shows_bars = library_logging.is_progress_bar_enabled()
    verbosity = library_logging.get_verbosity()
    listener = Listener()
    library_logging.add_handler(listener)
    library_logging.enable_progress_bar()
    yield listener.messages
    library_logging.remove_handler(listener)
    library_logging.set_verbosity(verbosity)
    if not shows_bars:
        library_logging.disable_progress_bar()


def test_loading_is_quiet_and_the_callers_settings_are_back(bert, library_messages, capsys):
    logger = library_logging.get_logger("transformers.distributed.tensor_parallel")
    library_logging.set_verbosity_warning()
    load(bert)
    load_reference_model(AutoModel, bert, config=BertConfig.from_pretrained(bert))
    with quiet_loading():
        logger.warning("The following layers were not sharded: all of them")
        logger.error("what is wrong is heard")
        list(library_logging.tqdm(range(3), desc="Loading weights"))
    assert library_messages == ["what is wrong is heard"]
    assert capsys.readouterr().err == ""
    assert library_logging.get_verbosity() == library_logging.WARNING
    logger.warning("heard again")
    list(library_logging.tqdm(range(3), desc="own bar"))
    assert library_messages[1:] == ["heard again"]
    assert "own bar" in capsys.readouterr().err


def test_bars_that_the_caller_hides_stay_hidden(library_messages):
    assert not are_progress_bars_disabled()
    with quiet_loading():
        assert not library_logging.is_progress_bar_enabled()
    assert library_logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    disable_progress_bars()
    with quiet_loading():
        pass
    assert library_logging.is_progress_bar_enabled() and are_progress_bars_disabled()
    library_logging.disable_progress_bar()
    with quiet_loading():
        pass
    assert not library_logging.is_progress_bar_enabled()
    enable_progress_bars()


def test_quiet_loading_still_tells_weights_that_are_missing(copy):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refuse(copy, re.escape(name.removeprefix("bert.")))


@pytest.mark.parametrize("content", ["[1]", "null", "{}", '"text"'])
def test_a_tokenizer_file_without_a_tokenizer_is_told_with_the_cure(copy, content):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: holds no tokenizer.*save_pretrained"):
        load(copy)


@pytest.mark.parametrize(
    "name", ["generation_config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]
)
def test_a_link_to_a_missing_file_is_told(copy, name):
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(copy / "blobs" / "0123")
    refuse(copy, rf"{name}: a link to a file that is missing; copy or download")
