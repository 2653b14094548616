"""What can be told of a checkpoint from its folder alone: no weights are read, and no torch is
needed.

The headers of safetensors files name every tensor with its shape. Files that are no weights, and
weights that this tool can't cut or train, are refused here with what to do about them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcompress.errors import ModelError, shorten

LFS_START = b"version https://git-lfs"
"""How a pointer of git-lfs begins, which stands in the place of a large file."""

LENGTH_BYTES = 8
"""Bytes at the start of a safetensors file that hold the length of its header."""

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads."""

FLOAT_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
"""Bits of the numbers that can be cut and trained, by the name of safetensors."""

INTEGER_BITS = {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8}
"""Bits of whole numbers and masks: positions, tables, and packed weights."""

QUANTIZED_PARTS = (
    ".qweight",
    ".qzeros",
    ".scb",
    ".absmax",
    ".quant_map",
    ".quant_state",
    ".weight_packed",
    ".weight_scale",
)
"""Parts of names, in small letters, that quantized layers alone have."""

QUANTIZED_KEYS = ("quantization_config", "compression_config")
"""Keys of `config.json` that describe how weights were quantized."""

QUANTIZED_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quant_strategy.json": "autoround",
}
"""Files beside quantized weights, with the method that writes them."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter of PEFT."""

ADAPTER_PARTS = (".lora_", ".base_layer.", ".modules_to_save.", ".ia3_")
"""Parts of names that models with an adapter inside have."""

LINKED_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Ends of the names of files that a library looks for."""

OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx")
"""Files that hold weights in other formats; those of Python can run code when they are read."""

MAX_NAMED_FILES = 6
"""Files that a message names at most."""

DEQUANTIZE = (
    "this tool cuts and trains float weights: name the model that it was made from, or save a"
    " dequantized copy (model.dequantize().save_pretrained(FOLDER))"
)
"""The cure of a quantized checkpoint."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    """The type of its numbers, as safetensors names it: `F32`, `BF16`, `I64`."""
    shape: tuple[int, ...]
    """Its sizes."""


def describe_start(path: Path) -> str:
    """Return what is wrong with a file by its first bytes; empty where they are no known fault.

    Raises:
        ModelError: The file can't be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_START))
    except OSError as error:
        raise ModelError(f"{path}: can't be read: {error.strerror or error}") from error
    if not start:
        return "the file is empty; copy or download it again"
    if start == LFS_START:
        return "a pointer of git-lfs, not the file itself; run 'git lfs pull' in its folder"
    if start.lstrip()[:1] == b"<":
        return "a web page, not the file itself; download it again"
    return ""


def read_json_file(path: Path) -> Any:
    """Read a JSON file of a model.

    Raises:
        ModelError: It can't be read or is no JSON; the message says what it is instead.
    """
    fault = describe_start(path)
    if fault:
        raise ModelError(f"{path}: {fault}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}; copy or download it again") from error


