"""The names that `import mmcompress` offers: in the lazy table, in the stub, and as they load."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

import mmcompress
from mmcompress.registry import resolve_entry
from mmcompress.run import run_targets

STUB = ROOT / "mmcompress" / "__init__.pyi"


def read_stub() -> tuple[dict[str, str], list[str]]:
    """Return where the stub takes each name from, and its `__all__`."""
    sources: dict[str, str] = {}
    listed: list[str] = []
    for statement in ast.parse(STUB.read_text()).body:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                sources[alias.asname] = f"{statement.module}:{alias.name}"
        if isinstance(statement, ast.Assign):
            listed = ast.literal_eval(statement.value)
    return sources, listed


def test_the_stub_and_the_lazy_table_name_the_same():
    sources, listed = read_stub()
    version = {"__version__": "mmcompress.version:__version__"}
    assert sources == {**mmcompress._NAMES, **version}
    assert sorted(listed) == sorted(mmcompress.__all__) == sorted(sources)
    assert set(mmcompress.__all__) <= set(dir(mmcompress))


@pytest.mark.parametrize("name", mmcompress._NAMES)
def test_every_public_name_loads(name):
    assert callable(getattr(mmcompress, name))
    assert callable(resolve_entry(mmcompress._NAMES[name]))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compress'"):
        mmcompress.compress  # noqa: B018


def test_run_stays_a_function_after_its_room_is_imported(monkeypatch):
    calls = []
    monkeypatch.setattr(
        run_targets, "run", lambda spec, out, **options: calls.append((spec, options))
    )
    for _ in range(2):
        mmcompress.run("a.yaml", "out", resume=True)
    assert calls == [("a.yaml", {"resume": True})] * 2


def test_the_room_of_runs_imports_nothing_until_it_is_called():
    code = "import sys; sys.modules['torch'] = None; import mmcompress.run; import mmcompress.run.next_artifact"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_stub_goes_into_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["mmcompress"]
    assert any(STUB.match(pattern) for pattern in patterns)
