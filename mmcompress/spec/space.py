"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmcompress.errors import suggest_nearest
from mmcompress.registry import PRECISIONS
from mmcompress.spec.loader import YamlSource
from mmcompress.spec.schema import Spec


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One dimension of a search space: a range (whole numbers with `step: 1`) or a list of choices."""

    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Space:
    """Search space: dotted paths into the spec, `*` standing for each model of the pipeline."""

    name: str
    dimensions: dict[str, Dimension]


SEARCHABLE_KEYS = (
    "nodes.*.prune.heads",
    "nodes.*.prune.ffn",
    "nodes.*.prune.tokens",
    "nodes.*.prune.drop",
    "nodes.*.precision",
    "prune.protection",
)


def load_space(path: str | Path, spec: Spec, *, fixed: frozenset[str] = frozenset()) -> Space:
    """Read a search space, spell out `*` for the models of `spec`, leave out what is `fixed`. Raises `SpecError`."""
    source = YamlSource(path)
    space = source.build(Space)
    dimensions = {}
    for dotted, d in space.dimensions.items():
        at = ("dimensions", dotted)
        if not d.choices and (d.low is None or d.high is None or d.low > d.high):
            raise source.error(at, "needs 'choices', or 'low' and 'high' with low <= high")
        keys, known = dotted.split("."), list(spec.model_nodes())
        if keys[0] == "nodes" and len(keys) > 1 and keys[1] != "*" and keys[1] not in known:
            raise source.error(at, f"unknown node '{keys[1]}'; {suggest_nearest(keys[1], known)}")
        if (
            ".".join((keys[0], "*", *keys[2:]) if keys[0] == "nodes" else keys)
            not in SEARCHABLE_KEYS
        ):
            raise source.error(
                at, f"'{dotted}' can't be searched; {suggest_nearest(dotted, SEARCHABLE_KEYS)}"
            )
        if dotted.endswith("precision") != bool(d.choices):
            raise source.error(at, "a precision takes 'choices', everything else 'low' and 'high'")
        whole = dotted.endswith("drop")
        if d.step is not None and (d.step <= 0 or (whole and d.step % 1)):
            raise source.error(
                at, f"'step' must be {'a whole number' if whole else 'a number'} greater than 0"
            )
        if problem := next((p for c in d.choices if (p := PRECISIONS.problem(c))), None):
            raise source.error(at, problem)
        low, high = (
            (1.0, 100.0) if dotted.endswith("protection") else (0.0, 1000.0 if whole else 1.0)
        )
        if not d.choices and not (low <= (d.low or 0.0) and (d.high or 0.0) <= high):
            raise source.error(at, f"must lie in {low:g} .. {high:g}")
        for name in known if keys[1] == "*" else [keys[1]]:
            if (full := dotted.replace("*", name)) not in fixed:
                dimensions[full] = replace(d, step=d.step or 1.0) if whole else d
    return Space(space.name, dimensions)
