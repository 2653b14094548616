"""Imports point down, heavy packages enter by named doors, and no room knows a node kind by its name."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from dataclasses import asdict
from functools import cache
from pathlib import Path

import check_density
import pytest

from mmcompress.errors import MissingPackage
from mmcompress.graph.ports import INNER_TYPES
from mmcompress.registry import INPUT_TYPES, NODE_KINDS, PLUG_POINTS, resolve_entry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmcompress"
OWN_KINDS = tuple(sorted(path.parent.name for path in PACKAGE.glob("kinds/*/entry.py")))
"""Kinds of the project: tests of plug-ins in the same process add others to the registry."""
DOORS = {
    "ray": {
        "search/ray_executor.py",
        "search/jobs.py",
        "search/cluster_nodes.py",
        "run/compress/train_on_ray.py",
        "run/measure_on_ray.py",
    },
    "aiohttp": {"search/jobs.py"},
    "optuna": {
        "search/database_study.py",
        "search/ordered_study.py",
        "search/search_session.py",
        "search/study.py",
        "search/trial_writer.py",
        "search/sampling.py",
        "search/samplers.py",
        "search/cma_sampler.py",
    },
    "open_clip": {"models/families/open_clip.py", "models/reference/open_clip.py"},
    "jiwer": {"metrics/wer.py"},
    "cmaes": {"search/cma_sampler.py"},
    "emoji": {"data/emoji_characters.py"},
    "soundfile": {"runtime/sound_files.py"},
    "soxr": {"runtime/sound_files.py"},
    "altair": {f"report/charts/{path.name}" for path in PACKAGE.glob("report/charts/[a-z]*.py")},
    "vl_convert": {"report/charts/vega.py"},
    "mlflow": {"report/trackers/mlflow.py"},
}
"""Where an optional package may be imported."""


def files() -> list[tuple[str, Path]]:
    found = [(p.relative_to(PACKAGE).as_posix(), p) for p in sorted(PACKAGE.rglob("*.py"))]
    return [(name, path) for name, path in found if name != "__init__.py"]


@cache
def parse_file(path: Path) -> ast.Module:
    """Every test here reads the same files."""
    return ast.parse(path.read_text())


@cache
def list_nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file: a walk over the whole package takes a second."""
    return list(ast.walk(parse_file(path)))


@cache
def imported_packages(path: Path) -> frozenset[str]:
    packages = set()
    for node in list_nodes(path):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            packages.add(node.module.split(".")[0])
    return frozenset(packages)


