"""The tokenizer of a checkpoint as transformers uses it, for a device without transformers.

`AutoTokenizer` decides: it may lower-case, add tokens or start texts otherwise than the file
`tokenizer.json` alone says. What it holds is kept as JSON of the library `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, normalizers
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext, Model
from mmcompress.models.checkpoint import describe_start, read_json_file
from mmcompress.models.hub import get_model_folder, load_json, summarize_error
from mmcompress.runtime.text import parse_tokenizer

VOCABULARY_FILES = (
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""Vocabularies of tokenizers of older kinds, which transformers converts to `tokenizer.json`."""

MAX_CONTEXT_LENGTH = 1_000_000
"""Tokens; where a tokenizer says more, it says nothing: transformers then writes 1e30."""

MAX_NAMED_TOKENS = 4
"""Tokens that an error message names at most, so that it stays readable."""

SAVE_CURE = "AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
"""How to save a tokenizer beside the weights."""


@dataclass(frozen=True, kw_only=True)
class LoadedTokenizer:
    """A tokenizer, and how its library pads, cuts and cleans texts with it."""

    json: str
    """The tokenizer as JSON of the library `tokenizers`, without padding and truncation."""
    pad: int | None = None
    """The id that fills up a text; None where the tokenizer names none."""
    eos: int | None = None
    """The id at the end of every text; None where nothing ends a text."""
    max_length: int = 0
    """Tokens of the longest text; 0 where the tokenizer names no limit."""
    pad_side: str = "right"
    """`right` or `left`: where a text is filled up."""
    truncation_side: str = "right"
    """`right` or `left`: where a long text is cut."""
    clean: str = ""
    """A cleaning of `mmcompress.runtime.clean_text`, ahead of the tokenizer; empty for none."""
    replaced_ids: tuple[tuple[int, int], ...] = ()
    """Pairs of ids: the model is given the second one in the place of the first one."""

    def list_settings(self) -> dict[str, Any]:
        """Return the settings of the manifest that differ from a plain tokenizer's."""
        settings: dict[str, Any] = {}
        if self.truncation_side != "right":
            settings["truncation_side"] = self.truncation_side
        if self.clean:
            settings["clean"] = self.clean
        if self.replaced_ids:
            settings["replaced_ids"] = [list(pair) for pair in self.replaced_ids]
        return settings


def load_tokenizer_json(context: LoadContext) -> str:
    """Load the tokenizer of a checkpoint as JSON; see `load_tokenizer`."""
    return load_tokenizer(context).json


def load_tokenizer(context: LoadContext) -> LoadedTokenizer:
    """Load the tokenizer of a checkpoint: the one that `AutoTokenizer` gives.

    A folder with `tokenizer.json` alone says nothing of the class of its tokenizer. The file is
    then used as it is.

    Raises:
        ModelError: There is no tokenizer, it is damaged, or transformers can't convert it.
    """
    file_config = load_json(context, "tokenizer_config.json")
    tokenizer_file = _find_tokenizer_file(context)
    if tokenizer_file is not None and not file_config:
        loaded_tokenizer = describe_tokenizer(_open_bare_file(tokenizer_file))
        if _is_siglip(context):
            return replace(loaded_tokenizer, json=lower_case_first(loaded_tokenizer.json))
        return loaded_tokenizer
    location = str(get_model_folder(context))
    auto_tokenizer = transformers.AutoTokenizer
    tokenizer: Any
    try:
        tokenizer = auto_tokenizer.from_pretrained(location, trust_remote_code=False)
    except Exception as error:  # converters raise what they like
        tokenizer = _open_siglip_file(file_config, tokenizer_file)
        if tokenizer is None:
            raise _explain_failure(location, context, error=error) from error
    if getattr(tokenizer, "split_special_tokens", False):
        raise ModelError(f"{location}: tokenizer_config.json: split_special_tokens is not followed")
    clean = ""
    if file_config.get("tokenizer_class", "").removesuffix("Fast") == "SiglipTokenizer":
        clean = "siglip" if file_config.get("do_lower_case", True) else "siglip_cased"
        if tokenizer_file is not None:
            tokenizer = _open_siglip_file(file_config, tokenizer_file)
    try:
        return replace(describe_tokenizer(tokenizer), clean=clean)
    except Exception as error:  # converters raise what they like
        raise _explain_failure(location, context, error=error) from error


def describe_tokenizer(tokenizer: Any) -> LoadedTokenizer:
    """Describe a tokenizer of transformers; one without a fast form is converted.

    Raises:
        Exception: Transformers can't convert it; the classes of these errors differ.
    """
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
    else:
        backend = convert_slow_tokenizer(tokenizer)
    own_tokenizer = parse_tokenizer(backend.to_str())
    max_length = int(min(tokenizer.model_max_length, MAX_CONTEXT_LENGTH))
    return LoadedTokenizer(
        json=str(own_tokenizer.to_str()),
        pad=tokenizer.pad_token_id,
        eos=find_end_token(own_tokenizer, tokenizer.eos_token_id),
        max_length=0 if max_length == MAX_CONTEXT_LENGTH else max_length,
        pad_side=str(tokenizer.padding_side),
        truncation_side=str(tokenizer.truncation_side),
    )


