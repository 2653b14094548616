"""`mmcompress predict`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import click
import numpy as np
from rich.markup import escape

from mmcompress.cli.console import err
from mmcompress.cli.options import LocalPath
from mmcompress.errors import SpecError
from mmcompress.runtime.check_manifest import MAX_THREADS, TEXT_TYPE
from mmcompress.runtime.graph import load_bundle

LONG_NUMBERS = re.compile(r"-?\d[\d.e+-]*(?:, -?\d[\d.e+-]*){15,}")
"""Sixteen numbers or more in a list."""

SHOWN_NUMBERS = 4
"""Numbers of a long list that a terminal shows."""


def parse_input(text: str) -> tuple[str, str]:
    """Split `NAME=FILE`.

    Raises:
        SpecError: There is no `=` in it.
    """
    name, equals, file = text.partition("=")
    if not equals:
        raise SpecError(f"--input {text}: expected name=file, e.g. image=photo.png")
    return name, file


@click.command("predict")
@click.argument("bundle", type=LocalPath())
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=FILE|TEXT",
    required=True,
    help="An image or sound file, or the text itself. @FILE reads a text from a file.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="Threads of every session (default: as measured).",
)
@click.option(
    "--provider",
    help="What sessions run on (default: as measured); `mmcompress list providers` has the names.",
)
def predict_command(
    bundle: str, inputs: tuple[str, ...], threads: int | None, provider: str | None
) -> None:
    """Run a bundle on one request; print its outputs as JSON."""
    request: dict[str, str] = {}
    for text in inputs:
        name, file = parse_input(text)
        if name in request:
            raise SpecError(f"--input {name} stands twice: predict answers one request")
        request[name] = file
    pipeline = load_bundle(bundle, threads, provider=provider)
    for name, value_type in pipeline.inputs.items():
        if value_type == TEXT_TYPE and name in request:
            request[name] = _read_text(name, request[name])
    outputs = pipeline(**request)
    plain = {}
    for name, value in outputs.items():
        plain[name] = value.tolist() if isinstance(value, np.ndarray) else value
    text = json.dumps(plain)
    if sys.stdout.isatty():
        # A person reads no embedding; a program gets all of it.
        text = LONG_NUMBERS.sub(_shorten_numbers, text)
    click.echo(text)


def _read_text(name: str, value: str) -> str:
    """Return the text of an input: the value itself, or the content of `@FILE`."""
    if value.startswith("@"):
        try:
            return Path(value[1:]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"--input {name}: {value[1:]}: can't be read: {error}") from error
    # Unlike Path.is_file, it takes a text that is too long for a name.
    if os.path.isfile(value):
        err.print(
            f"[yellow]--input {escape(name)}: '{escape(value)}' is taken as the text itself; "
            f"@{escape(value)} reads the file[/yellow]",
            soft_wrap=True,
        )
    return value


def _shorten_numbers(numbers: re.Match[str]) -> str:
    """Return the first few of many numbers, and how many there are."""
    values = numbers[0].split(", ")
    return f"{', '.join(values[:SHOWN_NUMBERS])}, ... ({len(values)} numbers)"
