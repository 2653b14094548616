"""Files of a model from a hub: listed once, fetched by their commit, told apart from absent ones.

The hub lists the files of a commit. A file that is not listed is absent; a file that is listed and
does not come is an error. So no failure of a server passes for a model without that file.

What a hub listed is kept in the cache folder. Without a connection, a model whose files are all
cached then loads as it did before.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote

from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mmcompress.errors import DataError, ModelError, shorten
from mmcompress.models.checkpoint import StoredTensor, check_config_files, read_tensor_names
from mmcompress.runtime.cache import locate_cache_folder
from mmcompress.storage import read_record, write_record

RANDOM_WEIGHTS_TAG = "random"
"""Stands in the place of a tag of open_clip: weights as they are before training."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit of a hub, which never changes; every other revision may move."""

LISTING_SECONDS = 10
"""Seconds that a hub may take to list the files of a model; one that takes longer is not there."""

CONNECTION_ERRORS = (ConnectionError, TimeoutError, socket.gaierror, socket.herror)
"""Errors of a connection that was refused, cut off, too slow, or to a host of no address."""

FORBIDDEN = (401, 403)
"""HTTP statuses of a file that is kept from whoever asks (RFC 9110)."""

TOO_MANY_REQUESTS = 429
"""HTTP status of a server that takes no more requests for a while (RFC 6585)."""

FIRST_SERVER_ERROR = 500
"""HTTP statuses from here on are failures of the server itself (RFC 9110)."""

SIDE_FILE_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""Ends of the names of files beside the weights: configurations, vocabularies, templates."""

MODULE_FOLDER = re.compile(r"\d+_\w+")
"""A folder that sentence-transformers keeps a module in, such as `1_Pooling`."""

TAG_LIBRARY = "open_clip's tags"
"""Stands for the library of weights behind a tag of open_clip: nothing else of their folder is
read."""

DECISIVE_FILES: dict[str, tuple[str, ...]] = {
    "transformers": (
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ),
    "open_clip": ("tokenizer.json",),
    TAG_LIBRARY: (),
}
"""Optional files by library. Each one changes what a model answers, so it must be known whether it
exists."""

WEIGHT_FILES = {
    "transformers": ("model.safetensors", "model.safetensors.index.json"),
    "open_clip": (
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "model.safetensors",
    ),
}
"""Names of the weights by library, in the order in which the library looks for them."""


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model of a hub, as a source names it."""

    name: str
    """`organisation/name`."""
    revision: str = ""
    """A branch, a tag or a commit; empty for the main branch."""
    library: str = "transformers"
    """Who loads it: `transformers`, `open_clip`, or `TAG_LIBRARY`."""

    def __str__(self) -> str:
        version = f"@{self.revision}" if self.revision else ""
        return f"hub model '{shorten(self.name + version)}'"


@dataclass(frozen=True, kw_only=True)
class HubListing:
    """What a hub has of a model at one commit."""

    commit: str
    """The commit."""
    files: tuple[str, ...]
    """Names of all files, folders included."""


def list_hub_files(model: HubModel) -> HubListing:
    """Return the files of a model, and the commit that its revision stands for.

    Raises:
        ModelError: The hub has no such model, does not give it, or can't be reached and nothing is
            kept of it.
    """
    kept = _read_kept_listing(model)
    if kept is not None and COMMIT.fullmatch(model.revision):
        return kept
    try:
        information = HfApi(endpoint=constants.ENDPOINT).model_info(
            model.name, revision=model.revision or None, timeout=LISTING_SECONDS
        )
    except Exception as error:  # the library of the hub raises those of its HTTP client, too
        if not is_unreachable(error):
            raise explain_hub_error(model, error) from error
        listing = kept or _list_cached_files(model)
        if listing is None:
            raise explain_hub_error(model, error) from error
        return listing
    names = [sibling.rfilename for sibling in information.siblings or ()]
    listing = HubListing(commit=str(information.sha), files=tuple(names))
    for revision in (model.revision, listing.commit):
        write_record(_locate_kept_listing(model.name, revision), listing)
    return listing


