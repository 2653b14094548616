"""Models of transformers, from a local folder or a hub: safetensors only, and none of their code.

Every error names the source and says what to do. Errors of the libraries are told apart by their
classes, never by the words of their messages.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext

Family = TypeVar("Family")

POOLER = ("pooler.",)
"""Parts of the names of weights that may be missing: nothing here reads a pooler."""

PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
"""Files that hold weights in formats that can run code when they are read."""

CONNECTION_ERRORS = (ConnectionError, TimeoutError, socket.gaierror, socket.herror)
"""Errors of a connection that was refused, cut off, too slow, or to a host of no address."""

TOO_MANY_REQUESTS = 429
"""HTTP status of a server that takes no more requests for a while (RFC 6585)."""

FIRST_SERVER_ERROR = 500
"""HTTP statuses from here on are failures of the server itself (RFC 9110)."""

MAX_NAMED_WEIGHTS = 4
"""Weights that an error message names at most, so that it stays readable."""


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
    """Return the folder of a source or its name at the hub, as the libraries take it."""
    return str(context.path or context.name)


def summarize_error(error: Exception) -> str:
    """Return the first line of an error's message, or its class when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def list_error_chain(error: BaseException) -> list[BaseException]:
    """Return an error and every error that led to it, by `__cause__` and `__context__`."""
    chain: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or current in chain:
            continue
        chain.append(current)
        pending += [current.__cause__, current.__context__]
    return chain


def is_gated(error: BaseException) -> bool:
    """Tell whether a hub refused a model because its owners ask for consent first."""
    return any(isinstance(cause, GatedRepoError) for cause in list_error_chain(error))


def is_absent(error: BaseException) -> bool:
    """Tell whether a hub answered that it has no such model; a private one looks the same."""
    return any(isinstance(cause, RepositoryNotFoundError) for cause in list_error_chain(error))


def is_unreachable(error: BaseException) -> bool:
    """Tell whether an error of a library means that a hub can't be reached."""
    return any(_is_connection_error(cause) for cause in list_error_chain(error))


def _is_connection_error(error: BaseException) -> bool:
    """Tell whether this error alone, without what led to it, is one of the connection."""
    # the hub's library raises it offline, or with no connection, for a file that is not cached
    if isinstance(error, (*CONNECTION_ERRORS, LocalEntryNotFoundError)):
        return True
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status == TOO_MANY_REQUESTS or status >= FIRST_SERVER_ERROR
    # an HTTPError is an answer, so the server was reached
    return isinstance(error, URLError) and not isinstance(error, HTTPError)


def _explain_load_error(context: LoadContext, error: Exception) -> ModelError:
    """Return the error to raise in place of a library's."""
    if context.path is None:
        model = f"hub model '{context.name}'"
        if is_gated(error):
            return ModelError(
                f"{model}: its owners ask for consent first; accept on its page and log in"
            )
        if is_absent(error):
            return ModelError(
                f"{model}: the hub has no model of this name, or it is private;"
                " check the name, or log in"
            )
        if is_unreachable(error):
            return ModelError(
                f"{model}: the hub can't be reached and no copy is cached;"
                " give a local folder instead"
            )
    return ModelError(
        f"transformers can't load '{describe_source(context)}': {summarize_error(error)}"
    )


def load_config(context: LoadContext) -> Any:
    """Load the configuration of a model, as transformers has it.

    Raises:
        ModelError: It is missing or damaged, or the hub does not give it.
    """
    auto_config = transformers.AutoConfig
    try:
        return auto_config.from_pretrained(describe_source(context), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _explain_load_error(context, error) from error


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
    if context.path is not None:
        _check_safetensors(context.path)
    config._attn_implementation = "eager"
    library_class = getattr(transformers, class_name)
    try:
        model, loading_info = library_class.from_pretrained(
            describe_source(context),
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
            # checked below, where the message can name them
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise _explain_load_error(context, error) from error
    _check_loaded_weights(context, loading_info, unread=unread)
    return model.eval()


def _check_safetensors(folder: Path) -> None:
    """Raise `ModelError` when a folder holds no safetensors file."""
    if any(folder.glob("*.safetensors")):
        return
    pickle_names: list[str] = []
    for pattern in PICKLE_PATTERNS:
        pickle_names += [file.name for file in folder.glob(pattern)]
    hint = ""
    if pickle_names:
        names = ", ".join(sorted(pickle_names))
        hint = f" (only {names}: formats that can run code are not loaded)"
    raise ModelError(f"{folder}: no .safetensors file{hint}")


def _check_loaded_weights(
    context: LoadContext, loading_info: dict[str, Any], *, unread: tuple[str, ...]
) -> None:
    """Raise `ModelError` when weights that are read were not loaded."""
    unusable_names: list[str] = []
    for name in loading_info["missing_keys"]:
        if not any(part in name for part in unread):
            unusable_names.append(name)
    for mismatch in loading_info.get("mismatched_keys", ()):
        unusable_names.append(str(mismatch[0]))
    if unusable_names:
        names = ", ".join(sorted(unusable_names)[:MAX_NAMED_WEIGHTS])
        raise ModelError(
            f"{describe_source(context)}: weights are missing or of another shape: {names}"
        )


def find_family(
    kind: str, model_type: str, *, table: Mapping[str, Family], context: LoadContext
) -> Family:
    """Return the row of a table of families.

    Args:
        kind: The kind of the node, for the message.
        model_type: The type that the configuration of transformers names.
        table: The rows by type.
        context: The source, for the message.

    Raises:
        ModelError: The table has no such type; the message lists those that it has.
    """
    if model_type not in table:
        raise ModelError(
            f"{describe_source(context)}: a {kind} of type '{model_type}' is not supported"
            f" (known: {', '.join(sorted(table))})"
        )
    return table[model_type]


def load_json(context: LoadContext, file_name: str) -> dict[str, Any]:
    """Load an optional JSON file beside the weights; it is empty when there is none.

    Raises:
        ModelError: The file is there and is no JSON.
    """
    path = _find_optional_file(context, file_name)
    if path is None or not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error


def _find_optional_file(context: LoadContext, file_name: str) -> Path | None:
    """Return the path of a file in the folder or from the hub; None when a hub does not give it."""
    if context.path is not None:
        return context.path / file_name
    try:
        return Path(hf_hub_download(context.name, file_name))
    except OSError:
        # without the file, and without the hub, a model loads with its defaults
        return None