def test_the_floors_hold():
    """Layers, sideways and transitive imports, and the torch-free rooms: the contracts of pyproject.toml."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("package", "doors"), DOORS.items())
def test_heavy_packages_enter_by_their_doors(package, doors):
    users = {name for name, path in files() if package in imported_packages(path)}
    assert users <= doors


def _strings(path: Path) -> list[tuple[int, str]]:
    """Every string of a file that is no docstring and no description."""
    nodes = list_nodes(path)
    alone = {id(n.value) for n in nodes if isinstance(n, ast.Expr)}
    return [
        (n.lineno, n.value)
        for n in nodes
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in alone
    ]


def _kind_assignments(path: Path) -> set[int]:
    """Lines on which a model says of which kind it is: `kind = "image_encoder"`."""
    lines = set()
    for node in list_nodes(path):
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "kind" for t in node.targets
        ):
            lines.add(node.lineno)
    return lines


def _imported_modules(path: Path) -> set[str]:
    nodes = list_nodes(path)
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_no_room_imports_the_folder_of_a_node_kind():
    folders = tuple(f"mmcompress.kinds.{name}" for name in OWN_KINDS)
    users = []
    for name, path in files():
        if not name.startswith("kinds/"):
            users += [(name, m) for m in _imported_modules(path) if m.startswith(folders)]
    assert users == []


LIBRARY_WORDS = {
    ("models/families/cross_attention_decoder.py", "text_decoder"),
    ("models/families/open_clip.py", "text_decoder"),
    ("models/families/image_processors.py", "nearest"),
}
"""Attributes of libraries, and their names of interpolations: they only sound like a kind."""


def test_no_room_asks_for_a_node_kind_by_name():
    """A kind is named in its folder, in the registry, and where a model says its own kind."""
    kinds = set(OWN_KINDS)
    named = []
    for name, path in files():
        if name.startswith("kinds/") or name == "registry.py":
            continue
        own = _kind_assignments(path)
        named += [
            f"{name}:{line}: {text}"
            for line, text in _strings(path)
            if text in kinds and line not in own and (name, text) not in LIBRARY_WORDS
        ]
    assert named == []


@pytest.mark.parametrize("package", DOORS)
def test_a_door_imports_its_package_at_the_top(package):
    for name in DOORS[package]:
        top = ast.Module(body=parse_file(PACKAGE / name).body, type_ignores=[])
        statements = [n for n in top.body if isinstance(n, ast.Import | ast.ImportFrom)]
        packages = set()
        for statement in statements:
            module = getattr(statement, "module", None) or statement.names[0].name
            packages.add(module.split(".")[0])
        assert package in packages, name


@pytest.mark.parametrize(
    ("package", "target", "extra"),
    [
        ("ray", "mmcompress.search.ray_executor:RayExecutor", "compress"),
        ("ray", "mmcompress.search.jobs:submit_run", "compress"),
        ("cmaes", "mmcompress.search.cma_sampler:make_cmaes", "compress"),
        ("jiwer", "mmcompress.metrics.wer:score_word_errors", "compress"),
        ("emoji", "mmcompress.data.emoji_characters:list_characters", "compress"),
        ("soundfile", "mmcompress.runtime.sound_files:decode_sound", "audio"),
        ("soxr", "mmcompress.runtime.sound_files:check_header", "audio"),
    ],
)
def test_a_missing_package_is_told_with_its_extra(monkeypatch, package, target, extra):
    module, attribute = target.split(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    loaded = [name for name in sys.modules if name.startswith(f"{package}.")]
    for name in (module, *loaded):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"'{package}.*\[{extra}\]"):
        resolve_entry(target)


def test_samples_need_no_library_for_sound():
    code = (
        "import sys\n"
        "for m in ('soundfile', 'soxr'): sys.modules[m] = None\n"
        "import numpy, mmcompress.kinds.audio_encoder.deployed\n"
        "from mmcompress.runtime.audio import open_audio\n"
        "assert len(open_audio(numpy.zeros(16))) == 16\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("point", PLUG_POINTS)
def test_every_string_that_names_code_is_right(point):
    registry = PLUG_POINTS[point]
    for name in registry.list_names():
        try:
            assert registry.get(name) is not None, name
        except MissingPackage:
            # Of what is not part of a checkout, the file itself is asked.
            module, _, attribute = registry._entries[name].target.partition(":")
            body = parse_file(ROOT / f"{module.replace('.', '/')}.py").body
            assert attribute in {getattr(node, "name", "") for node in body}, name


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_a_kind_of_node_names_its_two_sides(kind):
    entry = NODE_KINDS.get(kind)
    assert callable(resolve_entry(entry.deployed)) and callable(resolve_entry(entry.trainable))


def test_the_ports_of_every_kind_have_known_types():
    known = {*INPUT_TYPES.list_names(), *INNER_TYPES}
    for kind in OWN_KINDS:
        entry = NODE_KINDS.get(kind)
        types = {*entry.outputs.values()}
        for port in entry.inputs.values():
            types |= set(port.types)
        assert types <= known, kind


@pytest.mark.parametrize("name", INPUT_TYPES.list_names())
def test_a_type_of_input_names_functions_that_are_there(name):
    for target in asdict(INPUT_TYPES.get(name)).values():
        assert not target or callable(resolve_entry(target)), target


@pytest.mark.parametrize("kind", OWN_KINDS)
def test_a_model_kind_names_how_its_library_is_compared(kind):
    entry = NODE_KINDS.get(kind)
    assert bool(entry.fidelity) == entry.is_model
    assert not entry.fidelity or callable(resolve_entry(entry.fidelity))


def test_no_room_asks_for_a_type_of_input_by_name():
    """A type is named where its record is, and where a kind, a dataset or a port says its own."""
    types = {"image", "audio"}
    asked = []
    for name, path in files():
        for node in list_nodes(path):
            if isinstance(node, ast.Compare):
                values = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                asked += [f"{name}:{node.lineno}" for v in values if v in types]
    assert asked == []


def test_the_runtime_runs_where_torch_cannot_be_imported():
    code = (
        "import sys\n"
        "for m in ('torch', 'transformers', 'open_clip', 'ray', 'optuna', 'onnx', 'pydantic'): sys.modules[m] = None\n"
        "import mmcompress, mmcompress.runtime, mmcompress.kinds.text_decoder.deployed\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_light_install_plans_and_reports_where_torch_cannot_be_imported():
    code = (
        "import sys\n"
        "for m in ('torch', 'transformers', 'open_clip', 'ray'): sys.modules[m] = None\n"
        "import mmcompress, mmcompress.report.page, mmcompress.cli, mmcompress.graph.load_spec\n"
        "from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated\n"
        "import mmcompress.measure.devices.measure_kit, mmcompress.measure.devices.bundle_check\n"
        "import mmcompress.results.target_met\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_what_the_contracts_call_torch_free_is_imported_where_torch_is_not():
    """The contracts follow import statements; this test follows what an import runs."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = []
    for contract in settings["tool"]["importlinter"]["contracts"]:
        if contract["id"].startswith("torch-free"):
            names += contract["source_modules"]
    assert "mmcompress.search.split_by_knapsack" in names and "mmcompress.search.study" in names
    # A None in `sys.modules` would not do: scipy, which cmaes imports, looks for torch in there.
    code = (
        "import importlib, pkgutil, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'transformers', 'open_clip'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        "    for inner in pkgutil.walk_packages(getattr(module, '__path__', ()), name + '.'):\n"
        "        try:\n"
        "            importlib.import_module(inner.name)\n"
        "        except ModuleNotFoundError as error:\n"
        "            # It is not part of a checkout.\n"
        "            if error.name != 'mlflow':\n"
        "                raise\n"
    )
    plain = [name for name in names if "*" not in name]
    for kind in OWN_KINDS:
        plain += [f"mmcompress.kinds.{kind}.entry", f"mmcompress.kinds.{kind}.deployed"]
    subprocess.run([sys.executable, "-c", code, *plain], check=True, timeout=120)


