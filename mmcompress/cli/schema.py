"""`mmcompress schema`."""

from __future__ import annotations

import json

import click

from mmcompress.spec.schema import Spec
from mmcompress.spec.space import Space
from mmcompress.storage import describe_record


@click.command("schema")
@click.option("--space", is_flag=True, help="Of a search space, not of a spec.")
def schema_command(space: bool) -> None:
    """Print the JSON Schema of a spec, every key described; editors complete YAML files by it."""
    record_type = Space if space else Spec
    click.echo(json.dumps(describe_record(record_type), indent=1))