def read_tensor_names(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, and compare the length of the file with it.

    Raises:
        ModelError: The file is no whole safetensors file.
    """
    fault = describe_start(path)
    if fault:
        raise ModelError(f"{path}: {fault}")
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if header_bytes > MAX_HEADER_BYTES or file_bytes < LENGTH_BYTES:
            raise ModelError(
                f"{path}: no safetensors file in spite of its name; save it with safetensors"
            )
        data_start = LENGTH_BYTES + header_bytes
        text = file.read(header_bytes)
    if file_bytes < data_start:
        raise ModelError(_describe_length(path, file_bytes, expected_bytes=data_start))
    tensors, data_bytes = parse_header(text, path)
    if file_bytes != data_start + data_bytes:
        expected_bytes = data_start + data_bytes
        raise ModelError(_describe_length(path, file_bytes, expected_bytes=expected_bytes))
    return tensors


def _describe_length(path: Path, file_bytes: int, *, expected_bytes: int) -> str:
    """Return the message of a file that is shorter or longer than its header says."""
    fault = "cut short" if file_bytes < expected_bytes else "too long"
    return (
        f"{path}: {fault}: it has {file_bytes:,} bytes where its header tells of"
        f" {expected_bytes:,}; copy or download it again"
    )


def parse_header(text: bytes, path: Path) -> tuple[dict[str, StoredTensor], int]:
    """Parse the header of a safetensors file.

    Args:
        text: The header, as JSON.
        path: The file, for messages.

    Returns:
        Its tensors by name, and the bytes of their data.

    Raises:
        ModelError: The header is damaged.
    """
    header_error = ModelError(f"{path}: its header is damaged; copy or download it again")
    try:
        entries = json.loads(text)
        tensors: dict[str, StoredTensor] = {}
        data_bytes = 0
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            shape = tuple(int(size) for size in entry["shape"])
            start, end = entry["data_offsets"]
            tensor = StoredTensor(dtype=str(entry["dtype"]), shape=shape)
            bits = (FLOAT_BITS | INTEGER_BITS).get(tensor.dtype)
            if bits is not None and (end - start) * 8 != bits * math.prod(shape):
                raise header_error
            tensors[name] = tensor
            data_bytes = max(data_bytes, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise header_error from error
    return tensors, data_bytes


def find_weight_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the files of the weights of a folder.

    Args:
        folder: The folder.
        names: What the library looks for, in its order: files, or an index (`.json`) of several.

    Raises:
        ModelError: There is none, or the index names files that are missing.
    """
    names = tuple(names)
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix != ".json":
            return [path]
        index = read_json_file(path)
        try:
            files = [folder / file_name for file_name in sorted(set(index["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: names no weights (weight_map)") from error
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(
                f"{path}: names parts that are missing: {_join_names(missing)};"
                " copy or download all parts"
            )
        return files
    raise ModelError(_describe_missing_weights(folder, names))


def _describe_missing_weights(folder: Path, names: tuple[str, ...]) -> str:
    """Return the message of a folder without weights: what is there in their place, and a cure."""
    other_files = sorted(file.name for file in folder.glob("*.safetensors") if file.is_file())
    if other_files:
        return (
            f"{folder}: no {names[0]}, only {_join_names(other_files)};"
            f" rename the one that holds the model to {names[0]}"
        )
    file_names: list[str] = []
    for pattern in OTHER_FORMATS:
        file_names += [file.name for file in folder.glob(pattern)]
    if not file_names:
        return f"{folder}: no .safetensors file; the folder holds no weights"
    return (
        f"{folder}: no .safetensors file (only {_join_names(sorted(file_names))}: formats that can"
        " run code, or of other tools, are not loaded). Convert it once, with save_pretrained of"
        " its library"
    )


def _join_names(names: list[str]) -> str:
    """Return names as a list with commas; a long one is cut."""
    shown_names = ", ".join(names[:MAX_NAMED_FILES])
    return (
        f"{shown_names} and {len(names) - MAX_NAMED_FILES} more"
        if names[MAX_NAMED_FILES:]
        else shown_names
    )


def check_config_files(folder: Path) -> None:
    """Raise `ModelError` when the files beside the weights say that the tool can't use them.

    That is so of an adapter, which is no whole model, of quantized weights, and of a model in a
    folder of its own.
    """
    _refuse_dead_links(folder)
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            raise ModelError(_describe_adapter(folder, name))
    for name, method in QUANTIZED_FILES.items():
        if (folder / name).exists():
            raise ModelError(f"{folder}: quantized by {method} ({name}); {DEQUANTIZE}")
    _check_first_module(folder)
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json_file(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a mapping")
    if config.get("transformers_weights"):
        raise ModelError(
            f"{path}: transformers_weights names a file of weights of its own, which is not"
            " followed; load the model with transformers and save it again"
        )
    quantization = _find_quantization(config)
    if quantization:
        method, key = quantization
        raise ModelError(f"{folder}: quantized by {method} (config.json: {key}); {DEQUANTIZE}")


def _refuse_dead_links(folder: Path) -> None:
    """Raise `ModelError` when a file of the model is a link to nothing.

    It would count as absent, and the library's default would stand in its place.
    """
    for path in sorted(folder.glob("*")):
        is_dead = path.is_symlink() and not os.path.exists(path)
        if is_dead and path.suffix in LINKED_SUFFIXES:
            raise ModelError(
                f"{path}: a link to a file that is missing; copy or download the model again"
            )


def _check_first_module(folder: Path) -> None:
    """Raise `ModelError` when sentence-transformers keeps the model in a folder of its own.

    Its versions before 2 did so with every model, as `0_Transformer`.
    """
    path = folder / "modules.json"
    modules = read_json_file(path) if path.is_file() else []
    if not isinstance(modules, list) or not modules or not isinstance(modules[0], dict):
        return
    first_folder = str(modules[0].get("path") or "")
    if not first_folder:
        return
    kind = str(modules[0].get("type", "")).rpartition(".")[2]
    if kind == "Transformer":
        cure = (
            "it is of an old version of sentence-transformers; save it anew once:"
            f" SentenceTransformer('{folder}').save_pretrained(NEW_FOLDER)"
        )
    else:
        cure = f"give the model itself as the source: {folder / first_folder}"
    raise ModelError(f"{path}: its first module '{first_folder}' is a folder of its own; {cure}")


def _describe_adapter(folder: Path, name: str) -> str:
    """Return the message of an adapter; it names the model that the adapter belongs to."""
    base = "BASE"
    config_file = folder / "adapter_config.json"
    if config_file.is_file():
        config = read_json_file(config_file)
        if isinstance(config, dict):
            base = str(config.get("base_model_name_or_path") or base)
    return (
        f"{folder}: holds an adapter of PEFT ({name}), not a whole model; merge it once:"
        f" PeftModel.from_pretrained(AutoModel.from_pretrained('{shorten(base)}'), '{folder}')"
        ".merge_and_unload().save_pretrained(NEW_FOLDER)"
    )


def _find_quantization(config: Mapping[str, Any], path: str = "") -> tuple[str, str] | None:
    """Return how a configuration says that its weights are quantized, and by which key.

    Composite models say it of a part, too (`text_config`).
    """
    for key, value in config.items():
        key_path = f"{path}{key}"
        if key in QUANTIZED_KEYS and value:
            return _name_method(value), key_path
        if isinstance(value, dict):
            quantization = _find_quantization(value, f"{key_path}.")
            if quantization:
                return quantization
    return None


def _name_method(settings: Any) -> str:
    """Return the name of a method of quantization, as its settings give it."""
    if not isinstance(settings, dict):
        return shorten(settings)
    method = settings.get("quant_method") or settings.get("quant_algo") or settings.get("format")
    if method:
        return shorten(method)
    # bitsandbytes did not name itself at first
    is_bitsandbytes = any(key.startswith(("load_in_", "bnb_", "llm_int8")) for key in settings)
    return "bitsandbytes" if is_bitsandbytes else "an unnamed method"


def check_tensors(place: object, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise `ModelError` when tensors are those of quantized layers, or of an adapter.

    Args:
        place: The folder or the model, for messages.
        tensors: The stored tensors by name.
    """
    if not tensors:
        raise ModelError(f"{place}: the weights are empty; copy or download them again")
    for name, tensor in tensors.items():
        small_name = name.lower()
        if any(part in small_name for part in ADAPTER_PARTS):
            raise ModelError(
                f"{place}: '{shorten(name)}' belongs to an adapter of PEFT; merge it into the model"
                " (merge_and_unload) and save that"
            )
        is_packed = small_name.endswith("weight") and tensor.dtype in INTEGER_BITS
        is_marked = any(part in small_name for part in QUANTIZED_PARTS)
        is_known = tensor.dtype in FLOAT_BITS or tensor.dtype in INTEGER_BITS
        if is_packed or is_marked or not (is_known or tensor.dtype == "BOOL"):
            raise ModelError(
                f"{place}: '{shorten(name)}' is quantized ({_name_type(tensor.dtype)});"
                f" {DEQUANTIZE}"
            )


def _name_type(dtype: str) -> str:
    """Return a type of numbers as people call it."""
    return f"{dtype}, fp8" if dtype.startswith("F8") else dtype


def read_checkpoint(folder: Path, names: Iterable[str]) -> dict[str, StoredTensor]:
    """Return what the weights of a folder hold, after everything about them was checked.

    Args:
        folder: The folder.
        names: What the library looks for, in its order.

    Raises:
        ModelError: The weights are missing, damaged, quantized, or those of an adapter.
    """
    check_config_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in find_weight_files(folder, names):
        tensors |= read_tensor_names(path)
    check_tensors(folder, tensors)
    return tensors