def test_a_constant_is_named_once_and_explained():
    counts = check_density.Counts()
    sources = (
        'LIMIT = 1\n"""Seconds."""\n# Metres.\nREACH: int = 2\nWIDE = (  # columns\n    3,\n)\n',
        'LIMIT = 4\n"""Bytes."""\nBARE = 5\nlower = 6\nENTRY = 7\n',
    )
    for i, text in enumerate(sources):
        comments = check_density.list_comment_lines(text)
        path = PACKAGE / f"{i}.py"
        check_density.count_constants(ast.parse(text), path, comments=comments, counts=counts)
    assert counts.places == {
        "repeated": ["mmcompress/1.py:1"],
        "unexplained": ["mmcompress/1.py:3"],
    }


def test_calls_records_and_comprehensions_are_counted():
    text = (
        "import click\n"
        "def run_it(spec, folder, target):\n"
        "    return [a for a in spec], [b for b in folder]\n"
        "run_it(1, 2, 3)\n"
        "run_it(1, 2, target=3)\n"
        "click.run_it(1, 2, 3)\n"
        "@dataclass(frozen=True)\n"
        "class Place:\n"
        "    path: str\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Named:\n"
        "    path: str\n"
        "for row in [a for a in b]:\n"
        "    rows = [a for a in row]\n"
    )
    tree = ast.parse(text)
    path = PACKAGE / "a.py"
    counts = check_density.Counts(own_names=frozenset({"run_it"}))
    check_density.count_own_calls(tree, path, counts)
    assert counts.places == {"own_positional": ["mmcompress/a.py:4"]}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [check_density.is_positional_record(node) for node in classes] == [True, False]
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    several = [node.lineno for node in statements if check_density.count_comprehensions(node) > 1]
    assert several == [3]
