"""Options that several commands have, and the overrides of a spec that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import yaml

from mmcompress.errors import SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.spec.durations import parse_max_time
from mmcompress.spec.loader import SpecYaml
from mmcompress.spec.overrides import SHORT_FORMS
from mmcompress.spec.storage_urls import is_remote

Command = TypeVar("Command", bound=Callable[..., Any])


class LocalPath(click.Path):
    """A file or folder of this machine. A storage URL is refused, with what helps."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if is_remote(str(value)):
            raise SpecError(
                f"{value}: expected a path of this machine. `run` and `submit` keep a run at a "
                f"storage URL; to copy one from there: mmcompress fetch {value} --out FOLDER"
            )
        return super().convert(value, param=param, ctx=ctx)


def check_max_time(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> str | None:
    """Return the text of a time that can be read. What is none is told before anything is loaded.

    Raises:
        SpecError: It is none.
    """
    if value is not None:
        parse_max_time(value)
    return value


space_option = click.option(
    "--space", type=LocalPath(), help="Search space (default: search_spaces/joint.yaml)."
)
set_option = click.option(
    "--set", "settings", multiple=True, metavar="A.B=C", help="Override any key of the spec."
)
address_option = click.option(
    "--address", required=True, metavar="http://HOST:8265", help="The cluster's job server."
)
resume_option = click.option(
    "--resume", is_flag=True, help="Go on in the folder; nothing that is finished is lost."
)
from_option = click.option(
    "--from",
    "from_run",
    type=LocalPath(),
    help="An earlier run: what it measured of the same dense pipeline is taken over.",
)
max_time_option = click.option(
    "--max-time",
    metavar="2h",
    callback=check_max_time,
    help="What this command may take (2h, 30m, 5400s): less is searched, trained and measured. "
    "With --resume, the time of commands before it does not count.",
)

target_option = click.option(
    "--target", help="2x, 12ms or '12ms p95'; several with commas between them."
)
effort_option = click.option(
    "--effort",
    type=click.Choice(["quick", "normal", "best"]),
    help="How much is searched, trained and measured; --set still wins.",
)

RUN_OPTIONS = (
    space_option,
    target_option,
    effort_option,
    click.option(
        "--trials",
        type=int,
        help="Trials of all rounds of the search together (search.trials and search.max_trials).",
    ),
    click.option(
        "--workers",
        type=int,
        help="Trials at a time, each in a process of Ray; 0: one at a time in this process.",
    ),
    click.option(
        "--ray-address",
        help="A running Ray cluster: 'auto' or HOST:PORT (default: a local Ray).",
    ),
    click.option(
        "--device",
        type=LocalPath(),
        help="Readings of another device: the target is for that device.",
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        default=None,
        help="The same trials and structure for any number of workers, and after an interruption.",
    ),
    click.option("--seed", type=int, help="Seed of data, search and training."),
    set_option,
)
"""The options of every command that searches."""


def add_run_options(command: Command) -> Command:
    """Give a command the options of every command that searches."""
    for option in reversed(RUN_OPTIONS):
        command = option(command)
    return command


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """Read `--set a.b=c`.

    Raises:
        SpecError: A setting has no `=`, or its value is not YAML.
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise SpecError(f"--set {setting}: expected a.b=value")
        try:
            overrides[key.strip()] = yaml.load(value, Loader=SpecYaml)
        except yaml.YAMLError as error:
            raise SpecError(f"--set {setting}: '{value}' is not a YAML value") from error
    return overrides


def collect_overrides(settings: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """Return the overrides of a spec that the options of a command stand for.

    Args:
        settings: What `--set` says; it comes after the other options.
        options: The values of the options in `SHORT_FORMS`; None where one is not given.
    """
    overrides: dict[str, Any] = {}
    for option, key in SHORT_FORMS.items():
        if options.get(option) is not None:
            overrides[key] = options[option]
    if "search.trials" in overrides:
        overrides["search.max_trials"] = overrides["search.trials"]
    if overrides.get("search.workers") == 0:
        overrides |= {"search.workers": 1, "search.executor": "inline"}
    return overrides | parse_settings(settings)


def choose_default_folder(spec_path: str, overrides: dict[str, Any], *, kind: str = "") -> str:
    """Return `runs/NAME-TARGET-sSEED`, or with another ending in place of the seed.

    Args:
        spec_path: The spec file.
        overrides: Values by dotted key that replace those of the spec.
        kind: The ending; empty for the seed.
    """
    spec = load_spec(spec_path, overrides)
    ending = kind or f"s{spec.seed}"
    return f"runs/{spec.name}-{spec.target.replace(' ', '')}-{ending}"


def name_profile_folder(spec_path: str, overrides: dict[str, Any]) -> str:
    """Return `runs/NAME-profile`."""
    return f"runs/{load_spec(spec_path, overrides).name}-profile"


def split_names(text: str | None) -> tuple[str, ...]:
    """Split names with commas between them; none when nothing is given."""
    if not text:
        return ()
    return tuple(name.strip() for name in text.split(","))
