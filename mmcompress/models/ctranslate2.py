"""Whisper weights as CTranslate2 stores them, converted to a transformers folder with safetensors.

The file holds tensors and no code. Its format (binary version 6) is written down in
https://github.com/OpenNMT/CTranslate2, `python/ctranslate2/specs/model_spec.py`.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from mmcompress.errors import ModelError
from mmcompress.runtime.cache import CACHE_CURE
from mmcompress.storage import replace_folder

OLDEST_VERSION = 6
"""The binary version from which on the file is laid out as it is read here."""

MODEL_SPEC = "WhisperSpec"
"""The name of the one architecture that is converted, as the file states it."""

TENSOR_TYPES: dict[int, type[np.generic]] = {
    0: np.float32,
    1: np.int8,
    2: np.int16,
    3: np.int32,
    4: np.float16,
}
"""numpy types by the number that stands in the file."""

REQUIRED_FILES = ("model.bin", "config.json", "tokenizer.json")
"""Files of a CTranslate2 folder that a conversion reads."""

SELF_ATTENTION_LAYERS = {"linear_0": ("q", "k", "v"), "linear_1": ("out",)}
"""Projections of transformers that a fused linear layer of a self-attention holds, in its order."""

CROSS_ATTENTION_LAYERS = {"linear_0": ("q",), "linear_1": ("k", "v"), "linear_2": ("out",)}
"""The same of a cross-attention, where queries come from another sequence."""

LAYER_MODULES = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
"""The other modules of a layer: names of CTranslate2, then of transformers."""

NORM_PARAMETERS = {"gamma": "weight", "beta": "bias"}
"""Parameters of a layer norm: names of CTranslate2, then of transformers."""

LINEAR_PARAMETERS = {"weight": "weight", "bias": "bias"}
"""Parameters of a linear layer or a convolution, named alike in both."""


MULTILINGUAL_VOCABULARY = 51_865
"""Tokens from which on a Whisper knows several languages; CTranslate2 tells it by this number."""

TASKS = ("transcribe", "translate")
"""What a Whisper of several languages does, by the names of its tokens."""


class _BinaryReader:
    """Read little-endian values from the bytes of a file, one after another."""

    def __init__(self, data: bytes):
        self.data = data
        self.position = 0

    def read_values(self, value_types: str) -> tuple[Any, ...]:
        """Return the next values, given their types in the letters of `struct`."""
        values = struct.unpack_from("<" + value_types, self.data, self.position)
        self.position += struct.calcsize("<" + value_types)
        return values

    def read_text(self) -> str:
        """Return the next text: its length with the zero at its end, then its bytes."""
        (length,) = self.read_values("H")
        start = self.position
        self.position += length
        return self.data[start : self.position - 1].decode()

    def read_tensor(self) -> np.ndarray:
        """Return the next tensor: rank, sizes, type and bytes. Raises `ValueError` if damaged."""
        (rank,) = self.read_values("B")
        shape = self.read_values(f"{rank}I")
        type_number, byte_count = self.read_values("BI")
        if type_number not in TENSOR_TYPES or self.position + byte_count > len(self.data):
            raise ValueError("unknown type, or cut off")
        value_type = np.dtype(TENSOR_TYPES[type_number])
        value_count = byte_count // value_type.itemsize
        values = np.frombuffer(self.data, value_type, count=value_count, offset=self.position)
        self.position += byte_count
        return values.reshape(shape)


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a CTranslate2 `model.bin`, by name.

    Raises:
        ModelError: The file has another format, or is cut off.
    """
    reader = _BinaryReader(path.read_bytes())
    tensors: dict[str, np.ndarray] = {}
    try:
        (version,) = reader.read_values("I")
        spec_name = reader.read_text()
        if version < OLDEST_VERSION or spec_name != MODEL_SPEC:
            raise ModelError(
                f"{path}: not a CTranslate2 Whisper model of version {OLDEST_VERSION}"
                f" ({spec_name or '?'}, version {version})"
            )
        reader.read_values("I")  # the revision of the architecture: nothing here depends on it
        (tensor_count,) = reader.read_values("I")
        for _ in range(tensor_count):
            name = reader.read_text()
            try:
                tensors[name] = reader.read_tensor()
            except ValueError as error:
                raise ModelError(f"{path}: damaged at '{name}'") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: damaged: {error}") from error
    return tensors


