"""`mmcompress device`: the commands for a device that is not this machine."""

from __future__ import annotations

import click

from mmcompress.cli.lazy_group import CommandRow, LazyGroup

DEVICE_COMMANDS = {
    "kit": CommandRow(
        target="mmcompress.cli.device_kit:kit_command",
        about="Write a folder that a device measures.",
    ),
    "measure": CommandRow(
        target="mmcompress.cli.device_measure:measure_command",
        about="Measure a kit on this device; no torch is needed.",
    ),
    "check": CommandRow(
        target="mmcompress.cli.device_check:check_command",
        about="Measure a bundle in turn with the dense one of its kit.",
    ),
}
"""The commands, in the order in which they are used."""


@click.group("device", cls=LazyGroup, commands_by_name=DEVICE_COMMANDS)
def device_command() -> None:
    """Search for a device that is not this machine: make a kit here, measure it there, search here
    or on a cluster."""
