"""Where weights come from: from the source string of a node to its `Model`."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcompress.data.remote_files import fetch_remote
from mmcompress.errors import DataError, ModelError, shorten
from mmcompress.graph.blocks import Block
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import parse_reference
from mmcompress.models.base import LoadContext, Model
from mmcompress.models.checkpoint import check_config_files
from mmcompress.models.hub_files import (
    COMMIT,
    RANDOM_WEIGHTS_TAG,
    HubModel,
    fetch_hub_folder,
    list_hub_files,
)
from mmcompress.models.packaged import find_packaged_folder
from mmcompress.models.shapes import is_loading_shapes_only, load_shapes_only
from mmcompress.models.tokenizer_files import check_vocabulary
from mmcompress.registry import FAMILIES, resolve_entry
from mmcompress.runtime.similar_folder import suggest_folder
from mmcompress.spec.schema import Node, Spec
from mmcompress.spec.storage_urls import is_remote
from mmcompress.version import PACKAGE_FOLDER

EMBEDDED_FOLDER = PACKAGE_FOLDER / "models" / "embedded"
"""The folder of the small trained models that come with the package."""

SOURCE_SCHEMES = ("embedded", "open_clip", "transformers", "hf-hub", "pip", "python")
"""What may stand before the colon of a source string."""

LIBRARY_SCHEMES = ("open_clip", "transformers")
"""Schemes that name a library; behind them stands a folder or the name of a model."""

BARE_HUB_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
"""A name at the hub without an organisation, as its oldest models have (`gpt2`)."""

HUB_NAME = rf"{BARE_HUB_NAME}/{BARE_HUB_NAME}"
"""The name of a model at the hub."""

OPEN_CLIP_HUB = "hf-hub:"
"""What open_clip itself writes before the name of a model at the hub."""

OPEN_CLIP_FOLDER = "local-dir:"
"""What open_clip itself writes before a folder."""

LIBRARY_BY_CONFIG_FILE = {
    "open_clip_config.json": "open_clip",
    "config.json": "transformers",
}
"""The library that wrote a folder, by a file in it. The first file that is there decides."""

DEFAULT_CONTEXT_TOKENS = 64
"""Tokens that a generator reads when the node it reads does not say how many it gives."""


CONTRACT = {"blocks": tuple, "config": dict, "dims": dict}
"""Fields that every model must set, with their types."""


@dataclass(frozen=True, kw_only=True)
class SourceLocation:
    """The place that a source string names; nothing of it has been read."""

    library: str
    """`open_clip`, `transformers` or `python`: who loads it."""
    folder: Path | None = None
    """The folder with the weights; None for a hub and for the user's own module."""
    name: str = ""
    """The model of open_clip's list, or `package.module:build`; empty for all others."""
    pretrained: str | None = None
    """open_clip's tag of the weights or a file of them, the part behind `@`."""
    revision: str = ""
    """A branch, tag or commit of the model at a hub that the tag names; empty for the main
    branch."""
    hub_model: HubModel | None = None
    """The model at a hub; None for all others."""

    @property
    def has_random_weights(self) -> bool:
        """Whether every load of it draws other weights."""
        return self.library == "open_clip" and self.pretrained == RANDOM_WEIGHTS_TAG