def find_end_token(tokenizer: Tokenizer, named_eos: int | None) -> int | None:
    """Find the id that stands at the end of every text.

    Args:
        tokenizer: The tokenizer.
        named_eos: The end token that its settings name, for one that adds none to a text.
    """
    ids = tokenizer.encode("").ids
    return ids[-1] if ids else named_eos


def lower_case_first(tokenizer_json: str) -> str:
    """Return a tokenizer that turns texts into small letters ahead of everything else."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    steps = [normalizers.Lowercase()]
    if tokenizer.normalizer is not None:
        steps.append(tokenizer.normalizer)
    tokenizer.normalizer = normalizers.Sequence(steps)
    return str(tokenizer.to_str())


def check_vocabulary(model: Model, source: str) -> None:
    """Check that a model has an embedding for every token of its tokenizer.

    Raises:
        ModelError: A token's id lies beyond the embeddings; the message names the tokens.
    """
    if model.tokenizer_json is None or not model.vocabulary:
        return
    vocabulary = Tokenizer.from_str(model.tokenizer_json).get_vocab(with_added_tokens=True)
    stray_tokens = {
        token: index for token, index in vocabulary.items() if index >= model.vocabulary
    }
    if not stray_tokens:
        return
    first_tokens = sorted(stray_tokens, key=stray_tokens.__getitem__)[:MAX_NAMED_TOKENS]
    names = ", ".join(f"'{token}' ({stray_tokens[token]})" for token in first_tokens)
    raise ModelError(
        f"{source}: {len(stray_tokens)} of the tokenizer's tokens lie beyond the {model.vocabulary}"
        f" embeddings of the model: {names}. Take them out of the tokenizer, or enlarge the model"
        " (model.resize_token_embeddings(len(tokenizer))), train it, and save both"
    )


def _find_tokenizer_file(context: LoadContext) -> Path | None:
    """Return `tokenizer.json` of a model; None where it has a vocabulary of an older kind.

    Raises:
        ModelError: A folder has neither, or the file is no JSON.
    """
    folder = get_model_folder(context)
    path = folder / "tokenizer.json"
    if path.is_file():
        read_json_file(path)
        return path
    for name in _list_vocabularies(context):
        fault = describe_start(folder / name)
        if fault:
            raise ModelError(f"{folder / name}: {fault}")
    if not _list_vocabularies(context):
        raise ModelError(
            f"{folder}: tokenizer.json is missing beside the weights; save the tokenizer"
            f" there ({SAVE_CURE})"
        )
    return None


def _open_bare_file(path: Path) -> Any:
    """Open a `tokenizer.json` alone.

    It pads with the token that the file pads with, if the vocabulary has it. The library would add
    a token that it has not.

    Raises:
        ModelError: The file holds no tokenizer.
    """
    tokenizer_json = path.read_text(encoding="utf-8")
    try:
        own_tokenizer = parse_tokenizer(tokenizer_json)
    except Exception as error:  # the library has no error of its own
        raise ModelError(
            f"{path}: holds no tokenizer: {error}; save it there again ({SAVE_CURE})"
        ) from error
    padding = json.loads(tokenizer_json).get("padding") or {}
    options = {}
    if own_tokenizer.token_to_id(str(padding.get("pad_token", ""))) is not None:
        options["pad_token"] = padding["pad_token"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own_tokenizer, **options)


def _list_vocabularies(context: LoadContext) -> list[str]:
    """Return the names of vocabularies of older kinds of a model."""
    folder = get_model_folder(context)
    return [name for name in VOCABULARY_FILES if (folder / name).is_file()]


def _is_siglip(context: LoadContext) -> bool:
    """Tell whether a folder holds a SigLIP of either version, which reads small letters only."""
    return str(load_json(context, "config.json").get("model_type", "")).startswith("siglip")


def _open_siglip_file(file_config: Mapping[str, Any], tokenizer_file: Path | None) -> Any | None:
    """Open SigLIP's `tokenizer.json`, which its own class can't read without sentencepiece."""
    class_name = str(file_config.get("tokenizer_class", "")).removesuffix("Fast")
    if tokenizer_file is None or class_name != "SiglipTokenizer":
        return None
    return transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_file.parent)


def _explain_failure(location: str, context: LoadContext, *, error: Exception) -> ModelError:
    """Return the error for a tokenizer that transformers can't load or convert."""
    vocabularies = ", ".join(_list_vocabularies(context))
    reason = summarize_error(error)
    if vocabularies and not (Path(location) / "tokenizer.json").is_file():
        return ModelError(
            f"{location}: no tokenizer.json, and transformers can't make one of {vocabularies}"
            f" here: {reason}; where sentencepiece is installed, save it there ({SAVE_CURE})"
        )
    return ModelError(
        f"{location}: transformers can't load its tokenizer: {reason}; save it anew ({SAVE_CURE})"
    )
