"""Outside code joins by `plugins:`; the examples of the documentation are run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmcompress.errors import ModelError
from mmcompress.export.onnx import export_node
from mmcompress.export.proofs import prove_export
from mmcompress.graph.load_spec import load_spec
from mmcompress.metrics.answers import Answers
from mmcompress.models import layouts
from mmcompress.models.sources import load_model
from mmcompress.prune.importance.inputs import ImportanceInputs
from mmcompress.prune.surgery import copy_without_units
from mmcompress.registry import IMPORTANCE, METRICS
from mmcompress.spec.schema import Node

ROOT = Path(__file__).resolve().parents[1]
CRITERION_PAGE = ROOT / "docs/how_to/own_criterion.md"
METRIC_PAGE = ROOT / "docs/how_to/own_metric.md"
MODEL_PAGE = ROOT / "docs/how_to/own_model.md"
ARCHITECTURE_PAGE = ROOT / "docs/explanation/architecture.md"
COMMANDS_PAGE = ROOT / "docs/reference/commands.md"


def test_the_readmes_criterion_works(tiny, tmp_path, monkeypatch, pipeline, models, batch):
    [code] = [
        c
        for c in re.findall(r"```python\n(.*?)```", CRITERION_PAGE.read_text(), re.S)
        if "IMPORTANCE.add" in c
    ]
    (tmp_path / "mine_from_readme.py").write_text(code)
    text = (tiny / "spec.yaml").read_text().replace("source: ./", f"source: {tiny}/")
    (tmp_path / "spec.yaml").write_text(
        text + "plugins: [mine_from_readme]\nprune: {importance: smallest_bias}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert load_spec(tmp_path / "spec.yaml").prune.importance == "smallest_bias"
        scores = IMPORTANCE.get("smallest_bias")(
            ImportanceInputs(pipeline=pipeline, models=models, batch=batch, grams={}, seed=0)
        )
    finally:
        IMPORTANCE._entries.pop("smallest_bias", None)
        sys.modules.pop("mine_from_readme", None)
    for n, m in models.items():
        assert all(
            scores[n][b.name].shape == (b.units,) and torch.isfinite(scores[n][b.name]).all()
            for b in m.weighted_blocks
        )


def test_the_metric_of_the_page_scores_every_input(tiny, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", METRIC_PAGE.read_text(), re.DOTALL)
    (tmp_path / "metric_of_the_page.py").write_text(code)
    text = (tiny / "spec.yaml").read_text().replace("source: ./", f"source: {tiny}/")
    (tmp_path / "spec.yaml").write_text(
        text + "plugins: [metric_of_the_page]\nmetrics: [retrieval, first_word]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = Answers(
        references=("a red cup", "two dogs", "the sea"), texts=("a cat", "three dogs", "")
    )
    try:
        spec = load_spec(tmp_path / "spec.yaml")
        assert [metric.kind for metric in spec.metrics] == ["retrieval", "first_word"]
        scores = METRICS.get("first_word")(answers)
    finally:
        METRICS._entries.pop("first_word", None)
        sys.modules.pop("metric_of_the_page", None)
    assert scores["first_word"].numerators == (1.0, 0.0, 0.0)


def test_the_readmes_layout_is_found(monkeypatch):
    [code] = re.findall(r"```python\n(BlockLayout\(.*?)```", MODEL_PAGE.read_text(), re.S)
    layout = eval(code, {"BlockLayout": layouts.BlockLayout})
    monkeypatch.setattr(layouts, "BLOCK_LAYOUTS", (layout,))
    module = torch.nn.ModuleDict(
        {"dense_in": torch.nn.Linear(8, 32), "dense_out": torch.nn.Linear(32, 8)}
    )
    [block] = layouts.find_blocks(torch.nn.Sequential(module))
    assert (block.name, block.units, block.reader) == ("0.ffn", 32, "0.dense_out")


def test_the_pages_own_model_is_found_cut_and_exported(monkeypatch, tmp_path):
    """The module that a reader copies, as it stands there, up to a bundle of a pruned copy."""
    [code] = re.findall(r"```python\n(import torch\n.*?)```", MODEL_PAGE.read_text(), re.S)
    (tmp_path / "encoder_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    node = Node(kind="image_encoder", source="python:encoder_of_the_page:build", inputs={})
    model = load_model(node)
    assert [block.name for block in model.blocks] == ["0.ffn", "1.ffn"]
    pruned = copy_without_units(model, {"0.ffn": torch.arange(32)})
    files = export_node(pruned, tmp_path / "exported")
    proofs = prove_export("mine", pruned, files=files)
    assert proofs and all(proof.passed for proof in proofs)
    assert pruned.get_block("0.ffn").units == 32


def test_what_has_no_block_is_told_every_layout():
    with pytest.raises(ModelError) as refusal:
        layouts.find_blocks(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    for layout in layouts.BLOCK_LAYOUTS:
        writers = ", ".join(path for path, _ in layout.writers)
        assert f"{writers} > {layout.reader}" in str(refusal.value)


def test_the_pages_name_every_folder_and_command():
    from mmcompress.cli import main

    folders = ARCHITECTURE_PAGE.read_text()
    for folder in (p.name for p in (ROOT / "mmcompress").iterdir() if (p / "__init__.py").exists()):
        assert f"  {folder}/" in folders, folder
    commands = COMMANDS_PAGE.read_text()
    for command in main.commands:
        assert f"## `{command}" in commands, command


def test_a_name_that_is_taken_is_not_given_to_something_else():
    with pytest.raises(ValueError, match="'fisher' names another importance already"):
        IMPORTANCE.add("fisher", "another.module:score")
    fisher = "mmcompress.prune.importance.gradients:score_by_fisher"
    IMPORTANCE.add("fisher", fisher, IMPORTANCE.get_about("fisher"), takes_gradients=True)


def install_package(folder, code):
    """Put a package beside its metadata, as pip leaves it, with one entry point."""
    (folder / "our_criteria.py").write_text(code)
    metadata = folder / "our_criteria-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: our-criteria\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[mmcompress.plugins]\nours = our_criteria\n")


def run_with_package(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "mmcompress.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_an_installed_package_joins_without_a_word_in_the_spec(tiny, tmp_path):
    install_package(
        tmp_path,
        "from mmcompress.registry import IMPORTANCE\n"
        "IMPORTANCE.add('ours', 'our_criteria:score', 'what we look for')\n",
    )
    listed = run_with_package(tmp_path, "list", "importance")
    assert "what we look for" in listed.stdout, listed.stderr
    spec = (tiny / "spec.yaml").read_text().replace("source: ./", f"source: {tiny}/")
    (tmp_path / "spec.yaml").write_text(spec + "prune: {importance: ours}\n")
    code = (
        "import sys; from mmcompress.graph.load_spec import load_spec;"
        "print(load_spec(sys.argv[1]).prune.importance, 'torch' in sys.modules)"
    )
    read = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "spec.yaml")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert read.stdout.split() == ["ours", "False"], read.stderr


def test_a_broken_package_is_told_and_costs_nothing_else(tmp_path):
    install_package(tmp_path, "import no_such_module\n")
    listed = run_with_package(tmp_path, "list", "importance")
    assert listed.returncode == 0 and "fisher" in listed.stdout
    assert "'ours' of the package our-criteria can't be imported" in listed.stderr