def locate_source(source: str) -> SourceLocation:
    """Find the place that a source string names. No weights are read and no hub is asked.

    Args:
        source: `embedded:NAME`, a folder, `transformers:HUB_NAME[@REVISION]`,
            `hf-hub:HUB_NAME[@REVISION]`, `open_clip:NAME[@PRETRAINED[@REVISION]]`, `pip:NAME` or
            `python:package.module:build`. `hf-hub:` is open_clip's own word for one of its models
            at the hub. `pip:` names weights that an installed package brings. A folder may stand
            behind `transformers:` and `open_clip:`, too. A storage URL, `s3://...`, is fetched.

    Raises:
        ModelError: The source names nothing that is there.
        MissingPackage: The package behind `pip:NAME` is not installed.
    """
    scheme, colon, remainder = source.partition(":")
    if not colon:
        scheme = ""
    if scheme == "python":
        return SourceLocation(library="python", name=remainder)
    if scheme == "pip":
        return _recognize_folder(source, find_packaged_folder(remainder))
    if scheme == "embedded":
        return _recognize_folder(source, _find_embedded_folder(remainder))
    if scheme in ("hf-hub", "local-dir"):
        return _locate_in_library(source, "open_clip", address=source)
    if scheme in LIBRARY_SCHEMES:
        return _locate_in_library(source, scheme, address=remainder)
    if is_remote(source):
        return _recognize_folder(source, _fetch_folder_of_url(source))
    if Path(source).is_dir():
        return _recognize_folder(source, Path(source))
    shown_source = shorten(source)
    similar_schemes = difflib.get_close_matches(shorten(scheme), SOURCE_SCHEMES, 1)
    if scheme and similar_schemes:
        raise ModelError(
            f"source '{shown_source}': unknown kind '{scheme}'; did you mean "
            f"'{similar_schemes[0]}:'?"
        )
    choices = ", ".join(f"{known_scheme}:" for known_scheme in SOURCE_SCHEMES)
    hint = ""
    if re.fullmatch(HUB_NAME, source):
        hint = f"; for a model of the hub: transformers:{shown_source}"
    if not scheme and (not hint or Path(source).parent.is_dir()):
        hint = suggest_folder(Path(source)) or hint
    raise ModelError(f"source '{shown_source}': no such folder (or use {choices}){hint}")


def _fetch_folder_of_url(url: str) -> Path:
    """Fetch a folder at a storage URL into the cache; raises `ModelError` where that fails."""
    try:
        return fetch_remote(url)
    except DataError as error:
        raise ModelError(f"source '{shorten(url)}': {error}") from error


def _locate_in_library(source: str, library: str, *, address: str) -> SourceLocation:
    """Find the place behind the name of a library; a missing folder raises `ModelError`."""
    shown_source = shorten(source)
    if library == "open_clip" and address.startswith(OPEN_CLIP_HUB):
        return _locate_at_hub(source, "open_clip", address=address.removeprefix(OPEN_CLIP_HUB))
    is_folder = library == "open_clip" and address.startswith(OPEN_CLIP_FOLDER)
    if is_folder:
        address = address.removeprefix(OPEN_CLIP_FOLDER)
    if _is_folder(address):
        return _recognize_folder(source, Path(address), library=library)
    # `./weights.pt` may stand behind an @, so only a path without one is surely meant as a folder
    if is_folder or (address.startswith((".", "/", "~")) and "@" not in address):
        hint = suggest_folder(Path(address))
        raise ModelError(f"source '{shown_source}': no such folder{hint}")
    if library == "transformers":
        return _locate_at_hub(source, library, address=address)
    name, _, pretrained = address.partition("@")
    if _is_file(pretrained):
        return SourceLocation(library=library, name=name, pretrained=pretrained)
    tag, _, revision = pretrained.partition("@")
    return SourceLocation(library=library, name=name, pretrained=tag or None, revision=revision)


def _is_file(address: str) -> bool:
    """Tell whether an address names a file; one that is too long for a path names none."""
    try:
        return bool(address) and Path(address).is_file()
    except (OSError, ValueError):
        return False


def _is_folder(address: str) -> bool:
    """Tell whether an address names a folder; one that is too long for a path names none."""
    try:
        return bool(address) and Path(address).is_dir()
    except (OSError, ValueError):
        return False


def _locate_at_hub(source: str, library: str, *, address: str) -> SourceLocation:
    """Split `NAME[@REVISION]` of a model at a hub; other texts raise `ModelError`."""
    name, separator, revision = address.partition("@")
    if not re.fullmatch(HUB_NAME, name) and not re.fullmatch(BARE_HUB_NAME, name):
        raise ModelError(
            f"source '{shorten(source)}': no such folder, and no name that the hub may have"
            " (organisation/name, or organisation/name@revision)"
        )
    if separator and not revision:
        raise ModelError(
            f"source '{shorten(source)}': a branch, tag or commit is missing behind the @"
        )
    hub_model = HubModel(name=name, revision=revision, library=library)
    return SourceLocation(library=library, hub_model=hub_model)


