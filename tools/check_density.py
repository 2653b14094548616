"""Measures how dense the code of the package is, and fails for what must not be there.

    python tools/check_density.py            prints the table; exit code 1 when a limit is broken
                                             on what is counted exactly
    python tools/check_density.py --places   prints the places of everything that is counted exactly
    as well

A limit on density keeps code readable where a limit on length only squeezes it. A function may have
sixty plain lines, but not twenty that must be decoded.

Definitions. A code line is not blank, not a comment, and not part of a docstring or of a string
that stands alone. AST nodes leave out Load, Store and Del. A described field is a string that
stands under an assignment. A constant is a name in capitals that a module assigns. It is explained
by a string under it, or by a comment above it or at its line.

A function of our own is one whose name the package defines as a function, a method or a class. A
call of a module that the file imports from elsewhere is not one. `PROTOCOLS` are apart.
A statement with a body, such as a loop, counts without its body.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mmcompress"

LINE_LENGTH = 100
"""Columns of a line."""

MANY_POSITIONAL = 5
"""Positional arguments from which on a call is counted."""

CONSTANT_NAME = re.compile("_?[A-Z][A-Z0-9_]*")
"""Names of constants and registries."""

PROTOCOL_NAMES = ("ENTRY",)
"""Constants that several modules define, since a registry string finds each by the same name. The
docstring of the module explains it."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

OWN_POSITIONAL = 3
"""Positional arguments from which on a call of a function of our own is counted."""

PROTOCOLS = frozenset({"add", "forward"})
"""Names whose calls may have more: rows of registries, and what torch calls."""

BODIES = ("body", "orelse", "finalbody", "handlers", "cases")
"""Fields of a statement that hold other statements."""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    name: str
    """What is measured."""
    limit: float
    """The figure to reach: at most this, or at least this when `at_least`."""
    is_exact: bool = False
    """Whether each count is a place that can be mended: only then does the check fail."""
    at_least: bool = False
    """Whether more is better."""

    def holds(self, value: float) -> bool:
        """Return whether a value reaches the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


FIGURES = {
    "nodes": Figure("AST nodes per line of code", 6.4),
    "comments": Figure("comment lines and described fields per 1,000 lines", 40, at_least=True),
    "one_word": Figure("% of module-level functions named by one word", 25),
    "short": Figure("% of local names of one or two letters (but i, j, k)", 10),
    "lambdas": Figure("lambdas bound to a name", 0, is_exact=True),
    "tuples": Figure("tuple assignments per 1,000 lines", 1, is_exact=True),
    "positional": Figure(
        "calls with five or more positional arguments per 1,000 lines", 2, is_exact=True
    ),
    "own_positional": Figure(
        "calls of own functions with three or more positional arguments", 0, is_exact=True
    ),
    "records": Figure("records without kw_only", 0, is_exact=True),
    "comprehensions": Figure("statements with several comprehensions", 0, is_exact=True),
    "splats": Figure("calls that splat a tuple per 1,000 lines", 1, is_exact=True),
    "keyword": Figure("% of functions with a keyword-only parameter", 10, at_least=True),
    "nested": Figure("nested comprehensions", 15, is_exact=True),
    "inside": Figure("imports of own modules inside functions", 0, is_exact=True),
    "any": Figure("Any per 1,000 lines", 5, is_exact=True),
    "repeated": Figure("constants whose name is taken by another module", 0, is_exact=True),
    "unexplained": Figure("constants without a string or a comment", 0, is_exact=True),
    "long": Figure("lines over 100 characters per 1,000 lines", 0, is_exact=True),
}
"""The table, in the order in which it is printed."""


@dataclass
class Counts:
    """What was counted in all files."""

    totals: Counter[str] = field(default_factory=Counter)
    """Counts by name."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """`file:line` of what is counted exactly, by figure."""
    constants: set[str] = field(default_factory=set)
    """Names of the constants of all files so far."""
    own_names: frozenset[str] = frozenset()
    """Names of the functions, methods and classes of the package."""

    def add_place(self, figure: str, path: Path, line: int) -> None:
        """Count one thing at a place."""
        self.totals[figure] += 1
        name = path.relative_to(PACKAGE.parent)
        self.places.setdefault(figure, []).append(f"{name}:{line}")


def standalone_string_lines(tree: ast.AST) -> set[int]:
    """Return the lines of docstrings and of strings that stand alone."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if _is_standalone_string(node):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def _is_standalone_string(node: ast.AST) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def count_described_lines(tree: ast.AST) -> int:
    """Return how many lines of strings stand under an assignment."""
    count = 0
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for before, after in pairwise(body):
            if isinstance(before, ast.Assign | ast.AnnAssign) and _is_standalone_string(after):
                count += (after.end_lineno or after.lineno) - after.lineno + 1
    return count