def fetch_hub_folder(model: HubModel, *, weights: bool = True) -> Path:
    """Fetch what a library reads of a model, and return the folder that holds it.

    Args:
        model: The model.
        weights: Whether the weights are fetched, too.

    Raises:
        ModelError: A file can't be fetched, or there are no weights in safetensors.
    """
    listing = list_hub_files(model)
    names = [name for name in listing.files if _is_side_file(name)]
    if not names:
        raise ModelError(f"{model}: has no configuration; it is no model of {model.library}")
    files = [fetch_hub_file(model, name, commit=listing.commit) for name in names]
    # a file lies as deep in the folder of the commit as its name says
    folder = files[0].parents[names[0].count("/")]
    if weights:
        # gigabytes that the tool can't use are not fetched
        check_config_files(folder)
        for name in list_weight_files(model, listing, folder=folder):
            fetch_hub_file(model, name, commit=listing.commit)
    return folder


def list_weight_files(model: HubModel, listing: HubListing, *, folder: Path) -> list[str]:
    """Return the names of the weights of a model.

    Args:
        model: The model.
        listing: Its files.
        folder: The folder with its small files; the index of the weights is one of them.

    Raises:
        ModelError: There are no weights in safetensors.
    """
    for name in WEIGHT_FILES[model.library]:
        if name not in listing.files:
            continue
        if not name.endswith(".json"):
            return [name]
        try:
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            return sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{model}: {name}: damaged: {error}") from error
    other_files = [
        name for name in listing.files if Path(name).suffix in (".bin", ".pt", ".pth", ".h5")
    ]
    hint = (
        f" (only {', '.join(sorted(other_files))}: formats that can run code)"
        if other_files
        else ""
    )
    raise ModelError(
        f"{model}: has no {WEIGHT_FILES[model.library][0]}{hint};"
        " save it with safetensors, or name a revision that has it: NAME@REVISION"
    )


def read_remote_tensors(model: HubModel) -> dict[str, StoredTensor]:
    """Return the stored tensors of a model at a hub by name; only headers are fetched.

    Raises:
        ModelError: The hub does not give them, or there are no weights in safetensors.
    """
    listing = list_hub_files(model)
    folder = fetch_hub_folder(model, weights=False)
    tensors: dict[str, StoredTensor] = {}
    for name in list_weight_files(model, listing, folder=folder):
        if (folder / name).is_file():
            tensors |= read_tensor_names(folder / name)
            continue
        try:
            header = HfApi(endpoint=constants.ENDPOINT).parse_safetensors_file_metadata(
                model.name, name, revision=listing.commit
            )
        except Exception as error:  # the library of the hub raises those of its HTTP client, too
            raise explain_hub_error(model, error, file_name=name) from error
        for tensor_name, tensor in header.tensors.items():
            tensors[tensor_name] = StoredTensor(dtype=tensor.dtype, shape=tuple(tensor.shape))
    return tensors


def find_cached_file(name: str, file_name: str, *, revision: str = "") -> Path | None:
    """Return a file of a model that is cached already; None where it is not.

    Args:
        name: The model, `organisation/name`.
        file_name: The file.
        revision: A branch, tag or commit; empty for the main branch.
    """
    cached = try_to_load_from_cache(
        name, file_name, revision=revision or None, cache_dir=constants.HF_HUB_CACHE
    )
    return Path(cached) if isinstance(cached, str) else None


def fetch_hub_file(model: HubModel, file_name: str, *, commit: str) -> Path:
    """Fetch one file that the hub listed; a cached one is taken from there.

    Args:
        model: The model and its revision.
        file_name: The file, relative to the folder of the model.
        commit: The commit that the hub listed.

    Raises:
        ModelError: The hub does not give it, or it can't be written.
    """
    cached = find_cached_file(model.name, file_name, revision=commit)
    if cached is not None:
        return cached
    try:
        return Path(
            hf_hub_download(
                model.name,
                file_name,
                revision=commit,
                cache_dir=constants.HF_HUB_CACHE,
                endpoint=constants.ENDPOINT,
            )
        )
    except Exception as error:  # the library of the hub raises those of its HTTP client, too
        raise explain_hub_error(model, error, file_name=file_name) from error


