"""Artifacts: the same answers as torch and as the libraries, at any batch, and refused when they were touched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmcompress.errors import BundleError, DataError
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.export.proofs import prove_generation
from mmcompress.export.weights import load_weights, save_weights
from mmcompress.prune.surgery import copy_without_units, resize_model_
from mmcompress.quantize.base import quantize_model
from mmcompress.quantize.schemes.dynamic import INT8
from mmcompress.quantize.simulation import (
    round_signed_channels,
    round_to_bytes,
    simulate_precision,
)
from mmcompress.registry import PRECISIONS
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.machine import describe_cpu
from mmcompress.runtime.sessions import open_session


def cut(model, first_too):
    g = torch.Generator().manual_seed(1)
    units = {
        b.name: torch.sort(torch.randperm(b.units, generator=g)[: b.units // 2]).values
        for b in model.blocks
    }
    units[model.weighted_blocks[0 if first_too else -1].name] = torch.arange(0)
    return copy_without_units(model, units)


STRUCTURES = ["dense", "pruned", "first attention dropped", "no self-attention left"]


@pytest.mark.parametrize(
    "structure",
    [pytest.param(s, marks=[] if s == "pruned" else pytest.mark.slow) for s in STRUCTURES],
)
def test_every_proof_holds_and_generation_is_the_librarys(
    spec, models, pipeline, batch, tmp_path, structure
):
    if structure.startswith("no"):
        gone = {
            b.name: torch.arange(0) for b in models["captioner"].blocks if b.kind == "attention"
        }
        models = {**models, "captioner": copy_without_units(models["captioner"], gone)}
    elif structure != "dense":
        models = {n: cut(m, structure.startswith("first")) for n, m in models.items()}
    proofs = write_bundle(spec, BundleContents(models=models), folder=tmp_path / "b")
    tokens = pipeline.forward_in_pieces(models, batch)["vision"]["tokens"]
    files = {f.stem: f for f in (tmp_path / "b" / "captioner").glob("*.onnx")}
    proofs += prove_generation(
        "captioner",
        models["captioner"],
        files=files,
        folder=tmp_path / "b" / "captioner",
        contexts=tokens,
    )
    assert all(p.passed for p in proofs), [p for p in proofs if not p.passed]
    assert {p.name for p in proofs} == {
        "torch == onnx",
        "fused == unfused",
        "cached generation == library",
    }


@pytest.mark.slow
def test_the_memory_of_a_bundle_is_measured_in_a_process_that_answers(spec, models, tmp_path):
    from mmcompress.measure.latency.memory import measure_memory_mb

    write_bundle(spec, BundleContents(models=models), folder=tmp_path / "b", prove=False)
    assert measure_memory_mb(tmp_path / "b") > measure_memory_mb() > 10


class Shapely(torch.nn.Module):
    """Reads sizes as library code does."""

    def forward(self, x, y):
        b, t, w = x.shape
        heads = x.view(b, t, 4, w // 4).transpose(1, 2)
        flat = (heads * heads.shape[-1] ** -0.5).transpose(1, 2).reshape(b, t, -1)
        return flat.chunk(2, -1)[1], y.reshape(y.shape[1], y.shape[0])


def test_what_is_known_of_shapes_is_written_down_and_nothing_more(tmp_path):
    """Axes that stay where they are and sizes that are numbers; two axes that change places can't be known."""
    import onnx

    from mmcompress.export.onnx import export_graph
    from mmcompress.models.base import ExportGraph

    dynamic = {"x": {0: "batch", 1: "length"}, "y": {0: "rows", 1: "columns"}}
    example = (torch.randn(2, 5, 16), torch.randn(3, 4))
    path = export_graph(
        ExportGraph(
            module=Shapely(),
            example=example,
            inputs=("x", "y"),
            outputs=("flat", "turned"),
            dynamic_axes=dynamic,
        ),
        tmp_path / "g.onnx",
    )
    nodes = [n.op_type for n in onnx.load(path).graph.node]
    assert nodes.count("Reshape") == 3 and nodes.count("Shape") == 2
    model = open_session(path, 1)
    for b, t, r, c in ((1, 1, 1, 1), (3, 7, 2, 6)):
        x, y = torch.randn(b, t, 16), torch.randn(r, c)
        for want, got in zip(
            Shapely()(x, y), model.run(None, {"x": x.numpy(), "y": y.numpy()}), strict=True
        ):
            np.testing.assert_allclose(want.numpy(), got, rtol=1e-6)


