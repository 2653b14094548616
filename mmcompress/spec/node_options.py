"""Options of a node that only some kinds have: what an entry says of each, and how a spec's values
are checked against it.

In a spec, they stand beside the keys that every node has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mmcompress.errors import shorten, suggest_nearest
from mmcompress.registry import NODE_KINDS

OptionValue = int | float | str
"""A value of an option."""

TYPE_NAMES: Mapping[type, tuple[str, str]] = {
    int: ("integer", "a whole number"),
    float: ("number", "a number"),
    str: ("string", "a text"),
}
"""How the JSON Schema and an error call the type of a value."""


@dataclass(frozen=True, kw_only=True)
class NodeOption:
    """An option that a kind of node has. Kinds that share one share its record."""

    about: str
    """What it says, as `mmcompress schema` shows it."""
    default: OptionValue
    """The value where a spec names none. Its type is that of the option."""
    minimum: float | None = None
    """The smallest number; None for texts."""
    maximum: float | None = None
    """The largest number; None for texts."""
    is_file: bool = False
    """Whether it names a file, which may be relative to the folder of the spec."""

    def check(self, value: object) -> str:
        """Return what is wrong with a value, or an empty text."""
        wanted = type(self.default)
        accepted = (int, float) if wanted is float else (wanted,)
        if isinstance(value, bool) or not isinstance(value, accepted):
            return f"expected {TYPE_NAMES[wanted][1]}, got {shorten(repr(value))}"
        if self.minimum is None or self.maximum is None or isinstance(value, str):
            return ""
        if self.minimum <= float(value) <= self.maximum:
            return ""
        return f"must lie in {self.minimum:g} .. {self.maximum:g}, got {shorten(repr(value))}"

    def describe(self) -> dict[str, object]:
        """Return its JSON Schema."""
        schema: dict[str, object] = {
            "default": self.default,
            "description": self.about,
            "type": TYPE_NAMES[type(self.default)][0],
        }
        for key, bound in (("minimum", self.minimum), ("maximum", self.maximum)):
            if bound is not None:
                schema[key] = type(self.default)(bound)
        return schema


@dataclass(frozen=True, kw_only=True)
class SortedKeys:
    """The keys of a node in a spec, sorted by who knows them."""

    common: dict[str, object]
    """Those that every node has."""
    options: dict[str, OptionValue]
    """Those of its kind, complete with defaults."""
    problems: dict[str, str] = field(default_factory=dict)
    """What is wrong with a key, by key."""


def list_options(kind_name: str) -> Mapping[str, NodeOption]:
    """Return the options of a kind of node by name."""
    options: Mapping[str, NodeOption] = NODE_KINDS.get(kind_name).options
    return options


def list_all_options() -> dict[str, NodeOption]:
    """Return the options of all kinds by name; of equal names, the first one."""
    options: dict[str, NodeOption] = {}
    for kind_name in NODE_KINDS.list_names():
        for name, option in list_options(kind_name).items():
            options.setdefault(name, option)
    return options


def list_file_options() -> list[str]:
    """Return the options that name files, of all kinds."""
    return [name for name, option in list_all_options().items() if option.is_file]


def list_owners(option: str) -> list[str]:
    """Return the kinds of node that have an option."""
    return [name for name in NODE_KINDS.list_names() if option in list_options(name)]


def sort_keys(data: Mapping[str, object], common_keys: Collection[str]) -> SortedKeys:
    """Sort the keys of a node, and check those of its kind.

    Args:
        data: The node as plain data.
        common_keys: Keys that every node has.
    """
    kind_name = data.get("kind")
    is_known = isinstance(kind_name, str) and NODE_KINDS.find_problem(kind_name) is None
    own_options = list_options(kind_name) if isinstance(kind_name, str) and is_known else {}
    common: dict[str, object] = {}
    values = {name: option.default for name, option in own_options.items()}
    problems: dict[str, str] = {}
    for key, value in data.items():
        problem = ""
        if key in common_keys:
            common[key] = value
        elif key in own_options:
            problem = own_options[key].check(value)
            if isinstance(value, int | float | str):
                values[key] = type(own_options[key].default)(value) if not problem else value
        elif owners := list_owners(key):
            # Of a kind that nobody knows, no option is wrong. A default changes nothing.
            is_default = value == list_all_options()[key].default
            if is_known and not is_default:
                problem = f"a {kind_name} has no {key}, only {' and '.join(owners)}"
        else:
            nearest = suggest_nearest(key, [*common_keys, *own_options])
            problem = f"unknown key '{shorten(key)}'; {nearest}"
        if problem:
            problems[key] = problem
    return SortedKeys(common=common, options=values, problems=problems)
