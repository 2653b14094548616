"""Models of transformers, from a local folder or a hub: safetensors only, and none of their code.

Every error names the source and says what to do. Errors of the libraries are told apart by their
classes, never by the words of their messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor

from mmcompress.errors import ModelError, shorten
from mmcompress.models.base import LoadContext
from mmcompress.models.checkpoint import (
    StoredTensor,
    check_config_files,
    check_tensors,
    find_weight_files,
    read_checkpoint,
    read_json_file,
)
from mmcompress.models.hub_files import (
    WEIGHT_FILES,
    HubModel,
    fetch_hub_folder,
    read_remote_tensors,
)
from mmcompress.models.quiet_loading import quiet_loading
from mmcompress.models.shapes import is_loading_shapes_only, make_shape_tensors

Family = TypeVar("Family")

POOLER = ("pooler.",)
"""Parts of the names of weights that may be missing: nothing here reads a pooler."""

WRAPPERS = ("module.", "_orig_mod.")
"""What torch puts before the names of weights of a wrapped model: DataParallel and `torch.compile`.
No library has such names itself."""

TRAINER_PREFIX = "model."
"""What trainers put before the names of weights. Some libraries do so, too."""

MAX_DETAIL_LETTERS = 300
"""Letters of a second line that an error message repeats at most."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that may say how pictures are prepared."""

PROCESSOR_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    StrictDataclassError,
)
"""What transformers raises for an image processor that is missing or damaged."""

MAX_NAMED_WEIGHTS = 4
"""Weights that an error message names at most, so that it stays readable."""

TOKENIZER_CONFIG = "tokenizer_config.json"
"""The file that tells transformers which class a tokenizer has."""


@contextmanager
def refuse_pickles(source: str) -> Iterator[None]:
    """Allow no unpickling while the block runs, whatever a library tries.

    Args:
        source: The source that is loaded, for the message.

    Raises:
        ModelError: A library called `torch.load`, and nothing was read.
    """

    def refuse_file(file: Any, *_: Any, **__: Any) -> None:
        raise ModelError(
            f"{source}: {file} is a pickle, a format that can run code; convert it to .safetensors"
        )

    torch_load = torch.load
    torch.load = refuse_file  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = torch_load


def describe_source(context: LoadContext) -> str:
    """Return a source as messages name it: the model at a hub, or the folder."""
    return str(context.hub_model or context.path or context.name)


def summarize_error(error: Exception) -> str:
    """Return the first line of an error's message, or its class when it has none.

    A line that ends in a colon says little without the next one.
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":") and lines[1:]:
        return f"{lines[0]} {lines[1].strip()[:MAX_DETAIL_LETTERS]}"
    return lines[0]


def get_model_folder(context: LoadContext) -> Path:
    """Return the folder of a model; what a hub has is fetched first.

    Raises:
        ModelError: The hub does not give it.
    """
    if context.path is not None:
        return context.path
    return fetch_hub_folder(HubModel(name=context.name))


def explain_load_error(context: LoadContext, error: Exception) -> ModelError:
    """Return the error to raise in place of one of transformers."""
    return ModelError(
        f"transformers can't load '{describe_source(context)}': {summarize_error(error)}"
    )


def load_config(context: LoadContext) -> Any:
    """Load the configuration of a model, as transformers has it.

    Raises:
        ModelError: It is missing or damaged, the hub does not give it, or it tells of weights that
            the tool can't use.
    """
    folder = get_model_folder(context)
    check_config_files(folder)
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library checks values with classes of its own
        raise explain_load_error(context, error) from error


def load_library_model(
    context: LoadContext,
    class_name: str,
    *,
    config: Any,
    unread: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Load a model of transformers with its weights, in float32 and evaluation mode.

    Args:
        context: Where the weights are.
        class_name: The class of transformers that loads them.
        config: The configuration of the model; its attention is set to `eager`, the one kind that
            can be traced and cut.
        unread: Parts of names of weights that may be missing, as nothing here reads them.
        **options: Further arguments of the class.

    Raises:
        ModelError: There is no safetensors file, the hub does not give it, or weights are missing
            or of another shape than the configuration says.
    """
    stored = read_stored_tensors(context)
    config._attn_implementation = "eager"
    names = list(stored)
    model, loading_info = _load_named_weights(
        context, class_name, stored=stored, renamed=strip_wrappers(names), config=config, **options
    )
    unusable = _list_unusable_weights(loading_info, unread=unread)
    if unusable and any(name.startswith(TRAINER_PREFIX) for name in strip_wrappers(names)):
        renamed = [name.removeprefix(TRAINER_PREFIX) for name in strip_wrappers(names)]
        model, loading_info = _load_named_weights(
            context, class_name, stored=stored, renamed=renamed, config=config, **options
        )
        if not _list_unusable_weights(loading_info, unread=unread):
            unusable = []
    if unusable:
        raise ModelError(_describe_unusable_weights(context, unusable, stored=names))
    return model.eval()


