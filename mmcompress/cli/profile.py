"""`mmcompress profile`."""

from __future__ import annotations

import click

from mmcompress.cli.options import LocalPath, name_profile_folder, parse_settings, set_option
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import resolve_entry

PROFILE_SPEC = "mmcompress.cli.profile_tables:profile_spec"
"""What does the work; it takes torch."""


@click.command("profile")
@click.argument("spec", type=LocalPath())
@click.option(
    "--out", "folder", type=LocalPath(), help="Where to keep it (default: runs/NAME-profile)."
)
@click.option("--resume", is_flag=True, help="Go on with the profile in the folder.")
@set_option
def profile_command(spec: str, folder: str | None, resume: bool, settings: tuple[str, ...]) -> None:
    """Measure the dense pipeline: per node and block, with the modality of every layer."""
    overrides = parse_settings(settings)
    # A wrong spec is told before torch is imported.
    load_spec(spec, overrides)
    place = folder or name_profile_folder(spec, overrides)
    resolve_entry(PROFILE_SPEC)(spec, place, overrides=overrides, resume=resume or not folder)