def pin_source(source: str) -> str:
    """Return a source with the commit that its revision stands for now.

    Sources that name no model of a hub, and those that name a commit, stay as they are.

    Raises:
        ModelError: The hub has no such model, or can't be reached.
    """
    scheme, _, _ = source.partition(":")
    if scheme not in (*LIBRARY_SCHEMES, "hf-hub"):
        return source
    location = locate_source(source)
    model = location.hub_model
    pinned_part = source.partition("@")[0]
    if model is None and location.pretrained:
        find_tagged_model = resolve_entry("mmcompress.models.families.open_clip:find_tagged_model")
        model = find_tagged_model(location.name, location.pretrained, revision=location.revision)
        pinned_part = f"{pinned_part}@{location.pretrained}"
    if model is None or COMMIT.fullmatch(model.revision):
        return source
    return f"{pinned_part}@{list_hub_files(model).commit}"


def pin_sources(spec: Spec, known_pins: Mapping[str, str]) -> tuple[Spec, dict[str, str]]:
    """Return a spec whose models of a hub are named by their commits, so that they can't change.

    Args:
        spec: The pipeline.
        known_pins: What sources were pinned to before, by the source; no hub is asked for these.

    Returns:
        The spec, and what its sources are pinned to.

    Raises:
        ModelError: The hub has no such model, or can't be reached.
    """
    pinned: dict[str, str] = {}
    nodes = dict(spec.nodes)
    for node_name, node in spec.list_model_nodes().items():
        for key in ("source", "rewind"):
            source = getattr(node, key)
            if not source:
                continue
            try:
                pinned_source = known_pins.get(source) or pinned.get(source) or pin_source(source)
            except ModelError as error:
                raise ModelError(f"nodes.{node_name}: {error}") from error
            if pinned_source != source:
                pinned[source] = pinned_source
                change: dict[str, Any] = {key: pinned_source}
                nodes[node_name] = replace(nodes[node_name], **change)
    return replace(spec, nodes=nodes), pinned


def list_hub_sources(spec: Spec) -> dict[str, str]:
    """Return the sources of the nodes whose models come from a hub, with their commits, by node."""
    sources: dict[str, str] = {}
    for node_name, node in spec.list_model_nodes().items():
        _, separator, revision = node.source.rpartition("@")
        if separator and COMMIT.fullmatch(revision):
            sources[node_name] = node.source
    return sources


def _find_embedded_folder(name: str) -> Path:
    """Return the folder of an embedded model, or raise `ModelError` with all names."""
    folder = EMBEDDED_FOLDER / name
    if folder.is_dir():
        return folder
    known_names: list[str] = []
    for tokenizer_file in EMBEDDED_FOLDER.glob("*/*/tokenizer.json"):
        known_names.append(tokenizer_file.parent.relative_to(EMBEDDED_FOLDER).as_posix())
    raise ModelError(
        f"source 'embedded:{name}': nothing embedded under that name"
        f" (known: {', '.join(sorted(known_names))})"
    )


def _recognize_folder(source: str, folder: Path, *, library: str = "") -> SourceLocation:
    """Tell from its files which library wrote a folder, or raise `ModelError`.

    Args:
        source: The source, for the message.
        folder: The folder.
        library: The library that the source names; empty where it names none.
    """
    for file_name, known_library in LIBRARY_BY_CONFIG_FILE.items():
        if library in ("", known_library) and (folder / file_name).is_file():
            return SourceLocation(library=known_library, folder=folder)
    # an adapter has no configuration of a model, and says what to do
    check_config_files(folder)
    names = [
        name
        for name, library_name in LIBRARY_BY_CONFIG_FILE.items()
        if library in ("", library_name)
    ]
    raise ModelError(
        f"source '{shorten(source)}': {folder} holds no {' and no '.join(names)}:"
        " no model was saved there"
    )


