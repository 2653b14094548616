"""`mmcompress schema`."""

from __future__ import annotations

import json

import click

from mmcompress.spec.describe_spec import describe_spec
from mmcompress.spec.space import Space
from mmcompress.storage import describe_record


@click.command("schema")
@click.option("--space", is_flag=True, help="Of a search space, not of a spec.")
def schema_command(space: bool) -> None:
    """Print the JSON Schema of a spec, every key described; editors complete YAML files by it."""
    schema = describe_record(Space) if space else describe_spec()
    click.echo(json.dumps(schema, indent=1))
