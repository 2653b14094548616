"""The worked examples of the contributor's guide are run as they stand."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from families import prove_marian
from library_checkpoints import LIBRARY_CASES
from onnx import numpy_helper
from registered import keep_entries

from mmcompress.data.open_dataset import open_dataset
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.export.fidelity import ComparedNode, prove_fidelity
from mmcompress.graph.load_spec import load_spec
from mmcompress.kinds.image_encoder.deployed import ImageEncoder
from mmcompress.metrics.answers import Answers
from mmcompress.models import layouts
from mmcompress.models.families.cross_attention_decoder import DECODER_FAMILIES
from mmcompress.models.sources import load_models
from mmcompress.prune.importance.inputs import ImportanceInputs
from mmcompress.quantize.base import quantize_model
from mmcompress.quantize.simulation import simulate_precision
from mmcompress.registry import (
    DATA_KINDS,
    IMPORTANCE,
    LIBRARY_REFERENCES,
    METRICS,
    NODE_KINDS,
    PLUG_POINTS,
    resolve_entry,
)
from mmcompress.run.export_dense import export_dense
from mmcompress.runtime.graph import load_bundle

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
    with (
        pytest.MonkeyPatch.context() as patch,
        keep_entries(*PLUG_POINTS.values(), LIBRARY_REFERENCES),
    ):
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
        "mirror_encoder",
        "marian_family",
        "unit_order",
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
    keys = np.eye(2, dtype=np.float32)
    assert node(keys[:1], keys, ["near", "far"]) == {"best": "far"}


def prove_mirror(folder):
    """Export a checkpoint as the kind of the guide; returns its proofs, and what is left out."""
    (folder / "m").mkdir()
    LIBRARY_CASES["SigLIP, picture"].save(folder / "m")
    (folder / "spec.yaml").write_text(
        "name: one\ninputs: {image: image}\nplugins: [mirror_encoder]\nnodes:\n"
        "  eyes: {kind: mirror_encoder, source: ./m, inputs: {image: image}}\n"
        "outputs: {out: eyes.tokens}\n"
    )
    spec = load_spec(folder / "spec.yaml", for_export=True)
    write_bundle(spec, BundleContents(models=load_models(spec)), folder=folder / "b", prove=False)
    left_out = []
    proofs = prove_fidelity(
        spec,
        bundle=folder / "b",
        data=open_dataset(spec.data),
        on_progress=lambda message, share: left_out.append(message),
        input_count=3,
    )
    return {proof.name.removeprefix("dense == library: "): proof for proof in proofs}, left_out


@pytest.mark.slow
def test_a_model_kind_of_a_plugin_is_held_to_its_library(plugins, tmp_path, monkeypatch):
    (tmp_path / "right").mkdir()
    proofs, left_out = prove_mirror(tmp_path / "right")
    assert set(proofs) == {"preprocessing", "embedding"} and not left_out
    assert all(proof.passed and proof.node == "eyes" for proof in proofs.values())

    prepare = ImageEncoder.prepare
    monkeypatch.setattr(sys.modules["mirror_encoder"].MirrorEncoder, "prepare", prepare)
    (tmp_path / "wrong").mkdir()
    proofs, _ = prove_mirror(tmp_path / "wrong")
    assert not proofs["preprocessing"].passed and not proofs["embedding"].passed


@pytest.mark.parametrize(
    ("fidelity", "reason"),
    [
        ("", "the kind mirror_encoder names no way to compare"),
        ("test_contributing:compare_nothing", "its comparison with the library proved nothing"),
    ],
)
def test_a_model_kind_that_is_not_compared_is_told(
    plugins, tmp_path, monkeypatch, fidelity, reason
):
    module = sys.modules["mirror_encoder"]
    monkeypatch.setattr(module, "ENTRY", replace(module.ENTRY, fidelity=fidelity))
    proofs, left_out = prove_mirror(tmp_path)
    assert not proofs
    assert left_out == [f"dense == library: eyes is not compared: {reason}"]


def compare_nothing(node_name, check, *, source):
    """A comparison that forgets to compare."""
    return ComparedNode(name=node_name)


def test_a_bundle_holds_a_kind_of_node_from_a_plugin(plugins, tiny, tmp_path):
    text = (tiny / "spec.yaml").read_text().replace("./", f"{tiny}/")
    (tmp_path / "spec.yaml").write_text(
        text.replace("kind: nearest", "kind: farthest") + "plugins: [farthest]\n"
    )
    proofs = export_dense(tmp_path / "spec.yaml", tmp_path / "bundle")
    assert proofs and all(proof.passed for proof in proofs)
    pipeline = load_bundle(tmp_path / "bundle")
    node = pipeline.nodes["choose"]
    assert type(node).__name__ == "Farthest"
    keys = np.eye(2, dtype=np.float32)
    assert node(keys[:1], keys, ["near", "far"]) == {"best": "far"}
    assert "caption" in pipeline(**pipeline.make_noise_request())


@pytest.mark.slow
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
    scores = IMPORTANCE.get("unit_order")(inputs)
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


def test_a_precision_of_a_plugin_is_written_as_it_is_simulated(plugins, tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 8, bias=False)
    weight = numpy_helper.from_array(layer.weight.detach().numpy().T.copy(), "weight")
    product = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")
    graph = onnx.helper.make_graph(
        [product],
        "layer",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 8])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    written = quantize_model("w4_small_groups", model, target=tmp_path / "small.onnx")
    [node] = onnx.load(str(written.file)).graph.node
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    assert (node.op_type, attributes["bits"], attributes["block_size"]) == ("MatMulNBits", 4, 16)
    x = torch.eye(64)
    session = onnxruntime.InferenceSession(str(written.file), providers=["CPUExecutionProvider"])
    actual = session.run(None, {"x": x.numpy()})[0]
    exact = layer(x).detach().numpy()
    with simulate_precision(layer, "w4_small_groups"):
        simulated = layer(x).detach().numpy()
    # Both round; the two roundings of one weight differ by less than rounding itself.
    assert abs(actual - simulated).max() < abs(simulated - exact).max()


def test_a_metric_scores_every_answer(plugins):
    answers = Answers(references=("a", "b"), texts=("one two", "one two three four five six"))
    assert METRICS.get("short_answers")(answers)["short_answers"].numerators == (1.0, 0.0)
    assert METRICS.get_fact("short_answers", "needs") == "final_texts"


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