class Summed(torch.nn.Module):
    """A residual stream with constants where sub-layers were; one of them is read in between."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.c = torch.nn.ParameterList(torch.randn(8, generator=g) for _ in range(4))
        self.norm, self.a, self.b = (
            torch.nn.LayerNorm(8),
            torch.nn.Linear(8, 8),
            torch.nn.Linear(8, 8),
        )

    def forward(self, x):
        x = self.norm(x) + self.c[0]
        x = x + self.a(x) + self.c[1] + self.c[2]
        return x + self.b(x.relu()), x + self.c[3]


def test_constants_on_a_stream_go_into_the_bias_before(tmp_path):
    """The norm takes the first, a linear layer two more; one on a value that others read, too, must stay."""
    import onnx

    from mmcompress.export.onnx import export_graph
    from mmcompress.models.base import ExportGraph

    model = Summed()
    graph = ExportGraph(
        module=model,
        example=(torch.randn(2, 3, 8),),
        inputs=("x",),
        outputs=("y", "z"),
        dynamic_axes={"x": {0: "batch", 1: "length"}},
    )
    path = export_graph(graph, tmp_path / "g.onnx")
    assert [n.op_type for n in onnx.load(path).graph.node].count(
        "Add"
    ) == 5  # two biases, two sums, one constant
    x = torch.randn(4, 5, 8)
    for want, got in zip(model(x), open_session(path, 1).run(None, {"x": x.numpy()}), strict=True):
        np.testing.assert_allclose(want.detach().numpy(), got, atol=1e-5)


def test_a_new_token_sees_all_before_it_and_none_after():
    from mmcompress.runtime.beam_search import MASKED_SCORE, build_causal_mask

    assert build_causal_mask(1, 4).shape == (1, 1, 1, 5) and not build_causal_mask(1, 4).any()
    far = build_causal_mask(3, 2)[0, 0] == MASKED_SCORE
    assert far.astype(int).tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]


@pytest.fixture(scope="module", params=range(3))
def stirred_captioner(request, spec, tmp_path_factory):
    """(model, files, folder, contexts): the captioner with other embeddings, exported once for all kinds of search."""
    from mmcompress.export.onnx import export_node
    from mmcompress.models.sources import load_model

    folder = tmp_path_factory.mktemp("captioner")
    model = load_model(spec.nodes["captioner"])
    g = torch.Generator().manual_seed(request.param)
    embeddings = model.lm.model.decoder.embed_tokens.weight
    embeddings.data += 0.3 * torch.randn(embeddings.shape, generator=g)
    files = export_node(model, folder)
    (folder / "tokenizer.json").write_text(model.tokenizer_json)
    return model, files, folder, torch.randn(4, 16, 32, generator=g)


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.examples(2)
def test_beam_search_is_that_of_transformers(stirred_captioner, beams, early_stopping):
    model, files, folder, contexts = stirred_captioner
    model.generation |= {"beams": beams, "early_stopping": early_stopping}
    found = prove_generation(
        "captioner",
        model,
        files=files,
        folder=folder,
        contexts=contexts,
    )
    assert found[0].passed, found


@pytest.fixture(scope="module")
def bundle(run_folder, tmp_path_factory):
    return run_folder / "baseline"


@pytest.fixture()
def copy(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "b")
    return tmp_path / "b"


def test_nearest_weighs_similarity_and_score():
    from mmcompress.kinds.nearest.deployed import Nearest

    query, keys = np.array([[1.0, 0.0]]), np.array([[0.9, 0.0], [0.8, 0.0]])
    pick = lambda prior, scores: Nearest({}, {"prior": prior}, None)(
        query, keys, ["a", "b"], scores
    )["best"]
    assert (
        pick(0.0, [-9.0, 0.0]) == "a" and pick(0.1, [-9.0, 0.0]) == "b" and pick(0.1, None) == "a"
    )


def test_a_bundle_answers_where_torch_cannot_be_imported(bundle, tmp_path):
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "new.png")
    code = (
        "import sys, json\n"
        "for m in ('torch', 'transformers', 'open_clip', 'ray', 'optuna', 'onnx'): sys.modules[m] = None\n"
        "from mmcompress.runtime import load\n"
        f"out = load({str(bundle)!r})(image={str(tmp_path / 'new.png')!r})\n"
        "print(json.dumps({'caption': out['caption'], 'norm': float((out['embedding'] ** 2).sum())}))\n"
    )
    got = json.loads(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
        ).stdout
    )
    assert isinstance(got["caption"], str) and got["norm"] == pytest.approx(1, abs=1e-4)
    assert got["caption"] == load_bundle(bundle)(image=tmp_path / "new.png")["caption"]


def test_the_bundle_and_the_torch_pipeline_agree(spec, pipeline, models, batch, tmp_path):
    contents = BundleContents(models=models, precisions=dict.fromkeys(models, "fp32"))
    write_bundle(spec, contents, folder=tmp_path / "b", prove=False)
    deployed = load_bundle(tmp_path / "b")
    out = pipeline.forward_in_pieces(models, batch)
    for i in range(4):
        values = deployed.run(image=batch.inputs["vision"][i : i + 1].numpy())
        assert np.allclose(
            values["vision"]["embedding"][0], out["vision"]["embedding"][i].numpy(), atol=1e-4
        )


@pytest.mark.parametrize(
    "name", ["manifest.json", "vision/model.onnx", "captioner/step.onnx", "text/tokenizer.json"]
)
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name.split("/")[-1]):
        load_bundle(copy)


def test_an_altered_file_is_named(copy):
    path = copy / "captioner" / "step.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"captioner/step.onnx' was altered"):
        load_bundle(copy)


def test_a_link_that_leads_out_of_a_bundle_is_refused(copy, tmp_path):
    """One of the cache of a hub leads to the blobs beside the snapshots, and is none."""
    file = copy / "captioner" / "step.onnx"
    elsewhere = tmp_path / "elsewhere.onnx"
    shutil.move(file, elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(BundleError, match=r"step.onnx' is a link that leads out .*cp -rL"):
        load_bundle(copy)
    snapshot = tmp_path / "hub" / "snapshots" / "0123"
    shutil.copytree(copy, snapshot)
    blob = tmp_path / "hub" / "blobs" / "ab"
    blob.parent.mkdir()
    shutil.copy(elsewhere, blob)
    (snapshot / "captioner" / "step.onnx").unlink()
    (snapshot / "captioner" / "step.onnx").symlink_to(blob)
    load_bundle(snapshot)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "damaged"),
        (
            '{"format": 99, "files": {}, "graph": {"nodes": {}, "outputs": {}, "inputs": {}}}',
            "format 99",
        ),
        (
            '{"format": 1, "files": {"../x": {"sha256": ""}}, "graph": {"nodes": {}, "outputs": {}, "inputs": {}}}',
            "leaves the bundle",
        ),
        (
            '{"format": 1, "files": {}, "graph": {"outputs": {}, "inputs": {}, '
            '"nodes": {"a": {"files": {"model": "x.onnx"}}}}}',
            "'x.onnx', which is not among",
        ),
        (
            '{"format": 1, "files": {}, "graph": {"outputs": {}, "inputs": {}, '
            '"nodes": {"a": {"kind": "image_encoder"}}}}',
            "damaged",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(copy, text, message):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy)


def test_wrong_inputs_are_told(bundle, tmp_path):
    deployed = load_bundle(bundle)
    with pytest.raises(DataError, match="takes image; got picture"):
        deployed(picture="x.png")
    with pytest.raises(DataError, match="no such image"):
        deployed(image=tmp_path / "none.png")
    (tmp_path / "zero.png").touch()
    with pytest.raises(DataError, match="0 bytes"):
        deployed(image=tmp_path / "zero.png")


def test_weights_survive_a_round_trip(models, tmp_path):
    small = {n: cut(m, False) for n, m in models.items()}
    save_weights(small, tmp_path)
    for n, m in small.items():
        counts = {b.name: 0 for b in models[n].blocks} | {b.name: b.units for b in m.blocks}
        again = load_weights(
            resize_model_(copy_without_units(models[n], {}), counts), tmp_path / f"{n}.safetensors"
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(m.state_dict().values(), again.state_dict().values(), strict=True)
        )


def test_int8_does_not_saturate_and_is_what_was_simulated(tmp_path):
    """Largest weights against largest activations: on AVX2 full-range S8 products overflow 16 bits."""
    layer = torch.nn.Linear(64, 16, bias=False)
    layer.weight.data = torch.where(torch.rand(16, 64) > 0.5, 1.0, -1.0)
    x = torch.ones(3, 5, 64)
    x[0, 0, 0] = -0.5
    torch.onnx.export(layer, (x,), str(tmp_path / "a.onnx"), dynamo=False, input_names=["x"])
    quantize_model("int8", tmp_path / "a.onnx", target=tmp_path / "b.onnx")
    got = open_session(tmp_path / "b.onnx", 1).run(None, {"x": x.numpy()})[0]
    with simulate_precision(layer):
        expected = layer(x).detach().numpy()
    assert np.allclose(got, layer(x).detach().numpy(), atol=0.6)
    assert np.allclose(got, expected, atol=0.3)


def test_fake_rounding_has_the_stated_number_of_levels():
    w = torch.randn(4, 1000)
    assert max(len(torch.unique(row)) for row in round_signed_channels(w, INT8)) <= 129
    assert len(torch.unique(round_to_bytes(torch.randn(1000), INT8))) <= 256
    assert torch.equal(round_to_bytes(torch.zeros(5), INT8), torch.zeros(5))


ROUNDED = [p for p in PRECISIONS.list_names() if p != "fp32"]


@pytest.mark.parametrize("precision", ROUNDED)
def test_every_precision_is_deployed_as_it_is_simulated(tmp_path, precision):
    needed = PRECISIONS.get(precision).cpu_flags
    if needed and not set(needed) & set(describe_cpu()["flags"]):
        pytest.skip("this CPU has none of the instructions it needs")
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 48)
    x = torch.randn(4, 7, 96)
    options = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "b", 1: "t"}}}
    torch.onnx.export(layer, (x,), str(tmp_path / "a.onnx"), **options)
    quantize_model(
        precision, tmp_path / "a.onnx", target=tmp_path / "b.onnx", feeds=[{"x": x.numpy()}]
    )
    got = torch.from_numpy(open_session(tmp_path / "b.onnx", 1).run(None, {"x": x.numpy()})[0])
    with torch.no_grad():
        plain = layer(x)
        with simulate_precision(layer, precision):
            expected = layer(x)
    away = lambda a, b: float((a - b).norm() / plain.norm())
    assert 0 < away(plain, expected) < (0.15 if precision == "w4" else 0.03)
    assert away(got, expected) < 1e-4 < away(got, plain)
    assert torch.equal(layer(x), plain)  # nothing stays rounded


@pytest.mark.slow
@pytest.mark.parametrize("precision", [p for p in ROUNDED if p not in ("int8", "int8_full")])
def test_a_bundle_in_every_precision_answers(tiny, tmp_path, precision):
    from mmcompress.data.open_dataset import open_dataset
    from mmcompress.graph.load_spec import load_spec
    from mmcompress.models.sources import load_models

    spec = load_spec(tiny / "spec.yaml")
    models = load_models(spec)
    given = open_dataset(spec.data).load("train", 4).inputs
    requests = [{"image": image} for image in given]
    proofs = write_bundle(
        spec,
        BundleContents(
            models=models,
            precisions=dict.fromkeys(models, precision),
            calibration_requests=requests,
        ),
        folder=tmp_path / "b",
    )
    drifts = [p for p in proofs if p.name == f"{precision} drift (1 - cosine)"]
    assert {p.node for p in drifts} == set(models) and all(p.passed for p in proofs)
    assert isinstance(load_bundle(tmp_path / "b")(image=given[0])["caption"], str)


@pytest.mark.slow
def test_a_precision_that_this_cpu_gets_wrong_is_refused(spec, models, tmp_path, monkeypatch):
    from mmcompress.runtime import graph as pipeline

    contents = BundleContents(models=models, precisions={"vision": "int8_full"})
    write_bundle(spec, contents, folder=tmp_path / "b", prove=False)
    monkeypatch.setattr(pipeline, "describe_cpu", lambda: {"flags": ["avx2"]})
    with pytest.raises(
        BundleError, match="node 'vision' is in int8_full, which needs a CPU with one of"
    ):
        load_bundle(tmp_path / "b")


@pytest.mark.slow
def test_layers_that_are_spared_stay_in_fp32(spec, models, tmp_path):
    import onnx

    precisions = {**dict.fromkeys(models, "fp32"), "vision": "int8"}
    counts = {}
    for name, spared in (("all", {}), ("some", {"vision": ("0.ffn", "1.attention")})):
        contents = BundleContents(models=models, precisions=precisions, fp32_blocks=spared)
        write_bundle(spec, contents, folder=tmp_path / name)
        graph = onnx.load(tmp_path / name / "vision" / "model.onnx").graph
        counts[name] = sum(n.op_type == "MatMulInteger" for n in graph.node)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["graph"]["nodes"]["vision"]["spared"] == sorted(spared.get("vision", ()))
    assert counts["all"] - counts["some"] == 4


def test_simulated_rounding_spares_and_singles_out(models):
    from mmcompress.quantize.simulation import simulate_precision

    m = models["vision"]
    before = {n: p.detach().clone() for n, p in m.named_parameters()}
    changed = lambda: {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    with simulate_precision(m, "int8"):
        every = changed()
    with simulate_precision(m, "int8", fp32_layers=m.list_linear_layers(("0.ffn",))):
        most = changed()
    with simulate_precision(m, "int8", selected_layers=m.list_linear_layers(("0.ffn",))):
        one = changed()
    assert not changed() and most | one == every and not most & one and len(one) == 2