def own_imports_inside(function: ast.AST) -> Iterator[ast.stmt]:
    """Yield the imports of own modules within a function."""
    for node in ast.walk(function):
        if isinstance(node, ast.ImportFrom):
            first_name = (node.module or "").split(".")[0]
            if node.level or first_name == PACKAGE.name:
                yield node
        elif isinstance(node, ast.Import):
            first_names = [alias.name.split(".")[0] for alias in node.names]
            if PACKAGE.name in first_names:
                yield node


def list_comment_lines(text: str) -> set[int]:
    """List the lines that hold a comment that is not for a tool."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:")):
            lines.add(token.start[0])
    return lines


def list_constants(statement: ast.stmt) -> list[str]:
    """List the constants that a statement of a module assigns."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if CONSTANT_NAME.fullmatch(name) and name not in PROTOCOL_NAMES]


def count_constants(tree: ast.Module, path: Path, *, comments: set[int], counts: Counts) -> None:
    """Add the constants of one file that share a name or that nothing explains."""
    for i, statement in enumerate(tree.body):
        names = list_constants(statement)
        for name in names:
            if name in counts.constants:
                counts.add_place("repeated", path, statement.lineno)
            counts.constants.add(name)
        after = tree.body[i + 1] if i + 1 < len(tree.body) else None
        is_described = after is not None and _is_standalone_string(after)
        last_line = statement.end_lineno or statement.lineno
        near_lines = range(statement.lineno - 1, last_line + 1)
        if names and not is_described and comments.isdisjoint(near_lines):
            counts.add_place("unexplained", path, statement.lineno)


def list_own_names(paths: list[Path]) -> frozenset[str]:
    """List the names of all functions, methods and classes of some files."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
    return frozenset(names - PROTOCOLS)


def list_foreign_modules(tree: ast.Module) -> set[str]:
    """List the names under which a file imports modules of others."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return names - {PACKAGE.name}


def count_own_calls(tree: ast.Module, path: Path, counts: Counts) -> None:
    """Add the calls of own functions that have too many positional arguments."""
    foreign_modules = list_foreign_modules(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) < OWN_POSITIONAL:
            continue
        first_name = ast.unparse(node.func).split(".")[0]
        last_name = ast.unparse(node.func).split(".")[-1]
        if last_name in counts.own_names and first_name not in foreign_modules:
            counts.add_place("own_positional", path, node.lineno)


def is_positional_record(node: ast.ClassDef) -> bool:
    """Return whether a class is a dataclass whose fields may be given by position."""
    for decorator in node.decorator_list:
        text = ast.unparse(decorator)
        if text.split("(")[0].endswith("dataclass") and "kw_only=True" not in text:
            return any(_is_field(statement) for statement in node.body)
    return False


def _is_field(statement: ast.stmt) -> bool:
    is_annotated = isinstance(statement, ast.AnnAssign)
    return is_annotated and "ClassVar" not in ast.unparse(statement.annotation)


def count_comprehensions(statement: ast.stmt) -> int:
    """Return how many comprehensions a statement has, those of its body left out."""
    inner: list[ast.AST] = []
    for name, value in ast.iter_fields(statement):
        parts = value if isinstance(value, list) else [value]
        if name not in BODIES:
            inner += [part for part in parts if isinstance(part, ast.AST)]
    count = 0
    for part in inner:
        count += sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(part))
    return count


