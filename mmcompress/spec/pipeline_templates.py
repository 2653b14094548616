"""Pipelines that are shipped, as templates for specs of one's own."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from mmcompress.errors import SpecError
from mmcompress.registry import PIPELINE_TEMPLATES
from mmcompress.version import CHECKOUT_FOLDER

TARGET_LINE = re.compile(r"^target:[^#\n]*?(?=[ ]*(?:#|$))", re.M)
"""The target of a spec, without the comment behind it."""

DATA_SECTION = re.compile(r"^data:\n(?:[ ]+.*\n)+", re.M)
"""The whole section of the data."""

NAME_LINE = re.compile(r"^name:.*$", re.M)
"""The name of a spec, which its run folders are named after."""

PLAIN_NAME = re.compile(r"[A-Za-z_][\w-]*")
"""A name that YAML reads as a text without quotes."""

HEAD_COMMENT = re.compile(r"^# .*\n", re.M)
"""A comment line of its own, at the top of a spec."""

VARIABLE = re.compile(r"\b[A-Z]+_[A-Z]+\b")
"""A variable of the environment, as a comment names it."""

DATA_PATH = re.compile(r'path: "\$\{(\w+)\}"')
"""The folder of the data, where the environment names it."""


@dataclass(frozen=True, kw_only=True)
class PipelineTemplate:
    """A shipped pipeline."""

    file: str
    """Name of its file, in the folder of the shipped pipelines."""
    data_kind: str
    """Kind of data that a folder of one's own is read by."""


CLIP_CAPTIONER = PipelineTemplate(file="clip_captioner.yaml", data_kind="folder")
"""An image encoder, a captioner and a text encoder that come with the package."""

RETRIEVAL = PipelineTemplate(file="retrieval.yaml", data_kind="folder")
"""A dual encoder for image search: an image encoder and a text encoder."""

BLIP = PipelineTemplate(file="clip_blip_base.yaml", data_kind="folder")
"""CLIP ViT-B/32 beside BLIP base."""

SPEECH_SEARCH = PipelineTemplate(file="speech_search.yaml", data_kind="speech_folder")
"""Whisper, MiniLM and a list of sentences."""


def locate_shipped_file(folder: str, name: str) -> Path:
    """Return the path of a file that is shipped beside the package.

    In a checkout it lies beside the package, in an installed copy among the data files of its
    environment.

    Args:
        folder: `pipelines` or `search_spaces`.
        name: Name of the file.
    """
    relative = Path(folder) / name
    if (CHECKOUT_FOLDER / relative).exists():
        return CHECKOUT_FOLDER / relative
    return Path(sysconfig.get_path("data")) / "share" / "mmcompress" / relative


def describe_shipped_pipeline(missing: Path) -> str:
    """Return how to get a shipped pipeline that a path seems to mean; empty where it means none.

    Args:
        missing: A path without a file: a shipped file's name, or a pipeline's.
    """
    for name in PIPELINE_TEMPLATES.list_names():
        template: PipelineTemplate = PIPELINE_TEMPLATES.get(name)
        if missing.name in (template.file, name):
            return f"; `mmcompress init --template {name} --out {template.file}` writes it here"
    return ""


def fill_template(
    template: PipelineTemplate,
    *,
    name: str | None = None,
    target: str | None = None,
    data: str | None = None,
    sources: Mapping[str, str] | None = None,
) -> str:
    """Return the text of a shipped pipeline with values of one's own; its comments on what it
    keeps stay.

    Args:
        template: The pipeline.
        name: Name of the spec; None: that of the pipeline.
        target: The target; None: that of the pipeline.
        data: Folder of the data; None: what the pipeline says.
        sources: Sources of models, by node.

    Raises:
        SpecError: The pipeline has no such node, or it has no source.
    """
    text = locate_shipped_file("pipelines", template.file).read_text(encoding="utf-8")
    if name is not None:
        quoted = name if PLAIN_NAME.fullmatch(name) else json.dumps(name)
        text = NAME_LINE.sub(_quote_for_sub(f"name: {quoted}"), text, count=1)
    if target is not None:
        text = TARGET_LINE.sub(_quote_for_sub(f"target: {target}"), text, count=1)
    if data is not None:
        path = f"path: {json.dumps(data)}"
        if DATA_PATH.search(text):
            text = DATA_PATH.sub(_quote_for_sub(path), text, count=1)
        else:
            section = f"data:\n  kind: {template.data_kind}\n  options: {{{path}}}\n"
            text = DATA_SECTION.sub(_quote_for_sub(section), text, count=1)
    for node_name, source in (sources or {}).items():
        text = _replace_source(text, node_name, source=source)
    return _drop_stale_comments(text)


def _drop_stale_comments(text: str) -> str:
    """Drop the comments on variables of the environment that a spec does not read any more."""

    def keep_if_read(comment: re.Match[str]) -> str:
        variables = VARIABLE.findall(comment.group())
        is_stale = variables and not any(f"${{{name}" in text for name in variables)
        return "" if is_stale else comment.group()

    return HEAD_COMMENT.sub(keep_if_read, text)


def find_unset_data_variable(text: str) -> str | None:
    """Find the variable that names the folder of the data of a spec and that is not set."""
    path = DATA_PATH.search(text)
    if path is None or path.group(1) in os.environ:
        return None
    return path.group(1)


def list_template_sources(template: PipelineTemplate) -> dict[str, str]:
    """List the source of every model of a shipped pipeline, by node."""
    text = locate_shipped_file("pipelines", template.file).read_text(encoding="utf-8")
    nodes: dict[str, dict[str, object]] = yaml.safe_load(text)["nodes"]
    return {name: str(node["source"]) for name, node in nodes.items() if "source" in node}


def _replace_source(text: str, node_name: str, *, source: str) -> str:
    """Replace the source of one node, and the comment on it."""
    line = re.compile(
        rf"^(  {re.escape(node_name)}:.*\n(?:    .*\n)*?    source: )(\"[^\"]*\"|\S+).*", re.M
    )
    if not line.search(text):
        nodes = re.findall(r"^  (\w+):.*\n(?:    .*\n)*?    source:", text, re.M)
        raise SpecError(f"no node '{node_name}' has a source; those with one: {', '.join(nodes)}")
    return line.sub(rf"\g<1>{_quote_for_sub(json.dumps(source))}", text, count=1)


def _quote_for_sub(text: str) -> str:
    """Return a text that `re.sub` puts in as it is."""
    return text.replace("\\", r"\\")
