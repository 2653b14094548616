"""Models of transformers from a local folder or a hub id: safetensors only, no code of theirs, clear errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmcompress.errors import MissingPackage, ModelError
from mmcompress.models.base import LoadContext

POOLER = ("pooler.",)


PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as e:
        raise MissingPackage("transformers", "compress") from e
    return transformers


@contextmanager
def refuse_pickles(what: str) -> Iterator[None]:
    """Nothing is unpickled inside, whatever a library tries: safetensors alone. Raises `ModelError` where it does."""

    def refuse(file: Any, *_: Any, **__: Any) -> None:
        raise ModelError(
            f"{what}: {file} is a pickle, a format that can run code; convert it to .safetensors"
        )

    given = torch.load
    torch.load = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = given


def describe_source(context: LoadContext) -> str:
    return str(context.path or context.name)


def _refusal(context: LoadContext, e: Exception) -> ModelError:
    if context.path is None and is_gated(e):
        return ModelError(
            f"hub model '{context.name}': its owners ask for consent first; accept on its page and log in"
        )
    if context.path is None and is_unreachable(e):
        return ModelError(
            f"hub model '{context.name}': the hub can't be reached and no copy is cached; give a local folder instead"
        )
    return ModelError(f"transformers can't load '{describe_source(context)}': {summarize_error(e)}")


def summarize_error(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def is_gated(e: Exception) -> bool:
    """Whether an error of a library means that a hub wants a login first."""
    return any(w in str(e).lower() for w in ("gated repo", "access to model", "restricted"))


def is_unreachable(e: Exception) -> bool:
    """Whether an error of a library means that a hub can't be reached."""
    return any(
        w in str(e).lower()
        for w in ("connect", "offline", "cached", "failed to resolve", "name resolution", "urlopen")
    )


def load_config(context: LoadContext) -> Any:
    """The configuration behind a source. Raises `ModelError`."""
    try:
        return import_transformers().AutoConfig.from_pretrained(
            describe_source(context), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as e:
        raise _refusal(context, e) from e


def load_library_model(
    context: LoadContext, name: str, *, config: Any, unread: tuple[str, ...] = (), **options: Any
) -> Any:
    """The library's class `name` with its weights, float32, eager attention. Raises `ModelError`.

    `unread`: parts of names of weights that may be missing, as nothing here reads them; `options`: for the class.
    """
    if context.path and not any(context.path.glob("*.safetensors")):
        others = sorted(f.name for p in PICKLES for f in context.path.glob(p))
        found = (
            f" (only {', '.join(others)}: formats that can run code are not loaded)"
            if others
            else ""
        )
        raise ModelError(f"{context.path}: no .safetensors file{found}")
    config._attn_implementation = "eager"
    try:
        model, info = getattr(import_transformers(), name).from_pretrained(
            describe_source(context),
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as e:
        raise _refusal(context, e) from e
    missing = [k for k in info["missing_keys"] if not any(part in k for part in unread)]
    wrong = [*missing, *(str(k[0]) for k in info.get("mismatched_keys", ()))]
    if wrong:
        raise ModelError(
            f"{describe_source(context)}: weights are missing or of another shape: {', '.join(sorted(wrong)[:4])}"
        )
    return model.eval()


def find_family(kind: str, model_type: str, *, table: dict[str, Any], context: LoadContext) -> Any:
    """The row of a table of families. Raises `ModelError` with the known ones."""
    if model_type not in table:
        raise ModelError(
            f"{describe_source(context)}: a {kind} of type '{model_type}' is not supported (known: {', '.join(sorted(table))})"
        )
    return table[model_type]


def load_tokenizer_json(context: LoadContext) -> str:
    """The fast tokenizer as JSON: `tokenizer.json` of the folder, or of the hub. Raises `ModelError`."""
    if context.path is None:
        try:
            found = import_transformers().AutoTokenizer.from_pretrained(
                context.name, trust_remote_code=False
            )
            return str(found.backend_tokenizer.to_str())
        except (OSError, ValueError, AttributeError) as e:
            raise _refusal(context, e) from e
    path = context.path / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{context.path}: tokenizer.json is missing beside the weights")
    text = path.read_text()
    try:
        json.loads(text)
    except ValueError as e:
        raise ModelError(f"{path}: not JSON: {e}") from e
    return text


def load_json(context: LoadContext, name: str) -> dict[str, Any]:
    """A JSON file beside the weights, empty when there is none."""
    path: Path | None = context.path / name if context.path else None
    if path is None:
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(context.name, name))
        except OSError:  # not there, or no hub: the file is optional
            return {}
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as e:
        raise ModelError(f"{path}: not JSON: {e}") from e