def read_stored_tensors(context: LoadContext) -> dict[str, StoredTensor]:
    """Return the stored tensors of a transformers model by name; no weights are read.

    Raises:
        ModelError: The weights are missing, damaged, quantized, or those of an adapter.
    """
    folder = get_model_folder(context)
    if context.hub_model is None or not is_loading_shapes_only():
        return read_checkpoint(folder, WEIGHT_FILES["transformers"])
    check_config_files(folder)
    tensors = read_remote_tensors(context.hub_model)
    check_tensors(context.hub_model, tensors)
    return tensors


def strip_wrappers(names: list[str]) -> list[str]:
    """Return names of weights without what torch puts before and into them."""
    stripped_names: list[str] = []
    for name in names:
        parts = name.split(".")
        while parts[1:] and f"{parts[0]}." in WRAPPERS:
            parts = parts[1:]
        # `torch.compile` of a part of a model stands inside the name
        stripped_names.append(".".join(part for part in parts if part != "_orig_mod"))
    return stripped_names


def load_reference_model(model_class: Any, folder: Path, *, config: Any) -> Any:
    """Load a model as the library does; names of a wrapped model are stripped first.

    Args:
        model_class: The class of transformers, or one that chooses by the configuration.
        folder: The folder of the model.
        config: Its configuration.
    """
    names: list[str] = []
    if any((folder / name).is_file() for name in WEIGHT_FILES["transformers"]):
        names = list(read_checkpoint(folder, WEIGHT_FILES["transformers"]))
    library_class = _find_class(model_class.__name__, config)
    renamed = strip_wrappers(names)
    is_own_prefix = f"{library_class.base_model_prefix}." == TRAINER_PREFIX
    if names and not is_own_prefix and all(name.startswith(TRAINER_PREFIX) for name in renamed):
        renamed = [name.removeprefix(TRAINER_PREFIX) for name in renamed]
    if renamed == names:
        with quiet_loading():
            return model_class.from_pretrained(folder, use_safetensors=True)
    weights: dict[str, Tensor] = {}
    for path in find_weight_files(folder, WEIGHT_FILES["transformers"]):
        weights |= load_file(path)
    named = {new_name: weights[old_name] for old_name, new_name in zip(names, renamed, strict=True)}
    with quiet_loading():
        model = library_class.from_pretrained(None, config=config, state_dict=named)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _load_named_weights(
    context: LoadContext,
    class_name: str,
    *,
    stored: Mapping[str, StoredTensor],
    renamed: list[str],
    config: Any,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a model of transformers whose weights go by other names than the stored ones.

    Returns:
        The model, and what the library tells of missing and mismatched weights.
    """
    folder = get_model_folder(context)
    weights: dict[str, Tensor] | None = None
    names = list(stored)
    if is_loading_shapes_only():
        weights = make_shape_tensors(stored)
    elif renamed != names:
        weights = {}
        for path in find_weight_files(folder, WEIGHT_FILES["transformers"]):
            weights |= load_file(path)
    if weights is not None:
        named_weights = weights
        weights = {
            new_name: named_weights[old_name]
            for old_name, new_name in zip(names, renamed, strict=True)
        }
    library_class = _find_class(class_name, config)
    try:
        # the caller tells the missing weights that matter
        with quiet_loading():
            model, loading_info = library_class.from_pretrained(
                # the library takes a folder or weights, not both
                folder if weights is None else None,
                config=config,
                state_dict=weights,
                dtype=torch.float32,
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
                # checked by the caller, where the message can name them
                ignore_mismatched_sizes=True,
            )
        if weights is not None and (folder / "generation_config.json").is_file():
            # with a folder, the library reads it itself
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a configuration that fits no model fails in many ways
        raise explain_load_error(context, error) from error
    return model, loading_info


def _find_class(class_name: str, config: Any) -> Any:
    """Return a class of transformers; one that chooses by the configuration is asked for it.

    Such a class takes a folder alone, and no weights.
    """
    library_class = getattr(transformers, class_name)
    mapping = getattr(library_class, "_model_mapping", None)
    if mapping is None or type(config) not in mapping:
        return library_class
    chosen_class = mapping[type(config)]
    return chosen_class[0] if isinstance(chosen_class, tuple) else chosen_class


def _list_unusable_weights(loading_info: dict[str, Any], *, unread: tuple[str, ...]) -> list[str]:
    """Return the weights that are read and were not loaded."""
    unusable_names: list[str] = []
    for name in loading_info["missing_keys"]:
        if not any(part in name for part in unread):
            unusable_names.append(name)
    for mismatch in loading_info.get("mismatched_keys", ()):
        unusable_names.append(str(mismatch[0]))
    return sorted(unusable_names)


def _describe_unusable_weights(
    context: LoadContext, unusable: list[str], *, stored: list[str]
) -> str:
    """Return the message about weights that were not loaded: which, and what is stored instead."""
    names = ", ".join(unusable[:MAX_NAMED_WEIGHTS])
    stored_names = ", ".join(shorten(name) for name in stored[:MAX_NAMED_WEIGHTS])
    hint = ""
    prefix = stored[0].partition(".")[0] + "."
    if all(name.startswith(prefix) for name in stored):
        hint = f"; all stored names start with '{shorten(prefix)}': save them without it"
    return (
        f"{describe_source(context)}: weights are missing or of another shape: {names}"
        f" ({len(unusable)} in all; stored are {stored_names}, ...){hint}. If config.json is of "
        "another model, that is why"
    )


def find_family(model_type: str, *, table: Mapping[str, Family], context: LoadContext) -> Family:
    """Return the row of a table of families.

    Args:
        model_type: The type that the configuration of transformers names.
        table: The rows by type.
        context: The source and the kind of the node, for the message.

    Raises:
        ModelError: The table has no such type; the message lists those that it has.
    """
    if model_type not in table:
        raise ModelError(
            f"{describe_source(context)}: a {context.kind} of type '{model_type}' is not supported"
            f" (known: {', '.join(sorted(table))})"
        )
    return table[model_type]


def load_image_processor(context: LoadContext) -> Any:
    """Load the image processor of a model, as transformers has it for Pillow.

    It stands in `processor_config.json` as `image_processor`, or in `preprocessor_config.json`. The
    library takes the former where both are there.

    Raises:
        ModelError: There is none, it is damaged, or the hub does not give it.
    """
    source = describe_source(context)
    folder = get_model_folder(context)
    has_own_file = (folder / PROCESSOR_FILES[0]).is_file()
    if not has_own_file and "image_processor" not in load_json(context, PROCESSOR_FILES[1]):
        raise _make_missing_processor_error(source)
    auto_processor = transformers.AutoImageProcessor
    try:
        return auto_processor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except PROCESSOR_ERRORS as error:
        raise ModelError(
            f"{source}: its image processor can't be loaded: {summarize_error(error)}"
        ) from error


def _make_missing_processor_error(source: str) -> ModelError:
    """Make the error about a model that does not say how pictures are prepared."""
    return ModelError(
        f"{source}: no {PROCESSOR_FILES[0]}, and no image_processor in {PROCESSOR_FILES[1]}:"
        " nothing says how pictures are resized and normalized. Copy the file from the model's"
        " page, or write it: AutoImageProcessor.from_pretrained(HUB_ID).save_pretrained(FOLDER)"
    )


def load_json(context: LoadContext, file_name: str) -> dict[str, Any]:
    """Load an optional JSON file beside the weights; it is empty when there is none.

    Raises:
        ModelError: The file is there and is no JSON, or the hub has it and does not give it.
    """
    path = get_model_folder(context) / file_name
    if not path.is_file():
        return {}
    values = read_json_file(path)
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a mapping, got {shorten(repr(values))}")
    return values
