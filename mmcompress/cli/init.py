"""`mmcompress init`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click
from rich.markup import escape

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.data.check_data import describe_shortage, describe_splits, open_data
from mmcompress.errors import DataError, MissingPackage, SpecError, suggest_nearest
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import PIPELINE_TEMPLATES
from mmcompress.spec.pipeline_templates import (
    PipelineTemplate,
    fill_template,
    find_unset_data_variable,
    list_template_sources,
    locate_shipped_file,
)
from mmcompress.spec.schema import Spec
from mmcompress.spec.target import parse_target
from mmcompress.storage import replace_file

SCHEMA_FILE = "spec.schema.json"
"""Name of the schema, which the first line of every spec names."""

RANDOM_WEIGHTS = "@random"
"""Ends a source whose architecture is known here, and whose weights are drawn."""


@click.command("init")
@click.option("--template", metavar="NAME", help="A shipped pipeline: mmcompress list pipelines.")
@click.option("--out", "path", type=LocalPath(), help="The spec to write (default: NAME.yaml).")
@click.option("--target", metavar="2x|12ms", help="The target (default: that of the pipeline).")
@click.option("--data", metavar="FOLDER", help="Folder of your data.")
@click.option(
    "--source", "sources", multiple=True, metavar="NODE=SOURCE", help="Source of a model."
)
def init_command(
    template: str | None,
    path: str | None,
    target: str | None,
    data: str | None,
    sources: tuple[str, ...],
) -> None:
    """Write a commented spec from a shipped pipeline, and check it.

    On a terminal it asks for what is not given. Elsewhere it asks nothing.
    """
    source_by_node = dict(parse_source(source) for source in sources)
    if template is None:
        answers = ask_for_values(target, data, path=path, source_by_node=source_by_node)
        template, target, data, path = answers
    problem = PIPELINE_TEMPLATES.find_problem(template)
    if problem:
        raise SpecError(f"--template: {problem}")
    entry: PipelineTemplate = PIPELINE_TEMPLATES.get(template)
    spec_path = Path(path or f"{template}.yaml")
    # A file of one's own names its runs, too.
    name = spec_path.stem if path else None
    text = fill_template(entry, name=name, target=target, data=data, sources=source_by_node)
    unset = find_unset_data_variable(text)
    if unset is not None:
        raise SpecError(
            f"init: {template} needs a folder of your data: give --data FOLDER, or set {unset}; "
            "nothing was written"
        )
    write_spec(spec_path, text)
    shown_path = escape(str(spec_path))
    out.print(f"written: {shown_path}", soft_wrap=True)
    spec = load_spec(spec_path)
    faults = _list_missing_sources(spec, source_by_node)
    hub_nodes = _list_hub_sources(spec)
    if hub_nodes:
        names = ", ".join(hub_nodes)
        out.print(
            f"[yellow]source:  from a hub: {escape(names)}; where none is reached, name folders "
            "(--source NODE=FOLDER)[/yellow]",
            soft_wrap=True,
        )
    if data is not None:
        faults += _look_at_data(spec)
        embedded = [n for n, node in spec.nodes.items() if node.source.startswith("embedded:")]
        if embedded:
            names = ", ".join(embedded)
            out.print(
                f"[yellow]source:  the weights of {escape(names)} know drawings of emoji alone: "
                "for other data, name your own models (--source NODE=FOLDER)[/yellow]",
                soft_wrap=True,
            )
    if faults:
        lines = "\n".join(f"- {fault}" for fault in faults)
        raise DataError(
            f"{spec_path} is written, but can't run yet:\n{lines}\n"
            f"Mend this, then: mmcompress validate {spec_path}"
        )
    out.print(f"next:    mmcompress validate {shown_path}", soft_wrap=True)
    out.print(f"then:    mmcompress run {shown_path}", soft_wrap=True)
    out.print(
        f"time:    mmcompress explain {shown_path} says how long that takes; "
        "--effort quick is a first look, --effort best keeps most, --max-time 1h ends in time",
        soft_wrap=True,
    )


def _list_missing_sources(spec: Spec, source_by_node: Mapping[str, str]) -> list[str]:
    """List the folders of models that were named and are not there."""
    missing: list[str] = []
    for node_name, source in source_by_node.items():
        folder = Path(spec.nodes[node_name].source)
        if ":" not in source and not folder.exists():
            missing.append(f"source of {node_name}: {folder}: no such folder")
    return missing


def _look_at_data(spec: Spec) -> list[str]:
    """Tell what a run would find in the data that were named; returns what is wrong with them."""
    try:
        data = open_data(spec)
        shortage = describe_shortage(spec, data)
    except (DataError, MissingPackage) as error:
        return [f"data: {error}"]
    told = [part for part in (describe_splits(data), shortage) if part]
    out.print(f"data:    {escape('; '.join(told) or 'found')}", soft_wrap=True)
    return []


def parse_source(text: str) -> tuple[str, str]:
    """Split `NODE=SOURCE`.

    Raises:
        SpecError: There is no `=` in it.
    """
    node_name, equals, source = text.partition("=")
    if not equals or not source:
        raise SpecError(f"--source {text}: expected node=source, e.g. vision=./my_clip")
    return node_name, source


def ask_for_values(
    target: str | None,
    data: str | None,
    *,
    path: str | None,
    source_by_node: dict[str, str],
) -> tuple[str, str | None, str | None, str | None]:
    """Ask for the pipeline, the file, the target, the data, and the models.

    Args:
        target: The target, where it was given.
        data: The folder of the data, where it was given.
        path: The file of the spec, where it was given.
        source_by_node: Sources of models that were given; those that a person names are added.

    Returns:
        Pipeline, target, data, file.

    Raises:
        SpecError: There is no terminal to ask on.
    """
    names = PIPELINE_TEMPLATES.list_names()
    if not _can_ask():
        raise SpecError(f"init: --template is missing; {suggest_nearest('', names)}")
    for name in names:
        out.print(f"  {name:<16}{escape(PIPELINE_TEMPLATES.get_about(name))}")
    template = click.prompt("Pipeline", type=click.Choice(names), default=names[0])
    if path is None:
        path = click.prompt("File", default=f"{template}.yaml", value_proc=_check_new_file)
    if target is None:
        target = click.prompt("Target", default="2x", value_proc=_check_target)
    if data is None:
        question = "Folder of your data (empty: as shipped)"
        data = click.prompt(question, default="", show_default=False) or None
    _ask_for_sources_(template, source_by_node)
    return template, target, data, path


def _can_ask() -> bool:
    """Return whether there is a terminal to ask on."""
    return sys.stdin.isatty()


def _ask_for_sources_(template: str, source_by_node: dict[str, str]) -> None:
    """Ask for the source of every model that none was given for; a new one is added.

    What was answered for one node is proposed for the others that have the same source as shipped.
    """
    answers: dict[str, str] = {}
    for node_name, shipped in list_template_sources(PIPELINE_TEMPLATES.get(template)).items():
        if node_name in source_by_node:
            continue
        proposed = answers.get(shipped, shipped)
        answer = click.prompt(f"Model of {node_name}: folder or source", default=proposed)
        answers[shipped] = answer
        if answer != shipped:
            source_by_node[node_name] = answer


def _check_new_file(text: str) -> str:
    """Return the name of a new file, or ask again where there is one of that name."""
    if Path(text).exists():
        raise click.UsageError(f"{text} is there already")
    return text


def _check_target(text: str) -> str:
    """Return a target, or ask again where it is none."""
    try:
        for target in text.split(","):
            parse_target(target.strip())
    except SpecError as error:
        raise click.UsageError(str(error)) from error
    return text


def _list_hub_sources(spec: Spec) -> list[str]:
    """List the nodes whose weights come from a hub."""
    hub = ("open_clip:", "transformers:", "hf-hub:")
    names: list[str] = []
    for name, node in spec.list_model_nodes().items():
        _, _, model = node.source.partition(":")
        is_folder = Path(model).is_absolute()
        if node.source.startswith(hub) and not is_folder and not model.endswith(RANDOM_WEIGHTS):
            names.append(name)
    return names


def write_spec(path: Path, text: str) -> None:
    """Write a spec that can be read, with its schema beside it.

    Raises:
        SpecError: There is such a file already, or what was asked for makes no valid spec.
    """
    if path.exists():
        raise SpecError(f"{path}: is there already; name another file with --out")
    with replace_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    try:
        load_spec(path)
    except SpecError:
        path.unlink()
        raise
    schema = path.with_name(SCHEMA_FILE)
    if not schema.exists():
        shipped = locate_shipped_file("pipelines", SCHEMA_FILE)
        with replace_file(schema) as unfinished:
            unfinished.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
