"""The wheel, built from the sdist and installed in an environment of its own, works outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("mmcompress", "pipelines", "search_spaces", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The commands of an environment that holds the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, ignore=skipped)
        else:
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel_options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    # The way to a package index: the sdist of the sources, and the wheel of the sdist.
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    quiet = {"stdout": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, **quiet)
    [sdist] = folder.glob("*.tar.gz")
    subprocess.run([*pip, "wheel", *wheel_options, str(sdist)], check=True)
    [wheel] = folder.glob("*.whl")
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    # Libraries come from here; the project itself must come from the wheel.
    [libraries] = environment.glob("lib/python*/site-packages")
    (libraries / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    python = environment / "bin" / "python"
    install = ["install", "--no-deps", str(wheel)]
    subprocess.run([*pip, "--python", str(python), *install], check=True)
    return environment / "bin"


@pytest.mark.very_slow
def test_the_wheel_works_outside_the_checkout(installed, tiny, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*words):
        return subprocess.run(
            [installed / "mmcompress", *words],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            check=False,
        )

    code = "import mmcompress; print(mmcompress.__file__)"
    found = subprocess.run(
        [installed / "python", "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert str(installed.parent) in found.stdout, found.stdout + found.stderr
    listed = call("list", "pipelines")
    assert "clip_captioner" in listed.stdout and "retrieval" in listed.stdout
    written = call("init", "--template", "clip_captioner", "--out", "captions.yaml")
    assert written.returncode == 0, written.stderr
    checked = call("validate", "captions.yaml")
    assert checked.returncode == 0, checked.stderr
    named = call("validate", "pipelines/clip_captioner.yaml")
    assert named.returncode == 2
    assert "init --template clip_captioner --out clip_captioner.yaml" in named.stderr
    # The whole way: a run, its report, and an answer of its bundle.
    changes = ("search.linearization_rounds=0", "search.max_artifacts=1", "distill.steps=2")
    settings = [word for change in changes for word in ("--set", change)]
    words = [str(tiny / "spec.yaml"), "--out", "r", "--workers", "0", "--trials", "2"]
    done = call("run", *words, *settings)
    assert done.returncode in (0, 3), done.stderr
    assert (tmp_path / "r" / "report.html").stat().st_size > 10_000
    Image.new("RGB", (32, 32), "orange").save(tmp_path / "a.png")
    answered = call("predict", "r/bundle", "--input", "image=a.png")
    assert answered.returncode == 0 and "caption" in json.loads(answered.stdout)
