"""The search space: which keys of a spec are searched, and within which bounds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from mmcompress.errors import SpecError, suggest_nearest
from mmcompress.registry import PRECISIONS
from mmcompress.spec.loader import YamlSource
from mmcompress.spec.pipeline_templates import locate_shipped_file
from mmcompress.spec.schema import Spec

SEARCHABLE_KEYS = (
    "nodes.*.prune.heads",
    "nodes.*.prune.ffn",
    "nodes.*.prune.tokens",
    "nodes.*.prune.drop",
    "nodes.*.precision",
    "prune.protection",
)
"""Keys of a spec that can be searched; `*` stands for a model."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension of a search space: a range of numbers, or a list of choices."""

    low: float | None = None
    """The least value."""
    high: float | None = None
    """The largest value."""
    step: float | None = None
    """Distance of the values that are tried; 1 for whole numbers. Without it, every number
    between."""
    choices: tuple[str, ...] = ()
    """The values of a precision."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A search space."""

    name: str
    """Name of the space, for reports."""
    dimensions: dict[str, Dimension] = field(default_factory=dict)
    """Dimensions by dotted key of the spec; `*` stands for each model of the pipeline."""


def load_space(path: str | Path, spec: Spec, *, fixed: frozenset[str] = frozenset()) -> Space:
    """Read a search space and spell out `*` for the models of a spec.

    Args:
        path: The YAML file.
        spec: The spec that is searched.
        fixed: Dotted keys that the spec sets itself; they are left out.

    Raises:
        SpecError: A dimension is not one that can be searched, or its bounds are wrong.
    """
    source = YamlSource(path)
    space = source.build(Space)
    models = list(spec.list_model_nodes())
    errors: list[str] = []
    for dotted_key, dimension in space.dimensions.items():
        problem = _find_problem(dotted_key, dimension, models=models)
        if problem:
            errors.append(str(source.make_error(("dimensions", dotted_key), problem)))
    if errors:
        raise SpecError("\n".join(errors))
    dimensions: dict[str, Dimension] = {}
    for dotted_key, dimension in space.dimensions.items():
        if dotted_key.endswith("drop") and not dimension.step:
            dimension = replace(dimension, step=1.0)
        node = dotted_key.split(".")[1]
        for name in models if node == "*" else [node]:
            key = dotted_key.replace("*", name)
            if key not in fixed:
                dimensions[key] = dimension
    return Space(name=space.name, dimensions=dimensions)


def _find_problem(dotted_key: str, dimension: Dimension, *, models: list[str]) -> str:
    """Return what is wrong with a dimension, or an empty text."""
    low = dimension.low
    high = dimension.high
    if not dimension.choices and (low is None or high is None or low > high):
        return "needs 'choices', or 'low' and 'high' with low <= high"
    keys = dotted_key.split(".")
    is_of_node = keys[0] == "nodes"
    if is_of_node and len(keys) > 1 and keys[1] not in ("*", *models):
        return f"unknown node '{keys[1]}'; {suggest_nearest(keys[1], models)}"
    pattern = ".".join((keys[0], "*", *keys[2:])) if is_of_node else dotted_key
    if pattern not in SEARCHABLE_KEYS:
        return f"'{dotted_key}' can't be searched; {suggest_nearest(dotted_key, SEARCHABLE_KEYS)}"
    if dotted_key.endswith("precision") != bool(dimension.choices):
        return "a precision takes 'choices', everything else 'low' and 'high'"
    return _find_value_problem(dotted_key, dimension)


def _find_value_problem(dotted_key: str, dimension: Dimension) -> str:
    """Return what is wrong with the step, the choices or the bounds of a dimension, or an empty
    text."""
    is_whole = dotted_key.endswith("drop")
    step = dimension.step
    if step is not None and (step <= 0 or (is_whole and step % 1)):
        return f"'step' must be {'a whole number' if is_whole else 'a number'} greater than 0"
    for choice in dimension.choices:
        unknown = PRECISIONS.find_problem(choice)
        if unknown:
            return unknown
    min_value = 0.0
    max_value = 1.0
    if dotted_key.endswith("protection"):
        min_value = 1.0
        max_value = 100.0
    elif is_whole:
        max_value = 1000.0
    if not dimension.choices and not (
        min_value <= (dimension.low or 0.0) and (dimension.high or 0.0) <= max_value
    ):
        return f"must lie in {min_value:g} .. {max_value:g}"
    return ""


def find_default_space() -> Path:
    """Return the path of the default search space."""
    return locate_shipped_file("search_spaces", "joint.yaml")
