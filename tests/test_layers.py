"""Imports point down, and heavy packages enter by named doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mmcompress"
FLOORS = [
    {"errors"},
    {"registry"},
    {"records"},
    {"spec", "runtime"},
    {"models", "data", "metrics"},
    {"graph"},
    {"prune", "distill", "quantize", "export", "measure"},
    {"search", "report"},
    {"workflow"},
    {"cli"},
]
RANK = {room: i for i, floor in enumerate(FLOORS) for room in floor}
# The loader checks a spec's graph before anyone uses it; topology knows no torch and nothing above the spec.
LIFTS = {("spec", "graph.topology")}
DOORS = {
    "ray": {"search/executors.py", "search/jobs.py"},
    "onnxruntime": {"runtime/sessions.py", "quantize/precision.py", "export/shapes.py"},
    "optuna": {"search/study.py", "search/samplers.py"},
    "open_clip": {"models/open_clip.py", "models/embedded/train_clip_captioner.py"},
}
NO_TORCH = (
    "spec",
    "search",
    "report",
    "runtime",
    "records",
    "registry",
    "errors",
    "metrics",
    "data",
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "mmcompress":
            found |= {f"mmcompress.{a.name}" for a in node.names if a.name in RANK}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files() -> list[tuple[str, Path]]:
    return [
        (p.relative_to(PACKAGE).as_posix(), p)
        for p in sorted(PACKAGE.rglob("*.py"))
        if p != PACKAGE / "__init__.py"
    ]


@pytest.mark.parametrize(("name", "path"), files())
def test_imports_point_down(name, path):
    room = name.split("/")[0].removesuffix(".py")
    for module in imports(path):
        if not module.startswith("mmcompress."):
            continue
        target = module.split(".")[1]
        if any(room == r and module.startswith(f"mmcompress.{t}") for r, t in LIFTS):
            continue
        assert RANK[target] <= RANK[room], f"{name} imports {module}, a floor above"


@pytest.mark.parametrize(("package", "doors"), DOORS.items())
def test_heavy_packages_enter_by_their_doors(package, doors):
    users = {n for n, p in files() if any(m.split(".")[0] == package for m in imports(p))}
    assert users <= doors


@pytest.mark.parametrize("room", NO_TORCH)
def test_no_torch_in(room):
    for name, path in files():
        if name.split("/")[0].removesuffix(".py") == room:
            assert not any(m.split(".")[0] == "torch" for m in imports(path)), name


def test_the_runtime_runs_where_torch_cannot_be_imported():
    code = (
        "import sys\n"
        "for m in ('torch', 'transformers', 'open_clip', 'ray', 'optuna', 'onnx'): sys.modules[m] = None\n"
        "import mmcompress, mmcompress.runtime, mmcompress.report, mmcompress.cli, mmcompress.spec.loader\n"
        "from mmcompress.measure.apart import reloaded\n"
        "import mmcompress.search.knapsack, mmcompress.search.study, mmcompress.measure.bounds\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
