"""The worked examples of the contributor's guide are run as they stand."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from families import prove_marian
from registered import keep_entries

from mmcompress.data.open_dataset import open_dataset
from mmcompress.graph.load_spec import load_spec
from mmcompress.metrics.answers import Answers
from mmcompress.models import layouts
from mmcompress.models.families.cross_attention_decoder import DECODER_FAMILIES
from mmcompress.prune.importance.inputs import ImportanceInputs
from mmcompress.quantize.simulation import simulate_precision
from mmcompress.registry import (
    DATA_KINDS,
    IMPORTANCE,
    METRICS,
    NODE_KINDS,
    PLUG_POINTS,
    resolve_entry,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmcompress"
GUIDE = ROOT / "docs" / "contributing.md"
MEASURING = ROOT / "docs" / "measuring.md"
EXAMPLES = re.findall(r"```python\n# plugin: (\w+)\.py\n(.*?)```", GUIDE.read_text(), re.S)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """Every example as a module that can be imported. What they register is gone afterwards."""
    folder = tmp_path_factory.mktemp("plugins")
    families = dict(DECODER_FAMILIES)
    for name, code in EXAMPLES:
        (folder / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch, keep_entries(*PLUG_POINTS.values()):
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        for name, _ in EXAMPLES:
            # An example registers while it is imported. A module that is known registers nothing.
            sys.modules.pop(name, None)
            importlib.import_module(name)
        yield [name for name, _ in EXAMPLES]
    DECODER_FAMILIES.clear()
    DECODER_FAMILIES.update(families)


def test_there_is_an_example_for_every_plug_point_of_the_guide(plugins):
    assert set(plugins) == {
        "farthest",
        "marian_family",
        "largest_first",
        "small_groups",
        "short_answers",
        "grey_squares",
    }


def test_a_spec_takes_a_kind_of_node_from_a_plugin(plugins, tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    (tmp_path / "spec.yaml").write_text(
        text.replace("kind: nearest", "kind: farthest") + "plugins: [farthest]\n"
    )
    spec = load_spec(tmp_path / "spec.yaml")
    node = resolve_entry(NODE_KINDS.get(spec.nodes["choose"].kind).deployed)({}, {}, tmp_path)
    import numpy as np

    keys = np.eye(2, dtype=np.float32)
    assert node(keys[:1], keys, ["near", "far"]) == {"best": "far"}


def test_a_family_of_a_plugin_passes_its_contract(plugins, tmp_path):
    proofs = prove_marian(tmp_path)
    assert len(proofs) > 12 and all(proof.passed for proof in proofs)


def test_a_layout_of_a_plugin_is_found(monkeypatch):
    [code] = re.findall(r"```python\n(BlockLayout\(.*?)```", GUIDE.read_text(), re.S)
    layout = eval(code, {"BlockLayout": layouts.BlockLayout})
    monkeypatch.setattr(layouts, "BLOCK_LAYOUTS", (layout,))
    linears = {"dense_in": torch.nn.Linear(8, 32), "dense_out": torch.nn.Linear(32, 8)}
    [block] = layouts.find_blocks(torch.nn.Sequential(torch.nn.ModuleDict(linears)))
    assert (block.name, block.units, block.reader) == ("0.ffn", 32, "0.dense_out")


def test_a_criterion_scores_every_unit(plugins, pipeline, models, batch):
    inputs = ImportanceInputs(pipeline=pipeline, models=models, batch=batch, grams={}, seed=0)
    scores = IMPORTANCE.get("largest_first")(inputs)
    for node, model in models.items():
        assert all(len(scores[node][b.name]) == b.units for b in model.weighted_blocks)


def test_a_precision_of_a_plugin_is_simulated(plugins):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 8)
    exact = layer.weight.detach().clone()
    with simulate_precision(layer, "w4_small_groups"):
        groups = layer.weight.view(8, 4, 16)
        assert all(len(group.unique()) <= 16 for row in groups for group in row)
        assert not torch.equal(layer.weight, exact)
    assert torch.equal(layer.weight, exact)


def test_a_metric_scores_every_answer(plugins):
    answers = Answers(references=("a", "b"), texts=("one two", "one two three four five six"))
    assert METRICS.get("short_answers")(answers)["short_answers"].numerators == (1.0, 0.0)
    assert METRICS.fact("short_answers", "needs") == "final_texts"


def test_data_takes_its_options_from_the_spec(plugins, tiny):
    changes = {"data.kind": "grey_squares", "data.options": {"size": 8}}
    data = open_dataset(load_spec(tiny / "spec.yaml", changes).data)
    assert data == DATA_KINDS.get("grey_squares")(size=8)
    assert data.load("train", 3).inputs[0].shape == (8, 8, 3)


def test_the_page_on_measuring_names_constants_where_they_stand():
    rows = re.findall(r"^\| (`[A-Z].*?) \|.*\| (.*?) \|$", MEASURING.read_text(), re.M)
    assert len(rows) > 20
    for names, files in rows:
        paths = [PACKAGE / file for file in re.findall(r"`(.*?)`", files)]
        text = "\n".join(path.read_text() for path in paths)
        for name in re.findall(r"`(.*?)`", names):
            assert re.search(rf"^{name} = ", text, re.M), f"{name} is not in {files}"
