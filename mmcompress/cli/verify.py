"""`mmcompress verify`."""

from __future__ import annotations

import json
import sys

import click
from rich.markup import escape

from mmcompress.cli.console import out
from mmcompress.cli.options import LocalPath
from mmcompress.runtime.check_manifest import MAX_THREADS
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import describe_cpu
from mmcompress.runtime.sample_requests import Verification, verify_bundle

EXIT_ANSWERS_DIFFER = 3
"""Exit code where the bundle gives other answers here."""


@click.command("verify")
@click.argument("bundle", type=LocalPath())
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="Threads of every session (default: as measured).",
)
@click.option(
    "--provider",
    help="What sessions run on (default: as measured); `mmcompress list providers` has the names.",
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
def verify_command(bundle: str, threads: int | None, provider: str | None, as_json: bool) -> None:
    """Replay the requests that a bundle carries, and say whether its answers hold here."""
    result = verify_bundle(load_bundle(bundle, threads, provider=provider))
    if as_json:
        click.echo(json.dumps(_collect_facts(result), indent=1))
    else:
        _print_result(result)
    if not result.holds:
        sys.exit(EXIT_ANSWERS_DIFFER)


def _collect_facts(result: Verification) -> dict[str, object]:
    """Return a verification as JSON takes it."""
    return {
        "holds": result.holds,
        "differences": list(result.differences),
        "latency_ms": result.latency_ms,
        "stored_latency_ms": result.stored.latency_ms,
        "machine": describe_cpu()["name"],
        "stored_machine": result.stored.machine,
    }


def _print_result(result: Verification) -> None:
    """Print a verification for a person."""
    stored = result.stored
    for number, difference in enumerate(result.differences, 1):
        if difference:
            out.print(f"[red]request {number}: {escape(difference)}[/red]", soft_wrap=True)
    same_count = sum(not difference for difference in result.differences)
    style = "green" if result.holds else "red"
    out.print(
        f"[{style}]{same_count} of {len(result.differences)} answers are as they were on "
        f"{escape(stored.machine)}, where the bundle was written[/{style}]",
        soft_wrap=True,
    )
    out.print(
        f"the requests took a median of {result.latency_ms:.2f} ms here "
        f"({escape(describe_cpu()['name'])}), and {stored.latency_ms:.2f} ms when the bundle was "
        "written; `mmcompress bench` measures with care",
        soft_wrap=True,
    )
