"""`dense == library`: it holds for checkpoints as their libraries save them, and it can fail."""

from __future__ import annotations

import json

import pytest
from library_checkpoints import LIBRARY_CASES

from mmcompress.data.open_dataset import open_dataset
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.export.fidelity import prove_fidelity
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.sources import load_models
from mmcompress.storage import write_record

OUTPUTS = {"image": "eyes.tokens", "text": "words.embedding", "audio": "ears.tokens"}
NODES = {
    "image": "eyes: {kind: image_encoder, source: ./m, inputs: {image: image}}",
    "text": "words: {kind: text_encoder, source: ./m, inputs: {text: text}}",
    "audio": "ears: {kind: audio_encoder, source: ./m, inputs: {audio: audio}}",
}


def export(folder, case, *, data=""):
    """Save the checkpoints of a case and export a pipeline over them; returns (spec, bundle)."""
    (folder / "m").mkdir()
    case.save(folder / "m")
    if case.save_writer:
        (folder / "d").mkdir()
        case.save_writer(folder / "d")
    output = OUTPUTS[case.input_type]
    text = f"name: one\ninputs: {{{case.input_type}: {case.input_type}}}\n"
    text += f"nodes:\n  {NODES[case.input_type]}\n"
    if case.writer is not None:
        source = "./d" if case.save_writer else "./m"
        text += f"  writer: {{kind: text_decoder, source: {source}, inputs: {{context: {output}}}"
        text += f", {case.writer}}}\n"
        output = "writer.text"
    if case.is_matching:
        text += "  match: {kind: fusion_encoder, source: ./m, inputs: "
        text += "{text: writer.texts, context: eyes.tokens}}\n"
        output = "match.scores"
    text += f"outputs: {{out: {output}}}\n{data}"
    (folder / "spec.yaml").write_text(text)
    spec = load_spec(folder / "spec.yaml", for_export=True)
    write_bundle(spec, BundleContents(models=load_models(spec)), folder=folder / "b", prove=False)
    return spec, folder / "b"


def prove(spec, bundle, *, left_out=None):
    """Prove fidelity; returns the proofs by name. What is left out is added to a list."""

    def listen(message, share):
        if left_out is not None:
            left_out.append(message)

    proofs = prove_fidelity(spec, bundle=bundle, data=open_dataset(spec.data), on_progress=listen)
    return {proof.name.removeprefix("dense == library: "): proof for proof in proofs}


def change_config(bundle, node, change):
    """Apply a change to the configuration of a node in the manifest of a bundle."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["graph"]["nodes"][node]["config"])
    write_record(bundle / "manifest.json", manifest)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if c.slow else []) for n, c in LIBRARY_CASES.items()],
)
def test_a_checkpoint_as_its_library_saves_it_is_answered_alike(name, tmp_path):
    case = LIBRARY_CASES[name]
    left_out = []
    proofs = prove(*export(tmp_path, case), left_out=left_out)
    assert "preprocessing" in proofs
    assert ("texts" in proofs) == (case.writer is not None)
    assert not [proof for proof in proofs.values() if not proof.passed]
    assert not left_out


def test_another_resize_mode_and_another_mean_are_noticed(tmp_path):
    spec, bundle = export(tmp_path, LIBRARY_CASES["CLIP, picture"])

    def shift_mean(config):
        config["preprocess"]["mean"][0] += 0.01

    change_config(bundle, "eyes", shift_mean)
    assert not prove(spec, bundle)["preprocessing"].passed

    def squash(config):
        config["preprocess"]["mean"][0] -= 0.01
        config["preprocess"]["resize_mode"] = "squash"

    change_config(bundle, "eyes", squash)
    assert not prove(spec, bundle)["embedding"].passed


def test_another_padding_id_is_noticed(tmp_path):
    spec, bundle = export(tmp_path, LIBRARY_CASES["SigLIP, text"])

    def change_padding(config):
        config["pad"] = 3

    change_config(bundle, "words", change_padding)
    assert not prove(spec, bundle)["embedding"].passed


def test_another_pooling_is_noticed(tmp_path):
    spec, bundle = export(tmp_path, LIBRARY_CASES["sentence encoder, mean"])
    pooling = tmp_path / "m" / "1_Pooling" / "config.json"
    config = json.loads(pooling.read_text())
    config |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    pooling.write_text(json.dumps(config))
    assert not prove(spec, bundle)["embedding"].passed


def test_another_start_of_a_text_is_noticed(tmp_path):
    spec, bundle = export(tmp_path, LIBRARY_CASES["BLIP"])

    def change_start(config):
        generation = config["generation"]
        generation["bos"] = 7
        generation["prompt"] = [7 for _ in generation["prompt"]]

    change_config(bundle, "writer", change_start)
    assert not prove(spec, bundle)["texts"].passed