def locate_node_source(node: Node) -> SourceLocation:
    """Find the place of a node's weights, and check that its library has models of that kind.

    Raises:
        ModelError: The source names nothing that is there, or no family loads such a node from it.
    """
    location = locate_source(node.source)
    if location.library != "python":
        problem = FAMILIES.find_problem(f"{location.library}/{node.kind}")
        if problem:
            raise ModelError(f"source '{node.source}' as a {node.kind}: {problem}")
    return location


def fetch_folder(location: SourceLocation) -> Path | None:
    """Return the folder of a source; a model of a hub is fetched first.

    Raises:
        ModelError: The hub does not give it.
    """
    if location.hub_model is None:
        return location.folder
    return fetch_hub_folder(location.hub_model, weights=not is_loading_shapes_only())


def load_model(node: Node) -> Model:
    """Load the model of one node, in float32 and in evaluation mode.

    Raises:
        ModelError: There are no such weights, or they can't be used.
    """
    location = locate_node_source(node)
    context = LoadContext(
        kind=node.kind,
        path=fetch_folder(location),
        name=location.name,
        pretrained=location.pretrained,
        revision=location.revision,
        options=node.options,
        hub_model=location.hub_model,
    )
    if location.library == "python":
        model = _load_own_model(node, context)
    else:
        load_family = FAMILIES.get(f"{location.library}/{node.kind}")
        model = load_family(context)
    check_vocabulary(model, node.source)
    _check_numbers(node, model)
    return model.eval()


def _check_numbers(node: Node, model: Model) -> None:
    """Raise `ModelError` when weights hold numbers that are not finite."""
    if is_loading_shapes_only():
        return
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(
                f"source '{node.source}': '{name}' holds numbers that are not finite (nan, inf);"
                " train or download the model again"
            )


def _load_own_model(node: Node, context: LoadContext) -> Model:
    """Call `build(context)` of the user's own module and check what it returns."""
    module_name, colon, function_name = context.name.partition(":")
    if not colon:
        raise ModelError(f"source '{node.source}': expected python:package.module:build")
    working_folder = str(Path.cwd())
    if working_folder not in sys.path:
        # `python -m` looks in the working directory, a console script does not
        sys.path.append(working_folder)
    try:
        build_model = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a module of someone else's may raise anything
        raise ModelError(f"source '{node.source}': {type(error).__name__}: {error}") from error
    if not callable(build_model):
        raise ModelError(f"source '{node.source}': {function_name} is no function")
    try:
        model = build_model(context)
    except ModelError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"source '{node.source}': {function_name}() raised {type(error).__name__}: "
            f"{error} ({place.filename}:{place.lineno}); it is called with one argument, the "
            "LoadContext"
        ) from error
    if isinstance(model, Model) and getattr(model, "kind", None) == node.kind:
        _check_contract(node, model)
        return model
    kind = getattr(model, "kind", "model without a kind")
    description = f"one of kind {kind}" if isinstance(model, Model) else type(model).__name__
    raise ModelError(
        f"source '{node.source}': {function_name}() gave {description}, not one of kind {node.kind}"
        " (mmcompress.models.base)"
    )


def _check_contract(node: Node, model: Model) -> None:
    """Raise `ModelError` when a model of the user's own lacks what every model must set."""
    for name, field_type in CONTRACT.items():
        value = getattr(model, name, None)
        if value is None:
            fault = f"sets no {name}"
        elif not isinstance(value, field_type):
            fault = f"sets {name} to a {type(value).__name__}, not a {field_type.__name__}"
        else:
            continue
        raise ModelError(
            f"source '{node.source}': the model {fault}; see Model in mmcompress.models.base,"
            " and find_blocks in mmcompress.models.layouts"
        )
    for block in model.blocks:
        if not isinstance(block, Block):
            raise ModelError(
                f"source '{node.source}': the model's blocks hold a {type(block).__name__};"
                " each must be a Block (mmcompress.graph.blocks)"
            )
    if get_kind(node.kind).writes_text and not model.tokenizer_json:
        raise ModelError(
            f"source '{node.source}': the model sets no tokenizer_json, which a {node.kind} needs"
        )