def _is_side_file(name: str) -> bool:
    """Tell whether a file stands beside the weights, and is read with them."""
    folder, _, base_name = name.rpartition("/")
    if folder:
        return bool(MODULE_FOLDER.fullmatch(folder)) and base_name.endswith(
            (".json", ".safetensors")
        )
    return base_name.endswith(SIDE_FILE_SUFFIXES)


def _locate_kept_listing(name: str, revision: str) -> Path:
    """Return the file in which the listing of a revision is kept."""
    folder = locate_cache_folder() / "hub" / quote(name, safe="")
    return folder / f"{quote(revision, safe='') or 'main'}.json"


def _read_kept_listing(model: HubModel) -> HubListing | None:
    """Return what the hub listed before; None when nothing whole is kept."""
    path = _locate_kept_listing(model.name, model.revision)
    if not path.exists():
        return None
    try:
        return read_record(HubListing, path)
    except DataError:
        # the hub lists it again
        return None


def _list_cached_files(model: HubModel) -> HubListing | None:
    """Return the files of a model that another tool has cached; None when there are none.

    Raises:
        ModelError: The cache does not tell whether a file that matters exists.
    """
    try:
        folder = Path(
            snapshot_download(
                model.name,
                revision=model.revision or None,
                cache_dir=constants.HF_HUB_CACHE,
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    for name in DECISIVE_FILES[model.library]:
        cached = try_to_load_from_cache(
            model.name, name, revision=folder.name, cache_dir=constants.HF_HUB_CACHE
        )
        if cached is None:
            raise ModelError(
                f"{model}: the hub can't be reached, and the cached copy does not tell whether"
                f" {name} exists. Connect once, or name the copy if it is whole: source: {folder}"
            )
    return HubListing(commit=folder.name, files=tuple(sorted(names)))


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


def is_unreachable(error: BaseException) -> bool:
    """Tell whether an error of a library means that a hub can't be reached, or gives no answer."""
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


def _find_status(chain: Iterable[BaseException]) -> int | None:
    """Return the HTTP status that a hub answered; None when there was no answer."""
    for cause in chain:
        if isinstance(cause, HfHubHTTPError):
            return int(cause.response.status_code)
    return None


def explain_hub_error(model: HubModel, error: Exception, *, file_name: str = "") -> ModelError:
    """Return the error to raise in place of one of the hub's library.

    Args:
        model: The model that was asked for.
        error: What the library raised. Its class counts, not the words of its message.
        file_name: The file that was asked for; empty for the model as a whole.
    """
    description = f"{model}: {file_name}" if file_name else str(model)
    chain = list_error_chain(error)
    status = _find_status(chain)
    answer = f"the hub answered {status}" if status else "can't be fetched"

    def has_cause(error_class: type[BaseException]) -> bool:
        return any(isinstance(cause, error_class) for cause in chain)

    explanations: list[tuple[bool, str]] = [
        (
            has_cause(GatedRepoError),
            f"{answer}: its owners ask for consent first; accept on its page and log in"
            " (hf auth login)",
        ),
        (
            has_cause(RevisionNotFoundError),
            f"the hub has no revision '{shorten(model.revision)}' of it;"
            " check the branch, tag or commit behind the @",
        ),
        (
            has_cause(RepositoryNotFoundError) and not file_name,
            "the hub has no model of this name, or it is private; check the name, or log in"
            " (hf auth login)",
        ),
        (
            status in FORBIDDEN,
            f"{answer}: it is private, or the login has expired; log in (hf auth login)",
        ),
        (
            status == TOO_MANY_REQUESTS,
            f"{answer}, too many requests: wait some minutes, or log in (hf auth login)",
        ),
        (
            status is not None and status >= FIRST_SERVER_ERROR,
            f"{answer}, a failure of its own: try again later, or give a local folder instead",
        ),
        (
            is_unreachable(error) and status is None,
            "the hub can't be reached and no copy is cached; give a local folder instead",
        ),
        (
            has_cause(HFValidationError),
            "no such folder, and no name that a hub may have (organisation/name)",
        ),
    ]
    for applies, explanation in explanations:
        if applies:
            return ModelError(f"{description}: {explanation}")
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return ModelError(f"{description}: {answer}: {reason}")
