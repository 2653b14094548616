"""What commands share: the console, progress, options that become overrides of a spec."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import yaml
from rich.console import Console
from rich.markup import escape

from mmcompress.errors import MissingPackage, MmcompressError, SpecError
from mmcompress.spec.loader import SpecYaml

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Progress:
    """Stages as they pass: one live line on a terminal, one line every few seconds elsewhere."""

    def __init__(self) -> None:
        self.began, self.stage, self.last = time.monotonic(), "", 0.0
        self.live = err.is_terminal
        self.status = err.status("") if self.live else None

    def __call__(self, stage: str, what: str, share: float | None) -> None:
        now = time.monotonic()
        done = "" if share is None else f" {share:4.0%}"
        line = (
            f"[dim]{now - self.began:5.0f} s[/dim]  [bold]{stage:<12}[/bold]{done}  {escape(what)}"
        )
        fresh = stage != self.stage or share is None
        self.stage = stage
        if self.status:
            self.status.start()
            self.status.update(line)
            if share is None:
                err.print(line)
        elif fresh or now - self.last > 10:
            self.last = now
            err.print(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.status:
            self.status.stop()


COMPRESS = ("torch", "torchvision", "open_clip", "transformers", "optuna", "safetensors", "scipy")
"""Packages that the plain install lacks."""


class Group(click.Group):
    """Turns the project's errors into one line and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            try:
                return super().invoke(ctx)
            except ModuleNotFoundError as e:
                if (package := (e.name or "").partition(".")[0]) in COMPRESS:
                    raise MissingPackage(package, "compress") from e
                raise
        except MmcompressError as e:
            err.print(f"[red]error:[/red] {escape(str(e))}", soft_wrap=True)
            ctx.exit(e.exit_code)


def parse_settings(pairs: tuple[str, ...], **named: Any) -> dict[str, Any]:
    """`--set a.b=c` and the options that stand for one."""
    found = {k.replace("__", "."): v for k, v in named.items() if v is not None}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"--set {pair}: expected a.b=value")
        try:
            found[key.strip()] = yaml.load(value, Loader=SpecYaml)
        except yaml.YAMLError as e:
            raise SpecError(f"--set {pair}: '{value}' is not a YAML value") from e
    return found


def add_run_options(f: Callable) -> Callable:
    for option in reversed(
        [
            click.option(
                "--space",
                type=click.Path(),
                help="Search space (default: search_spaces/joint.yaml).",
            ),
            click.option(
                "--target", help="2x, 12ms or '12ms p95'; several with commas between them."
            ),
            click.option("--trials", type=int, help="Trials of the search."),
            click.option("--workers", type=int, help="Trials at a time."),
            click.option(
                "--ray-address",
                help="The Ray cluster this machine is part of: 'auto' or HOST:PORT (default: a local Ray).",
            ),
            click.option(
                "--device",
                type=click.Path(),
                help="Readings of another device: the target is for that one.",
            ),
            click.option("--seed", type=int, help="Seed of data, search and training."),
            click.option(
                "--set",
                "sets",
                multiple=True,
                metavar="A.B=C",
                help="Override any key of the spec.",
            ),
        ]
    ):
        f = option(f)
    return f


def default_folder(spec: str, changes: dict[str, Any], *, kind: str = "") -> str:
    """`runs/NAME-TARGET-sSEED`, or with what else it holds in place of the seed."""
    from mmcompress.graph.load_spec import load_spec

    loaded = load_spec(spec, changes)
    return f"runs/{loaded.name}-{loaded.target.replace(' ', '')}-{kind or f's{loaded.seed}'}"


def collect_overrides(
    target: Any,
    trials: Any,
    *,
    workers: Any,
    ray_address: Any,
    device: Any,
    seed: Any,
    sets: tuple[str, ...],
) -> dict[str, Any]:
    named = {
        "search__trials": trials,
        "search__workers": workers,
        "search__ray_address": ray_address,
    }
    return parse_settings(sets, target=target, measure__device=device, seed=seed, **named)