def map_whisper_state(tensors: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Rename tensors of CTranslate2 to the state of `WhisperForConditionalGeneration`.

    The output projection is not in it: transformers ties it to the token embeddings.

    Args:
        tensors: Every tensor of a `model.bin`, by name.

    Returns:
        float32 tensors by their names in transformers.

    Raises:
        ModelError: A key projection has a bias, which transformers has no place for.
    """
    arrays: dict[str, np.ndarray] = {}
    for side in ("encoder", "decoder"):
        arrays[f"{side}.embed_positions.weight"] = tensors[f"{side}/position_encodings/encodings"]
        for source_name, target_name in NORM_PARAMETERS.items():
            arrays[f"{side}.layer_norm.{target_name}"] = tensors[f"{side}/layer_norm/{source_name}"]
        for i in range(_count_stored_layers(tensors, side)):
            arrays |= _map_layer(tensors, side, index=i)
    for convolution in ("conv1", "conv2"):
        for parameter in ("weight", "bias"):
            arrays[f"encoder.{convolution}.{parameter}"] = tensors[
                f"encoder/{convolution}/{parameter}"
            ]
    arrays["decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    state: dict[str, Tensor] = {}
    for name, array in arrays.items():
        state[f"model.{name}"] = torch.from_numpy(np.array(array, np.float32))
    return state


def _count_stored_layers(tensors: dict[str, np.ndarray], side: str) -> int:
    """Return how many layers the encoder or decoder has."""
    layer_names: set[str] = set()
    for name in tensors:
        # `encoder/layer_norm/gamma` is no layer: those have a module and a parameter below them
        if name.startswith(f"{side}/layer_") and name.count("/") > 2:
            layer_names.add(name.split("/")[1])
    return len(layer_names)


def _map_layer(tensors: dict[str, np.ndarray], side: str, *, index: int) -> dict[str, np.ndarray]:
    """Return the tensors of one layer by their names in transformers."""
    source = f"{side}/layer_{index}"
    target = f"{side}.layers.{index}"
    arrays = _split_projections(
        tensors,
        f"{source}/self_attention",
        target=f"{target}.self_attn",
        layers=SELF_ATTENTION_LAYERS,
    )
    if side == "decoder":
        arrays |= _split_projections(
            tensors,
            f"{source}/attention",
            target=f"{target}.encoder_attn",
            layers=CROSS_ATTENTION_LAYERS,
        )
    for source_module, target_module in LAYER_MODULES.items():
        parameters = NORM_PARAMETERS if "norm" in source_module else LINEAR_PARAMETERS
        for source_parameter, target_parameter in parameters.items():
            source_name = f"{source}/{source_module}/{source_parameter}"
            if source_name in tensors:
                arrays[f"{target}.{target_module}.{target_parameter}"] = tensors[source_name]
    return arrays


def _split_projections(
    tensors: dict[str, np.ndarray],
    source: str,
    *,
    target: str,
    layers: dict[str, tuple[str, ...]],
) -> dict[str, np.ndarray]:
    """Split the fused linear layers of an attention into projections of transformers."""
    arrays: dict[str, np.ndarray] = {}
    for layer, projections in layers.items():
        weights = np.split(tensors[f"{source}/{layer}/weight"], len(projections))
        biases = np.split(tensors[f"{source}/{layer}/bias"], len(projections))
        for projection, weight, bias in zip(projections, weights, biases, strict=True):
            name = f"{target}.{projection}_proj"
            arrays[f"{name}.weight"] = weight
            # Whisper's keys have no bias; a fused layer stores zeros for it
            if projection != "k":
                arrays[f"{name}.bias"] = bias
            elif np.abs(bias).max() > 0:
                raise ModelError(f"{source}: a key bias that transformers has no place for")
    return arrays


def convert_to_transformers(source: Path, target: Path) -> Path:
    """Write a transformers folder from a CTranslate2 one, whole or not at all.

    Args:
        source: A folder with `model.bin`, `config.json` and `tokenizer.json`.
        target: The folder to write; what it held before is replaced.

    Returns:
        `target`.

    Raises:
        ModelError: A file is missing, damaged or of another format.
    """
    for file_name in REQUIRED_FILES:
        if not (source / file_name).is_file():
            raise ModelError(f"{source}: {file_name} is missing")
    tensors = read_ctranslate2(source / "model.bin")
    weights = map_whisper_state(tensors)
    stored_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    end_id = tokenizer.token_to_id("<|endoftext|>")
    special_ids: dict[str, Any] = {
        "bos_token_id": end_id,
        "pad_token_id": end_id,
        "eos_token_id": end_id,
        "decoder_start_token_id": tokenizer.token_to_id("<|startoftranscript|>"),
    }
    width, mel_bins = weights["model.encoder.conv1.weight"].shape[:2]
    config = WhisperConfig(
        vocab_size=len(weights["model.decoder.embed_tokens.weight"]),
        num_mel_bins=mel_bins,
        d_model=width,
        encoder_layers=_count_layers(weights, "encoder"),
        decoder_layers=_count_layers(weights, "decoder"),
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        decoder_attention_heads=int(tensors["decoder/num_heads"]),
        encoder_ffn_dim=len(weights["model.encoder.layers.0.fc1.weight"]),
        decoder_ffn_dim=len(weights["model.decoder.layers.0.fc1.weight"]),
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **special_ids,
    )
    generation = GenerationConfig(
        **special_ids,
        suppress_tokens=stored_config["suppress_ids"],
        begin_suppress_tokens=stored_config["suppress_ids_begin"],
        no_timestamps_token_id=tokenizer.token_to_id("<|notimestamps|>"),
        **describe_languages(stored_config, tokenizer, vocabulary=config.vocab_size),
    )
    try:
        with replace_folder(target) as unfinished:
            save_file(weights, unfinished / "model.safetensors", {"format": "pt"})
            config.save_pretrained(unfinished)
            generation.save_pretrained(unfinished)
            shutil.copy(source / "tokenizer.json", unfinished / "tokenizer.json")
    except OSError as error:
        raise ModelError(
            f"{target}: the converted weights can't be written: {error}; {CACHE_CURE}"
        ) from error
    return target


def describe_languages(
    stored_config: dict[str, Any], tokenizer: Tokenizer, *, vocabulary: int
) -> dict[str, Any]:
    """Describe languages and tasks as the generation configuration of transformers does.

    Args:
        stored_config: `config.json` of the CTranslate2 folder.
        tokenizer: Its tokenizer.
        vocabulary: Tokens that the model knows.

    Returns:
        Keys of the generation configuration.
    """
    if vocabulary < MULTILINGUAL_VOCABULARY:
        return {"is_multilingual": False}
    languages: dict[str, int] = {}
    for token in stored_config.get("lang_ids") or ():
        name = tokenizer.id_to_token(token)
        if name is not None:
            languages[name] = int(token)
    if not languages:
        for code in LANGUAGES:
            token = tokenizer.token_to_id(f"<|{code}|>")
            if token is not None:
                languages[f"<|{code}|>"] = token
    tasks = {name: tokenizer.token_to_id(f"<|{name}|>") for name in TASKS}
    return {"is_multilingual": True, "lang_to_id": languages, "task_to_id": tasks}


def _count_layers(weights: dict[str, Tensor], side: str) -> int:
    """Return how many layers of the encoder or decoder a state has."""
    prefix = f"model.{side}.layers."
    indices = [int(name.split(".")[3]) for name in weights if name.startswith(prefix)]
    return 1 + max(indices)