def count_file(path: Path, counts: Counts) -> None:
    """Add what one file holds."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    strings = standalone_string_lines(tree)
    rows = text.splitlines()
    counts.totals["lines"] += len(rows)
    for number, row in enumerate(rows, 1):
        stripped = row.strip()
        if stripped and not stripped.startswith("#") and number not in strings:
            counts.totals["code"] += 1
        if len(row) > LINE_LENGTH:
            counts.add_place("long", path, number)
    comments = list_comment_lines(text)
    counts.totals["comments"] += len(comments) + count_described_lines(tree)
    count_constants(tree, path, comments=comments, counts=counts)
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            counts.totals["module functions"] += 1
            counts.totals["one_word"] += "_" not in statement.name.strip("_")
    count_own_calls(tree, path, counts)
    for node in ast.walk(tree):
        count_node(node, path, counts)
        if isinstance(node, ast.ClassDef) and is_positional_record(node):
            counts.add_place("records", path, node.lineno)
        if isinstance(node, ast.stmt) and count_comprehensions(node) > 1:
            counts.add_place("comprehensions", path, node.lineno)


def count_node(node: ast.AST, path: Path, counts: Counts) -> None:
    """Add one node of a syntax tree."""
    if not isinstance(node, ast.Load | ast.Store | ast.Del):
        counts.totals["nodes"] += 1
    if isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Store):
            counts.totals["stores"] += 1
            is_short = len(node.id.strip("_")) <= 2 and node.id not in ("_", "i", "j", "k")
            counts.totals["short"] += is_short
        if node.id == "Any":
            counts.add_place("any", path, node.lineno)
    elif isinstance(node, ast.Assign):
        if isinstance(node.value, ast.Lambda):
            counts.add_place("lambdas", path, node.lineno)
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            counts.add_place("tuples", path, node.lineno)
    elif isinstance(node, ast.Call):
        if len(node.args) >= MANY_POSITIONAL:
            counts.add_place("positional", path, node.lineno)
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            counts.add_place("splats", path, node.lineno)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        counts.totals["functions"] += 1
        counts.totals["keyword"] += bool(node.args.kwonlyargs)
        for statement in own_imports_inside(node):
            counts.add_place("inside", path, statement.lineno)
    elif isinstance(node, COMPREHENSIONS):
        inner = [other for other in ast.walk(node) if other is not node]
        if any(isinstance(other, COMPREHENSIONS) for other in inner):
            counts.add_place("nested", path, node.lineno)


def compute_values(totals: Counter[str]) -> dict[str, float]:
    """Return the value of every figure."""
    per_1000 = 1000 / max(totals["lines"], 1)
    values = {
        "nodes": totals["nodes"] / max(totals["code"], 1),
        "one_word": 100 * totals["one_word"] / max(totals["module functions"], 1),
        "short": 100 * totals["short"] / max(totals["stores"], 1),
        "keyword": 100 * totals["keyword"] / max(totals["functions"], 1),
    }
    for name in ("comments", "tuples", "positional", "splats", "any", "long"):
        values[name] = totals[name] * per_1000
    counted_names = ("lambdas", "nested", "inside", "repeated", "unexplained")
    for name in (*counted_names, "own_positional", "records", "comprehensions"):
        values[name] = totals[name]
    return values


def main() -> int:
    """Print the table; return 1 when a limit on what is counted exactly is broken."""
    paths = sorted(PACKAGE.rglob("*.py"))
    counts = Counts(own_names=list_own_names(paths))
    for path in paths:
        count_file(path, counts)
    values = compute_values(counts.totals)
    broken = 0
    print(f"{counts.totals['lines']} lines, {counts.totals['functions']} functions")
    print(f"{'now':>8}  {'to reach':>8}")
    for name, figure in FIGURES.items():
        holds = figure.holds(values[name])
        broken += figure.is_exact and not holds
        mark = "" if holds else "  <-- not reached"
        print(f"{values[name]:8.1f}  {figure.limit:8g}  {figure.name}{mark}")
        if figure.is_exact and (not holds or "--places" in sys.argv):
            for place in counts.places.get(name, []):
                print(f"{'':20}{place}")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
