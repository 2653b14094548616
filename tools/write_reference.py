"""Write the reference pages of the documentation from the code.

    python tools/write_reference.py            writes them
    python tools/write_reference.py --check    exit code 1 where a page differs from the code
    python tools/write_reference.py --release  keys of the spec that are new belong to this version

`docs/reference/spec.md` comes from the records of a spec, and `docs/reference/commands.md` from the
commands. `docs/reference/kinds.md` comes from the kinds of node, and `docs/reference/data.md` from
the kinds of data. `docs/reference/layouts.md` comes from the layouts of blocks, and
`docs/reference/summary.md` from the record of a result. The table and the picture of `README.md`
come from the summaries under `reports/`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from mmcompress.cli import main as command_group
from mmcompress.graph.ports import get_kind
from mmcompress.models.layouts import BLOCK_LAYOUTS, CONV_LAYOUTS, CROSS_ATTENTION_NAMES
from mmcompress.registry import DATA_KINDS, NODE_KINDS
from mmcompress.results.records import SUMMARY_FORMAT, Summary
from mmcompress.spec.schema import Spec
from mmcompress.storage import describe_record
from mmcompress.version import __version__

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the repository."""

SPEC_PAGE = ROOT / "docs" / "reference" / "spec.md"
"""The page of all keys of a spec."""

COMMANDS_PAGE = ROOT / "docs" / "reference" / "commands.md"
"""The page of all commands."""

SUMMARY_PAGE = ROOT / "docs" / "reference" / "summary.md"
"""The page of all keys of a summary."""

KINDS_PAGE = ROOT / "docs" / "reference" / "kinds.md"
"""The page of all kinds of node with their ports."""

DATA_PAGE = ROOT / "docs" / "reference" / "data.md"
"""The page of all kinds of data with their options."""

LAYOUTS_PAGE = ROOT / "docs" / "reference" / "layouts.md"
"""The page of all layouts that blocks are found by."""

RELEASED_KEYS = ROOT / "tools" / "released_spec_keys.json"
"""The keys of a spec that each released version added, by version."""

README = ROOT / "README.md"
"""The page with the table of results."""

RESULTS = ROOT / "reports" / "clip_captioner"
"""The folder with a summary for every target."""

PICTURE_LINE = r"^({} .* nearest +)[0-9.]+ ms$"
"""A line of the picture at the top: `before` or `after`, and the milliseconds of a request."""

RESULTS_BEGIN = "<!-- results: written by tools/write_reference.py -->\n"
"""The line ahead of the table of results."""

RESULTS_END = "<!-- end of results -->"
"""The line behind the table of results."""

KEY_HEADING = "### `"
"""How the heading of a key begins on a page."""

BOUND_WORDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
"""How a page says the bounds of a JSON Schema."""


def format_spec_page() -> str:
    """Format the page of all keys of a spec, section by section."""
    lines = [
        "# Keys of a spec",
        "",
        "A spec is a YAML file. `--set section.key=value` overrides any key.",
        "`mmcompress schema` prints the same as a JSON Schema, for editors.",
        "",
    ]
    page = format_record_page(Spec, lines, title="The spec")
    versions = {}
    for version, keys in read_released_keys().items():
        versions.update(dict.fromkeys(keys, version))
    return tell_versions(page, versions)


def read_released_keys() -> dict[str, list[str]]:
    """Read the keys of a spec that each released version added, by version."""
    released: dict[str, list[str]] = json.loads(RELEASED_KEYS.read_text(encoding="utf-8"))
    return released


def list_keys_of_page(page: str) -> list[str]:
    """List the keys that a page of a record describes."""
    return [line.strip("# `") for line in page.splitlines() if line.startswith(KEY_HEADING)]


def tell_versions(page: str, versions: Mapping[str, str]) -> str:
    """Tell below the heading of every key of a page since which version it is there.

    Args:
        page: The page.
        versions: The version that added a key; keys that it lacks belong to the version at hand.
    """
    lines: list[str] = []
    key = ""
    for line in page.splitlines():
        if line.startswith(KEY_HEADING):
            key = line.strip("# `")
        elif line and key:
            # The first line below a heading says what values the key may have.
            line += f" Since {versions.get(key, __version__)}."
            key = ""
        lines.append(line)
    return "\n".join(lines) + "\n"


