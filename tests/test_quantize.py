"""Precisions: the caller's logging stays as it was, and a record of one's own is a precision."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from registered import keep_entries

from mmcompress.quantize.base import quantize_model
from mmcompress.quantize.schemes.weights_only import W4
from mmcompress.registry import PRECISIONS, resolve_entry
from mmcompress.runtime.sessions import open_session

ROUNDED = [name for name in PRECISIONS.list_names() if name != "fp32"]
INPUTS = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)


@pytest.fixture()
def layer(tmp_path):
    """A linear layer as an ONNX file."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name="product")],
        "layer",
        inputs=[helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 64])],
        outputs=[helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 32])],
        initializer=[numpy_helper.from_array(weight, "weight")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "layer.onnx")
    return tmp_path / "layer.onnx"


def describe_logging():
    root = logging.getLogger()
    return (
        root.level,
        list(root.handlers),
        list(root.filters),
        logging.getLogger("onnxruntime").level,
    )


@pytest.mark.parametrize("precision", ROUNDED)
def test_the_callers_logging_stays_as_it_was(layer, precision, caplog):
    """It keeps its level, and nothing of the quantizers is written below an error."""
    with caplog.at_level(logging.INFO):
        before = describe_logging()
        quantize_model(precision, layer, target=layer.with_name("q.onnx"), feeds=[{"x": INPUTS}])
        assert describe_logging() == before
        assert logging.getLogger().isEnabledFor(logging.INFO)
        assert caplog.records == []
        logging.getLogger("mine").info("still heard")
        logging.warning("and this too")
    assert [record.message for record in caplog.records] == ["still heard", "and this too"]


@pytest.mark.slow
def test_logging_that_nobody_set_up_is_not_set_up(layer):
    """In a process of its own: one of ONNX Runtime's modules sets it up when it is imported."""
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "from mmcompress.quantize.base import quantize_model\n"
        "file = Path(sys.argv[1])\n"
        "for precision in ('int8', 'w8', 'fp16'):\n"
        "    quantize_model(precision, file, target=file.with_name('q.onnx'))\n"
        "root = logging.getLogger()\n"
        "assert root.level == logging.WARNING, root.level\n"
        "assert not root.handlers and not root.filters, (root.handlers, root.filters)\n"
    )
    command = [sys.executable, "-c", code, str(layer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "INFO" not in done.stderr


def test_logging_is_restored_after_an_error(tmp_path):
    before = describe_logging()
    with pytest.raises(Exception, match="absent"):
        quantize_model("int8", tmp_path / "absent.onnx", target=tmp_path / "q.onnx")
    assert describe_logging() == before


@pytest.mark.parametrize("precision", PRECISIONS.list_names())
def test_a_precision_names_both_of_its_sides(precision):
    scheme = PRECISIONS.get(precision)
    assert callable(resolve_entry(scheme.writer))
    if precision == "fp32":
        assert scheme.simulation is None
    else:
        assert callable(resolve_entry(scheme.simulation).round_weight)


def test_fp32_writes_the_model_as_it_is(layer):
    written = quantize_model("fp32", layer, target=layer.with_name("q.onnx"))
    assert written.fp32_count == 0
    assert onnx.load(str(written.file)) == onnx.load(str(layer))


@pytest.fixture()
def own_precision():
    """The registry of precisions; what a test adds is gone afterwards."""
    with keep_entries(PRECISIONS):
        yield PRECISIONS


def test_a_record_of_ones_own_is_a_precision(layer, own_precision):
    """The smallest one: another group of an existing scheme, deployed and simulated alike."""
    import torch

    from mmcompress.quantize.simulation import simulate_precision

    own_precision.add("mine", replace(W4, group_size=16), "weights in 4 bits, in groups of 16")
    written = quantize_model("mine", layer, target=layer.with_name("q.onnx"))
    deployed = open_session(written.file, 1).run(None, {"x": INPUTS})[0]
    weight = numpy_helper.to_array(onnx.load(str(layer)).graph.initializer[0])
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = torch.from_numpy(weight.T.copy())
    with simulate_precision(linear, "mine"):
        simulated = linear(torch.from_numpy(INPUTS)).numpy()
    assert np.allclose(deployed, simulated, atol=1e-4)


@pytest.mark.parametrize("precision", ROUNDED)
def test_a_model_that_is_handed_in_is_not_changed(layer, precision):
    model = onnx.load(str(layer))
    target = layer.with_name("q.onnx")
    quantize_model(precision, model, target=target, feeds=[{"x": INPUTS}])
    assert model == onnx.load(str(layer))


@pytest.mark.parametrize("precision", ROUNDED)
def test_layers_that_are_to_stay_in_fp32_are_known_by_their_numbers(layer, precision):
    weight = numpy_helper.to_array(onnx.load(str(layer)).graph.initializer[0])
    written = quantize_model(
        precision,
        layer,
        target=layer.with_name("q.onnx"),
        feeds=[{"x": INPUTS}],
        fp32_weights=[weight.T],
    )
    assert written.fp32_count == 1
    plain = open_session(layer, 1).run(None, {"x": INPUTS})[0]
    deployed = open_session(written.file, 1).run(None, {"x": INPUTS})[0]
    # in fp16 the product reads inputs that were rounded before
    tolerance = 1e-2 if precision == "fp16" else 1e-5
    assert np.allclose(deployed, plain, atol=tolerance)


def test_only_the_smallest_products_are_rounded_where_a_few_are_enough(layer):
    model = onnx.load(str(layer))
    small = np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(small, "small"))
    model.graph.node.append(helper.make_node("MatMul", ["y", "small"], ["z"], name="last"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", 16]))
    file = layer.with_name("q.onnx")
    for max_products, rounded in ((None, 2), (2, 2), (1, 1), (0, 0)):
        quantize_model("int8", model, target=file, max_products=max_products)
        written = onnx.load(str(file))
        kinds = [node.op_type for node in written.graph.node]
        assert kinds.count("MatMulInteger") == rounded
        if rounded == 1:
            assert "weight" in {tensor.name for tensor in written.graph.initializer}
