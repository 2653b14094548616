"""Where weights come from: from the source string of a node to its `Model`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcompress.errors import ModelError
from mmcompress.graph.ports import get_kind
from mmcompress.graph.references import parse_reference
from mmcompress.models.base import LoadContext, Model
from mmcompress.models.packaged import find_packaged_folder
from mmcompress.models.tokenizer_files import check_vocabulary
from mmcompress.registry import FAMILIES
from mmcompress.spec.schema import Node, Spec
from mmcompress.version import PACKAGE_FOLDER

EMBEDDED_FOLDER = PACKAGE_FOLDER / "models" / "embedded"
"""The folder of the small trained models that come with the package."""

SOURCE_SCHEMES = ("embedded", "open_clip", "transformers", "pip", "python")
"""What may stand before the colon of a source string."""

HUB_SCHEMES = ("open_clip", "transformers")
"""Schemes whose models a hub may hold."""

LIBRARY_BY_CONFIG_FILE = {
    "open_clip_config.json": "open_clip",
    "config.json": "transformers",
}
"""The library that wrote a folder, by a file in it. The first file that is there decides."""

DEFAULT_CONTEXT_TOKENS = 64
"""Tokens that a generator reads when the node it reads does not say how many it gives."""


@dataclass(frozen=True, kw_only=True)
class SourceLocation:
    """The place that a source string names; nothing of it has been read."""

    library: str
    """`open_clip`, `transformers` or `python`: who loads it."""
    folder: Path | None = None
    """The folder with the weights; None for a hub and for the user's own module."""
    name: str = ""
    """The model at the hub, or `package.module:build`; empty when a folder says it all."""
    pretrained: str | None = None
    """open_clip's tag of the weights or a file of them, the part behind `@`."""


def locate_source(source: str) -> SourceLocation:
    """Find the place that a source string names. No weights are read and no hub is asked.

    Args:
        source: `embedded:NAME`, a folder, `open_clip:NAME[@PRETRAINED]`,
            `transformers:HUB_ID_OR_FOLDER`, `pip:NAME` (weights that an installed package brings)
            or `python:package.module:build`.

    Raises:
        ModelError: The source names nothing that is there.
        MissingPackage: The package behind `pip:NAME` is not installed.
    """
    scheme, colon, rest = source.partition(":")
    if not colon:
        scheme = ""
    if scheme == "python":
        return SourceLocation(library="python", name=rest)
    if scheme == "pip":
        return _recognize_folder(source, find_packaged_folder(rest))
    if scheme == "embedded":
        return _recognize_folder(source, _find_embedded_folder(rest))
    if scheme in HUB_SCHEMES:
        if Path(rest).is_dir():
            return _recognize_folder(source, Path(rest))
        return _locate_at_hub(scheme, rest)
    if Path(source).is_dir():
        return _recognize_folder(source, Path(source))
    similar_schemes = difflib.get_close_matches(scheme, SOURCE_SCHEMES, 1)
    if scheme and similar_schemes:
        raise ModelError(
            f"source '{source}': unknown kind '{scheme}'; did you mean '{similar_schemes[0]}:'?"
        )
    choices = ", ".join(f"{known_scheme}:" for known_scheme in SOURCE_SCHEMES)
    raise ModelError(f"source '{source}': no such folder (or use {choices})")


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


def _locate_at_hub(scheme: str, address: str) -> SourceLocation:
    """Split `NAME[@PRETRAINED]`; a path that is no folder raises `ModelError`."""
    # `./weights.pt` may stand behind an @, so only a path without one is surely meant as a folder
    if address.startswith((".", "/")) and "@" not in address:
        raise ModelError(f"source '{scheme}:{address}': no such folder")
    name, _, pretrained = address.partition("@")
    return SourceLocation(library=scheme, name=name, pretrained=pretrained or None)


def _recognize_folder(source: str, folder: Path) -> SourceLocation:
    """Tell from its files which library wrote a folder, or raise `ModelError`."""
    for file_name, library in LIBRARY_BY_CONFIG_FILE.items():
        if (folder / file_name).is_file():
            return SourceLocation(library=library, folder=folder)
    raise ModelError(
        f"source '{source}': {folder} holds neither of {', '.join(LIBRARY_BY_CONFIG_FILE)}"
    )


def locate_node_source(node: Node) -> SourceLocation:
    """Find the place of a node's weights, and check that its library has models of that kind.

    Raises:
        ModelError: The source names nothing that is there, or no family loads such a node from it.
    """
    location = locate_source(node.source)
    if location.library != "python":
        problem = FAMILIES.problem(f"{location.library}/{node.kind}")
        if problem:
            raise ModelError(f"source '{node.source}' as a {node.kind}: {problem}")
    return location


def load_model(node: Node) -> Model:
    """Load the model of one node, in float32 and in evaluation mode.

    Raises:
        ModelError: There are no such weights, or they can't be used.
    """
    location = locate_node_source(node)
    context = LoadContext(
        kind=node.kind,
        path=location.folder,
        name=location.name,
        pretrained=location.pretrained,
        candidates=node.candidates,
        max_tokens=node.max_tokens,
        prompt=node.prompt,
    )
    if location.library == "python":
        model = _load_own_model(node, context)
    else:
        load_family = FAMILIES.get(f"{location.library}/{node.kind}")
        model = load_family(context)
    check_vocabulary(model, node.source)
    return model.eval()


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
    except (ImportError, AttributeError) as error:
        raise ModelError(f"source '{node.source}': {error}") from error
    model = build_model(context)
    if isinstance(model, Model) and model.kind == node.kind:
        return model
    description = f"a {model.kind}" if isinstance(model, Model) else type(model).__name__
    raise ModelError(
        f"source '{node.source}': {function_name}() gave {description}, not a {node.kind}"
        " (mmcompress.models.base)"
    )


def load_rewind_models(spec: Spec, models: Mapping[str, Model]) -> dict[str, Model]:
    """Load the weights that the survivors of a cut are rewound to.

    Args:
        spec: The pipeline; a node's `rewind` names an earlier checkpoint of its model.
        models: The loaded models by node; they stand where a node has no `rewind`.

    Raises:
        ModelError: A checkpoint is of another architecture than the node's model.
    """
    rewind_models = dict(models)
    for node_name, node in spec.model_nodes().items():
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
    for node_name, node in spec.model_nodes().items():
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
