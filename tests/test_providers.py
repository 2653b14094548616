"""Sessions run on other execution providers than the processor's own, and say where they do not."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from mmcompress.errors import BundleError, DataError, MissingProvider, SpecError
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.graph.load_spec import load_spec
from mmcompress.measure.cost_model.device_table import TableKey, TableNeed, measure_table
from mmcompress.models.sources import load_models
from mmcompress.registry import PROVIDERS
from mmcompress.run.tell_fallbacks import describe_fallbacks
from mmcompress.runtime import providers
from mmcompress.runtime.bundle import read_manifest
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import fingerprint_device
from mmcompress.runtime.providers import Provider, add_provider, count_fallbacks, find_provider
from mmcompress.runtime.sessions import open_session

BUNDLE = Path(__file__).parent / "earlier_bundles/format_2"


def find_missing_openvino():
    """Return why OpenVINO can't run here; empty where it can."""
    if importlib.util.find_spec("onnxruntime_ep_openvino") is None:
        return "onnxruntime-ep-openvino is not installed"
    vendors = {device.device.vendor for device in onnxruntime.get_ep_devices()}
    if not any("Intel" in vendor for vendor in vendors):
        return f"OpenVINO takes processors of Intel alone, not of {', '.join(sorted(vendors))}"
    return ""


needs_openvino = pytest.mark.skipif(
    bool(find_missing_openvino()), reason=find_missing_openvino() or "OpenVINO is here"
)


def make_model(*operators):
    """Return a model of operators in a row, each of one input."""
    names = ["x", *(f"y{i}" for i in range(len(operators)))]
    nodes = [
        helper.make_node(operator, [names[i]], [names[i + 1]])
        for i, operator in enumerate(operators)
    ]
    shape = [2, 2]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, shape)],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def list_answers(pipeline):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    return pipeline(image=Image.fromarray(pixels))


def test_the_processor_is_the_default_and_has_no_fallbacks():
    pipeline = load_bundle(BUNDLE)
    assert pipeline.provider == "cpu" and pipeline.list_fallbacks() == {}
    assert add_provider(onnxruntime.SessionOptions(), "cpu", threads=1) == ["CPUExecutionProvider"]


def test_a_device_has_another_name_with_another_provider():
    names = {fingerprint_device(2), fingerprint_device(2, "cuda"), fingerprint_device(2, "qnn")}
    assert len(names) == 3 and fingerprint_device(2, "cpu") == fingerprint_device(2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", r"pip uninstall onnxruntime && pip install onnxruntime-gpu"),
        ("coreml", r"no CoreMLExecutionProvider; it has one on other systems"),
        ("tensorrt_rtx", r"pip install onnxruntime-ep-nv-tensorrt-rtx"),
        ("qnn", r"pip install onnxruntime-qnn"),
    ],
)
def test_a_provider_that_is_not_there_says_how_to_install_it(name, message):
    if name == "coreml" and "CoreMLExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is macOS")
    with pytest.raises(MissingProvider, match=message):
        find_provider(name)
    with pytest.raises(MissingProvider, match=message):
        load_bundle(BUNDLE, provider=name)


def test_an_unknown_provider_is_refused_with_the_nearest_name(tiny, tmp_path):
    with pytest.raises(SpecError, match=r"unknown provider 'openvina'; .*openvino"):
        load_spec(tiny / "spec.yaml", {"measure.provider": "openvina"})
    with pytest.raises(DataError, match="unknown provider 'gpu'"):
        load_bundle(BUNDLE, provider="gpu")
    bundle = shutil.copytree(BUNDLE, tmp_path / "b")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "provider": "gpu"}))
    with pytest.raises(BundleError, match="unknown provider 'gpu'"):
        load_bundle(bundle)
    assert list_answers(load_bundle(BUNDLE, provider="cpu"))


def test_a_bundle_is_written_for_its_provider_and_asks_for_it(tiny, tmp_path):
    spec = load_spec(tiny / "spec.yaml", {"measure.provider": "cuda"})
    contents = BundleContents(models=load_models(spec))
    write_bundle(spec, contents, folder=tmp_path / "b", prove=False)
    assert read_manifest(tmp_path / "b")["provider"] == "cuda"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(MissingProvider, match="onnxruntime-gpu"):
            load_bundle(tmp_path / "b")
    assert list_answers(load_bundle(tmp_path / "b", provider="cpu"))


def test_a_plug_in_that_finds_no_device_is_told(monkeypatch):
    nothing = Provider(name="NothingExecutionProvider", plugin="json")
    monkeypatch.setattr("mmcompress.runtime.providers._registered_plugins", {"json"})
    PROVIDERS.add("nothing_here", nothing, distribution="nothing")
    with pytest.raises(MissingProvider, match="nothing finds no device for Nothing"):
        find_provider("nothing_here")


def test_a_provider_of_your_own_is_added_as_the_page_says():
    page = (Path(__file__).parents[1] / "docs/how_to/provider.md").read_text("utf-8")
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {})
    with pytest.raises(MissingProvider, match="pip install my-provider-package"):
        find_provider("mine")


def test_fallbacks_are_told_by_operator():
    text = describe_fallbacks(
        "captioner/step", Counter({"TopK": 1, "MatMulInteger": 12}), provider="openvino"
    )
    assert text == (
        "captioner/step: openvino can't run 13 operators, the processor does: "
        "MatMulInteger 12, TopK 1"
    )


def test_a_plugin_without_a_device_says_which_it_takes(monkeypatch):
    monkeypatch.setattr(providers, "_list_plugin_devices", lambda provider, distribution: [])
    with pytest.raises(MissingProvider, match="here; it takes processors of Intel alone"):
        find_provider("openvino")


@needs_openvino
def test_openvino_gives_the_numbers_of_the_processor():
    """In fp32: without a hint it would round to 16 bits where the processor can."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(256, 256)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, 256])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, 256])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    session = open_session(model, 1, provider="openvino")
    inputs = rng.normal(size=(8, 256)).astype(np.float32)
    [found] = session.run(None, {"x": inputs})
    assert found == pytest.approx(inputs @ weight, rel=1e-4, abs=1e-4)
    assert count_fallbacks(session) == Counter()


@needs_openvino
def test_a_bundle_answers_on_openvino_as_on_the_processor():
    pipeline = load_bundle(BUNDLE, provider="openvino")
    expected = list_answers(load_bundle(BUNDLE))
    found = list_answers(pipeline)
    for output, answer in expected.items():
        if isinstance(answer, np.ndarray):
            assert found[output] == pytest.approx(answer, abs=1e-3), output
        else:
            assert found[output] == answer, output
    for place, counts in pipeline.list_fallbacks().items():
        assert place.partition("/")[0] in pipeline.nodes and counts.total() > 0


@needs_openvino
def test_operators_that_openvino_can_not_run_are_counted():
    session = open_session(make_model("Relu", "Det"), 1, provider="openvino")
    assert count_fallbacks(session) == Counter({"Det": 1})


@needs_openvino
@pytest.mark.slow
def test_a_device_table_is_measured_on_openvino():
    key = TableKey(kind="ffn", width=32, head=1, positions=8, keys=8, batch=1)
    need = TableNeed(key=key, units=64, granularity=32)
    table = measure_table([need], 1, provider="openvino", precisions=("fp32",))
    assert table.device == fingerprint_device(1, "openvino") != fingerprint_device(1)
    [row] = table.rows
    assert all(ms > 0 for ms in row.ms)
