"""Checks plain data against tables of rules. A device has no pydantic.

A rule is a function: it takes a value and returns what is wrong with it, and nothing where nothing
is. A table holds rules by key. Keys that it does not name must be plain data of usual size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

Rule = Callable[[object], str]
"""Returns what is wrong with a value; empty: nothing."""

Rules = Mapping[str, "Rule | Rules"]
"""Rules by key, or tables of rules for mappings."""

MAX_WHOLE_NUMBER = 2**53
"""The largest whole number that every reader of JSON keeps exactly."""

MAX_ENTRIES = 1_000_000
"""Entries of a list: more are no configuration."""

MAX_DEPTH = 20
"""Lists and mappings inside one another."""

MAX_SHOWN_CHARACTERS = 60
"""Characters of a wrong value that a message shows."""


def require_whole_number(low: int, high: int) -> Rule:
    """Make the rule for a whole number in a range."""

    def check(value: object) -> str:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return f"expected a whole number in {low} .. {high}, got {show_value(value)}"
        return ""

    return check


def require_number(low: float, high: float) -> Rule:
    """Make the rule for a number in a range."""

    def check(value: object) -> str:
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return ""
        return f"expected a number in {low:g} .. {high:g}, got {show_value(value)}"

    return check


def require_list(rule: Rule, *, max_length: int) -> Rule:
    """Make the rule for a list whose entries all follow one rule."""

    def check(value: object) -> str:
        if not isinstance(value, list) or len(value) > max_length:
            return f"expected a list of at most {max_length}, got {show_value(value)}"
        return next(filter(None, map(rule, value)), "")

    return check


def allow_either(first: Rule, second: Rule) -> Rule:
    """Make the rule for a value that follows one of two rules."""

    def check(value: object) -> str:
        problem = first(value)
        if problem and second(value):
            return problem
        return ""

    return check


def check_text(value: object) -> str:
    """Check a text."""
    return "" if isinstance(value, str) else f"expected a text, got {show_value(value)}"


def check_flag(value: object) -> str:
    """Check true or false."""
    return "" if isinstance(value, bool) else f"expected true or false, got {show_value(value)}"


def check_mapping(value: object) -> str:
    """Check a mapping, whatever is in it."""
    return "" if isinstance(value, dict) else f"expected a mapping, got {show_value(value)}"


def show_value(value: object) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    if len(text) > MAX_SHOWN_CHARACTERS:
        return f"{text[:MAX_SHOWN_CHARACTERS]}..."
    return text


def list_problems(data: object, rules: Rules, *, key: str = "") -> Iterator[str]:
    """List what is wrong with a mapping, each with the path of its key.

    Args:
        data: Plain data.
        rules: What is known of its keys. A key that is missing breaks no rule.
        key: The path of the mapping itself.
    """
    if not isinstance(data, dict):
        yield f"{key}: {check_mapping(data)}"
        return
    for name, value in data.items():
        path = f"{key}.{name}" if key else str(name)
        rule = rules.get(name)
        if isinstance(rule, Mapping):
            yield from list_problems(value, rule, key=path)
            continue
        problem = rule(value) if rule else _check_size(value, depth=0)
        if problem:
            yield f"{path}: {problem}"


def _check_size(value: object, *, depth: int) -> str:
    """Check that a value of which nothing is known is finite and of usual size."""
    if depth > MAX_DEPTH:
        return f"more than {MAX_DEPTH} lists and mappings inside one another"
    if isinstance(value, list | dict):
        if len(value) > MAX_ENTRIES:
            return f"more than {MAX_ENTRIES} entries"
        entries = value.values() if isinstance(value, dict) else value
        problems = (_check_size(entry, depth=depth + 1) for entry in entries)
        return next(filter(None, problems), "")
    if isinstance(value, float) and not math.isfinite(value):
        return f"expected a finite number, got {value}"
    if isinstance(value, int) and abs(value) > MAX_WHOLE_NUMBER:
        return f"expected a smaller number, got {show_value(value)}"
    return ""