def release_keys() -> None:
    """Write down which keys the version at hand adds: `--release`, when it is released."""
    released = read_released_keys()
    known = {key for keys in released.values() for key in keys}
    added = [key for key in list_keys_of_page(format_spec_page()) if key not in known]
    released[__version__] = added
    RELEASED_KEYS.write_text(json.dumps(released, indent=1) + "\n", encoding="utf-8")


def format_summary_page() -> str:
    """Format the page of all keys of a summary, section by section."""
    lines = [
        "# Keys of summary.json",
        "",
        "`summary.json` in a run folder holds everything that the report shows. "
        "`mmcompress show RUN --json` prints it, and `mmcompress.load_summary(RUN)` reads it as a "
        "typed record.",
        "",
        f"This page is of format {SUMMARY_FORMAT} (key `format`). Keys may be added within a "
        "format. A key that changes its meaning makes a new one.",
        "",
    ]
    return format_record_page(Summary, lines, title="The summary")


def format_record_page(record_type: type, lines: list[str], *, title: str) -> str:
    """Format all keys of a record, and then those of the records that it holds.

    Args:
        record_type: The record.
        lines: The head of the page.
        title: The heading of the keys of the record itself.
    """
    schema = describe_record(record_type)
    definitions: dict[str, Any] = schema["$defs"]
    first_places: dict[str, str] = {}
    sections: list[tuple[str, str]] = []

    def list_keys(place: str, properties: Mapping[str, Any]) -> None:
        """Add the keys of a record at a place, and note the records that they hold."""
        for key, facts in properties.items():
            path = f"{place}.{key}" if place else key
            lines.extend(format_key(path, facts, definitions=definitions))
            name = find_definition(facts)
            if not definitions.get(name, {}).get("properties"):
                continue
            inner_place = path + find_entry_mark(facts)
            if name in first_places:
                lines.extend([f"Its keys are those of `{first_places[name]}`.", ""])
            else:
                first_places[name] = inner_place
                sections.append((inner_place, name))

    lines += [f"## {title}", ""]
    list_keys("", schema["properties"])
    for place, name in sections:
        definition = definitions[name]
        lines += [f"## `{place}`", "", definition.get("description", ""), ""]
        list_keys(place, definition["properties"])
    return "\n".join(lines).rstrip() + "\n"


def find_entry_mark(facts: Mapping[str, Any]) -> str:
    """Return how a path goes on to the entries of a mapping or a list; empty for a record."""
    if "additionalProperties" in facts:
        return ".NAME"
    if "items" in facts:
        return "[]"
    for choice in facts.get("anyOf", ()):
        mark = find_entry_mark(choice)
        if mark:
            return mark
    return ""


def find_definition(facts: Mapping[str, Any]) -> str:
    """Find the record that a key holds, or that its entries are; empty: none."""
    for place in (facts, facts.get("additionalProperties"), facts.get("items")):
        if isinstance(place, Mapping) and "$ref" in place:
            return str(place["$ref"]).rpartition("/")[2]
    for choice in facts.get("anyOf", ()):
        name = find_definition(choice)
        if name:
            return name
    return ""


def format_key(key: str, facts: Mapping[str, Any], *, definitions: Mapping[str, Any]) -> list[str]:
    """Format one key: its name, its values, its default, and what it does."""
    lines = [f"### `{key}`", ""]
    notes = [describe_values(facts, definitions)]
    if "default" in facts:
        notes.append(f"default `{json.dumps(facts['default'])}`")
    text = "; ".join(note for note in notes if note)
    lines += [f"{text[:1].upper()}{text[1:]}.", ""]
    description = facts.get("description", "")
    name = find_definition(facts)
    if not description and name in definitions:
        description = definitions[name].get("description", "")
    return [*lines, description, ""] if description else lines


