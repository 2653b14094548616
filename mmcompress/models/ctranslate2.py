"""Whisper weights stored by CTranslate2 -> a transformers folder with safetensors. Its file holds tensors, no code.

Format: https://github.com/OpenNMT/CTranslate2, `python/ctranslate2/specs/model_spec.py` (binary version 6).
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcompress.errors import ModelError

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}


NAMES = {"gamma": "weight", "beta": "bias"}


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a CTranslate2 `model.bin`. Raises `ModelError` for another format or a cut-off file."""
    data, at, found = path.read_bytes(), 0, {}

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        nonlocal at
        (size,) = take("H")
        at += size
        return data[at - size : at - 1].decode()

    try:
        (version,) = take("I")
        spec = text()
        if version < 6 or spec != "WhisperSpec":
            raise ModelError(
                f"{path}: not a CTranslate2 Whisper model of version 6 ({spec or '?'}, version {version})"
            )
        take("I")
        (count,) = take("I")
        for _ in range(count):
            name = text()
            (rank,) = take("B")
            shape = take(f"{rank}I")
            kind, size = take("BI")
            if kind not in TYPES or at + size > len(data):
                raise ModelError(f"{path}: damaged at '{name}'")
            found[name] = np.frombuffer(
                data, TYPES[kind], size // np.dtype(TYPES[kind]).itemsize, at
            ).reshape(shape)
            at += size
    except (struct.error, UnicodeDecodeError) as e:
        raise ModelError(f"{path}: damaged: {e}") from e
    return found


def map_state(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The state of transformers' `WhisperForConditionalGeneration`, as far as its embeddings are not tied."""
    out: dict[str, torch.Tensor] = {}

    def put(name: str, value: np.ndarray) -> None:
        out[f"model.{name}"] = torch.from_numpy(np.array(value, np.float32))

    def attention(at: str, to: str, crossing: bool) -> None:
        """q, k, v are fused (k, v for a cross-attention); the bias of k is zero and left out."""
        fused = (
            (("linear_0", "q"), ("linear_1", "kv"), ("linear_2", "o"))
            if crossing
            else (("linear_0", "qkv"), ("linear_1", "o"))
        )
        for layer, letters in fused:
            weight, bias = (
                np.split(tensors[f"{at}/{layer}/{p}"], len(letters)) for p in ("weight", "bias")
            )
            for letter, w, b in zip(letters, weight, bias, strict=True):
                name = f"{to}.{'out' if letter == 'o' else letter}_proj"
                put(f"{name}.weight", w)
                if letter != "k":
                    put(f"{name}.bias", b)
                elif np.abs(b).max() > 0:
                    raise ModelError(f"{at}: a key bias that transformers has no place for")

    for side in ("encoder", "decoder"):
        put(f"{side}.embed_positions.weight", tensors[f"{side}/position_encodings/encodings"])
        for p, q in NAMES.items():
            put(f"{side}.layer_norm.{q}", tensors[f"{side}/layer_norm/{p}"])
        layers = len(
            {
                n.split("/")[1]
                for n in tensors
                if n.startswith(f"{side}/layer_") and n.count("/") > 2
            }
        )
        for i in range(layers):
            at, to = f"{side}/layer_{i}", f"{side}.layers.{i}"
            attention(f"{at}/self_attention", f"{to}.self_attn", False)
            if side == "decoder":
                attention(f"{at}/attention", f"{to}.encoder_attn", True)
            for part, name in PARTS.items():
                for p in ("gamma", "beta") if "norm" in part else ("weight", "bias"):
                    if f"{at}/{part}/{p}" in tensors:
                        put(f"{to}.{name}.{NAMES.get(p, p)}", tensors[f"{at}/{part}/{p}"])
    for name in ("conv1", "conv2"):
        for p in ("weight", "bias"):
            put(f"encoder.{name}.{p}", tensors[f"encoder/{name}/{p}"])
    put("decoder.embed_tokens.weight", tensors["decoder/embeddings/weight"])
    return out


def convert_to_transformers(source: Path, target: Path) -> Path:
    """Write a transformers folder from a CTranslate2 one (model.bin, config.json, tokenizer.json), whole or not at all.

    Raises `ModelError` when a file is missing or of another format.
    """
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, WhisperConfig

    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise ModelError(f"{source}: {name} is missing")
    tensors = read_ctranslate2(source / "model.bin")
    weights = map_state(tensors)
    given = json.loads((source / "config.json").read_text())
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    width, mels = weights["model.encoder.conv1.weight"].shape[:2]
    layers = lambda side: (
        1 + max(int(n.split(".")[3]) for n in weights if n.startswith(f"model.{side}.layers."))
    )
    special = {
        "bos_token_id": end,
        "pad_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": start,
    }
    config = WhisperConfig(
        vocab_size=len(weights["model.decoder.embed_tokens.weight"]),
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        decoder_attention_heads=int(tensors["decoder/num_heads"]),
        encoder_ffn_dim=len(weights["model.encoder.layers.0.fc1.weight"]),
        decoder_ffn_dim=len(weights["model.decoder.layers.0.fc1.weight"]),
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **special,
    )
    generation = GenerationConfig(
        **special,
        suppress_tokens=given["suppress_ids"],
        begin_suppress_tokens=given["suppress_ids_begin"],
        no_timestamps_token_id=ids("<|notimestamps|>"),
    )
    new = target.with_name(target.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    config.save_pretrained(new)
    generation.save_pretrained(new)
    shutil.copy(source / "tokenizer.json", new / "tokenizer.json")
    shutil.rmtree(target, ignore_errors=True)
    new.replace(target)
    return target