def check_models(spec: Spec) -> dict[str, Model]:
    """Check every model of a pipeline by its configuration and the headers of its weights.

    Returns:
        The models by node, with the shapes of their weights and without the numbers.

    Raises:
        ModelError: A model can't be loaded, or one can't read what another gives.
    """
    with load_shapes_only():
        models = load_models(spec)
        load_rewind_models(spec, models)
    return models


def load_rewind_models(spec: Spec, models: Mapping[str, Model]) -> dict[str, Model]:
    """Load the weights that the survivors of a cut are rewound to.

    Args:
        spec: The pipeline; a node's `rewind` names an earlier checkpoint of its model.
        models: The loaded models by node; they stand where a node has no `rewind`.

    Raises:
        ModelError: A checkpoint is of another architecture than the node's model.
    """
    rewind_models = dict(models)
    for node_name, node in spec.list_model_nodes().items():
        if not node.rewind:
            continue
        try:
            earlier = load_model(replace(node, source=node.rewind))
        except ModelError as error:
            raise ModelError(f"nodes.{node_name}.rewind: {error}") from error
        if _list_parameter_shapes(earlier) != _list_parameter_shapes(models[node_name]):
            raise ModelError(
                f"nodes.{node_name}.rewind: '{node.rewind}' is not the model of '{node.source}'"
            )
        rewind_models[node_name] = earlier
    set_context_lengths(spec, rewind_models)
    return rewind_models


def _list_parameter_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by its name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load_models(spec: Spec) -> dict[str, Model]:
    """Load every model of the pipeline and check that widths agree across its edges.

    Raises:
        ModelError: A model can't be loaded, or one can't read what another gives.
    """
    models: dict[str, Model] = {}
    for node_name, node in spec.list_model_nodes().items():
        try:
            models[node_name] = load_model(node)
        except ModelError as error:
            raise ModelError(f"nodes.{node_name}: {error}") from error
    for node_name, node in spec.nodes.items():
        kind = get_kind(node.kind)
        for port in kind.token_ports:
            _check_token_width(node_name, node, port=port, models=models)
        if kind.compared_ports:
            _check_embedding_widths(node_name, node, models=models)
    set_context_lengths(spec, models)
    return models


def _check_token_width(
    node_name: str, node: Node, *, port: str, models: Mapping[str, Model]
) -> None:
    """Raise `ModelError` when a model takes tokens of another width than it is given."""
    encoder_name = parse_reference(node.inputs[port]).node
    given_width = models[encoder_name].dims["tokens"]
    expected_width = models[node_name].dims[port]
    if given_width != expected_width:
        raise ModelError(
            f"nodes.{node_name}.inputs.{port}: '{encoder_name}.tokens' is {given_width} wide,"
            f" '{node_name}' takes {expected_width}"
        )


def _check_embedding_widths(node_name: str, node: Node, *, models: Mapping[str, Model]) -> None:
    """Raise `ModelError` when a join compares embeddings of two widths."""
    query_port, keys_port = get_kind(node.kind).compared_ports
    query_name = parse_reference(node.inputs[query_port]).node
    keys_name = parse_reference(node.inputs[keys_port]).node
    query_width = models[query_name].dims["embedding"]
    keys_width = models[keys_name].dims["embedding"]
    if query_width != keys_width:
        raise ModelError(
            f"nodes.{node_name}: embeddings of '{query_name}' ({query_width}) and"
            f" '{keys_name}' ({keys_width}) can't be compared"
        )


def set_context_lengths(spec: Spec, models: Mapping[str, Model]) -> None:
    """Set `context_tokens` of every generator: how many tokens the node that it reads gives.

    Args:
        spec: The pipeline.
        models: Its models by node; those of generators are changed in place.
    """
    for node_name, node in spec.nodes.items():
        for port in get_kind(node.kind).token_ports:
            encoder_name = parse_reference(node.inputs[port]).node
            encoder = models[encoder_name]
            count = getattr(encoder, "token_count", DEFAULT_CONTEXT_TOKENS)
            reader: Any = models[node_name]
            reader.context_tokens = count