def describe_values(facts: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """Describe what values a key may have, in words."""
    if "$ref" in facts:
        name = find_definition(facts)
        definition = definitions.get(name, {})
        if definition.get("properties"):
            return "a section"
        return describe_values(definition, definitions)
    if "enum" in facts:
        return "one of " + ", ".join(f"`{value}`" for value in facts["enum"])
    if "const" in facts:
        return f"`{facts['const']}`"
    if "anyOf" in facts:
        choices = [describe_values(choice, definitions) for choice in facts["anyOf"]]
        return " or ".join(dict.fromkeys(choice for choice in choices if choice))
    kind = str(facts.get("type", "any value"))
    words = {
        "integer": "a whole number",
        "number": "a number",
        "string": "a text",
        "boolean": "true or false",
        "array": "a list",
        "object": "a mapping",
        "null": "nothing",
    }.get(kind, kind)
    bounds = [f"{text} {facts[bound]:g}" for bound, text in BOUND_WORDS.items() if bound in facts]
    return " ".join([words, ", ".join(bounds)]).strip()


def format_commands_page() -> str:
    """Format the page of all commands with their options."""
    lines = ["# Commands", "", "`mmcompress COMMAND --help` prints the same on a terminal.", ""]
    for name, command in list_commands(command_group, prefix=""):
        context = click.Context(command, info_name=name)
        usage = command.collect_usage_pieces(context)
        lines += [f"## `{name}`", "", inspect.cleandoc(command.help or ""), ""]
        lines += ["```text", f"mmcompress {' '.join([name, *usage])}", "```", ""]
        options = [
            parameter
            for parameter in command.params
            if isinstance(parameter, click.Option) and not parameter.hidden
        ]
        if options:
            lines += ["| option | what it does |", "|---|---|"]
            for option in options:
                names, help_text = option.get_help_record(context) or ("", "")
                cells = [names.replace("|", "\\|"), " ".join(help_text.split()).replace("|", "\\|")]
                lines.append(f"| `{cells[0]}` | {cells[1]} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def format_kinds_page() -> str:
    """Format the page of all kinds of node: their ports, and the keys that they have."""
    lines = [
        "# Kinds of node",
        "",
        "A node names its `kind`. Each of its `inputs` names an output of another node, as "
        "`NODE.PORT`, or an input of the pipeline. The type of the value must be one that the port "
        "reads. `mmcompress validate` checks it. Plug-ins add kinds: "
        "[Contributing](../contributing.md).",
        "",
    ]
    for name in NODE_KINDS.list_names():
        kind = get_kind(name)
        about = NODE_KINDS.get_about(name)
        lines += [f"## `{name}`", "", f"{about[0].upper()}{about[1:]}.", ""]
        lines += ["| port | | type of the value |", "|---|---|---|"]
        for port, facts in kind.inputs.items():
            direction = "input, may be left out" if facts.optional else "input"
            lines.append(f"| `{port}` | {direction} | {' or '.join(facts.types)} |")
        for port, value_type in kind.outputs.items():
            lines.append(f"| `{port}` | output | {value_type} |")
        lines.append("")
        if kind.options:
            lines += ["| key of its own | default | what it does |", "|---|---|---|"]
            for key, option in kind.options.items():
                default = json.dumps(option.default)
                lines.append(f"| `{key}` | `{default}` | {option.about} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def format_data_page() -> str:
    """Format the page of all kinds of data with their options."""
    lines = [
        "# Kinds of data",
        "",
        "`data.kind` names one, and `data.options` holds its options. "
        "`--set data.options.KEY=VALUE` overrides an option. "
        "[Use data of your own](../how_to/own_data.md) shows how the files of a folder look.",
        "",
    ]
    for name in DATA_KINDS.list_names():
        kind = DATA_KINDS.get(name)
        schema = describe_record(kind)
        lines += [f"## `{name}`", "", inspect.cleandoc(kind.__doc__ or ""), ""]
        lines += ["| option | values | default | what it does |", "|---|---|---|---|"]
        # What a kind fixes itself is no option.
        options = [field.name for field in fields(kind) if field.init]
        for option in options:
            facts = schema["properties"][option]
            default = f"`{json.dumps(facts['default'])}`" if "default" in facts else "must be given"
            about = " ".join(str(facts.get("description", "")).split())
            cells = [f"`{option}`", describe_values(facts, schema["$defs"]), default, about]
            escaped = [cell.replace("|", "\\|") for cell in cells]
            lines.append(f"| {' | '.join(escaped)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def format_layouts_page() -> str:
    """Format the page of the layouts that blocks are found by."""
    lines = [
        "# Layouts of blocks",
        "",
        "The tool finds what it can cut by the names of layers within a module. The first layout "
        "that fits is taken. A module of your own needs the names of one of them. A new layout is "
        "a row of `mmcompress/models/layouts.py`.",
        "",
        "## Attention and feed-forward blocks: `find_blocks`",
        "",
        "Paths are relative to the module of the block, and all of them are linear layers. Units "
        "are heads in attention, and channels in the others.",
        "",
        "| kind | layers that write the units | layer that reads them | seen in |",
        "|---|---|---|---|",
    ]
    for layout in BLOCK_LAYOUTS:
        writers = ", ".join(f"`{path}`" for path, _ in layout.writers)
        lines.append(f"| {layout.kind} | {writers} | `{layout.reader}` | {layout.seen_in} |")
    names = ", ".join(f"`{name}`" for name in CROSS_ATTENTION_NAMES)
    lines += [
        "",
        f"Attention below a module named {names} reads another node.",
        "",
        "## Pairs of convolutions: `find_convolutions`",
        "",
        "Units are the channels between the two.",
        "",
        "| first convolution | between them | second convolution | seen in |",
        "|---|---|---|---|",
    ]
    for pair in CONV_LAYOUTS:
        between = ", ".join(f"`{path}`" for path in pair.per_channel)
        lines.append(f"| `{pair.writer}` | {between} | `{pair.reader}` | {pair.seen_in} |")
    return "\n".join(lines) + "\n"


def list_commands(group: click.Command, *, prefix: str) -> Iterator[tuple[str, click.Command]]:
    """List all commands by their whole name, those of groups too."""
    context = click.Context(group)
    for name in group.list_commands(context) if isinstance(group, click.Group) else ():
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        if command is None:
            continue
        if isinstance(command, click.Group):
            yield from list_commands(command, prefix=f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def list_results() -> list[dict[str, Any]]:
    """List the summaries of all targets, the slowest first."""
    summaries: list[dict[str, Any]] = []
    for path in RESULTS.glob("*/summary.json"):
        summaries.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(summaries, key=get_speedup)


def format_results() -> str:
    """Format the table of results: a row for every target."""
    lines = [
        "| target | latency, p50 | R@1 image to text | exact captions | retained | bundle |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    summaries = list_results()
    if summaries:
        first = min(summaries, key=get_speedup)["baseline"]
        lines.append(
            f"| before | {first['latency_ms']['p50']:.2f} ms | {format_quality(first, 0)} | "
            f"{format_quality(first, 2)} | | {first['size_mb']:.1f} MB |"
        )
    for summary in summaries:
        after = summary["compressed"]
        lines.append(
            f"| {summary['target']['text']} | {after['latency_ms']['p50']:.2f} ms "
            f"(**{summary['speedup']:.2f}x**) | {format_quality(after, 0)} | "
            f"{format_quality(after, 2)} | {summary['quality_retained']:.1%} | "
            f"{after['size_mb']:.1f} MB |"
        )
    return "\n".join(lines) + "\n"


def get_speedup(summary: Mapping[str, Any]) -> float:
    """Return the speed-up of a summary."""
    return float(summary["speedup"])


def format_quality(side: Mapping[str, Any], place: int) -> str:
    """Format one figure of quality with its interval."""
    names = ("image_to_text_r1", "text_to_image_r1", "caption_exact_match")
    quality = side["quality"][names[place]]
    low = 100 * quality["low"]
    return f"{quality['value']:.1%} ({low:.1f} – {100 * quality['high']:.1f})"


def insert_results(page: str) -> str:
    """Put the table of results into a page, and its first target into the picture at the top."""
    head, begin, rest = page.partition(RESULTS_BEGIN)
    _, end, tail = rest.partition(RESULTS_END)
    if not begin or not end:
        raise ValueError(f"{README}: the lines around the table of results are missing")
    first = list_results()[0]
    for line, side in (("before", first["baseline"]), ("after", first["compressed"])):
        figure = f"{side['latency_ms']['p50']:.1f} ms"
        head = re.sub(PICTURE_LINE.format(line), rf"\g<1>{figure}", head, flags=re.MULTILINE)
    return head + begin + format_results() + end + tail


def main() -> None:
    """Write every page, or tell which differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--release", action="store_true")
    arguments = parser.parse_args()
    if arguments.release:
        release_keys()
    pages = {
        SPEC_PAGE: format_spec_page(),
        COMMANDS_PAGE: format_commands_page(),
        KINDS_PAGE: format_kinds_page(),
        DATA_PAGE: format_data_page(),
        LAYOUTS_PAGE: format_layouts_page(),
        SUMMARY_PAGE: format_summary_page(),
        README: insert_results(README.read_text(encoding="utf-8")),
    }
    stale: list[str] = []
    for path, text in pages.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'differ from the code' if arguments.check else 'written'}: {', '.join(stale)}")
    if stale and arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
