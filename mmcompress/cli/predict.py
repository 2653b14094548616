"""`mmcompress predict`."""

from __future__ import annotations

import json

import click
import numpy as np

from mmcompress.errors import SpecError
from mmcompress.runtime.check_manifest import MAX_THREADS
from mmcompress.runtime.graph import load_bundle


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
@click.argument("bundle", type=click.Path())
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE", required=True)
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="Threads of every session (default: as measured).",
)
def predict_command(bundle: str, inputs: tuple[str, ...], threads: int | None) -> None:
    """Run a bundle on one request; print its outputs as JSON."""
    request: dict[str, str] = {}
    for text in inputs:
        name, file = parse_input(text)
        if name in request:
            raise SpecError(f"--input {name} stands twice: predict answers one request")
        request[name] = file
    outputs = load_bundle(bundle, threads)(**request)
    plain = {}
    for name, value in outputs.items():
        plain[name] = value.tolist() if isinstance(value, np.ndarray) else value
    click.echo(json.dumps(plain))
