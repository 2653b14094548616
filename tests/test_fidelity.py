"""`dense == library`: it holds for checkpoints as their libraries save them, and it can fail."""

from __future__ import annotations

import json

import pytest
from library_checkpoints import (
    save_blip,
    save_clip,
    save_sentence_encoder,
    save_siglip,
    save_vit,
    save_whisper,
)

from mmcompress.data.open_dataset import open_dataset
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.export.fidelity import prove_fidelity
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.sources import load_models
from mmcompress.storage import write_record

NODES = {
    "image": "vision: {kind: image_encoder, source: ./m, inputs: {image: image}}",
    "text": "words: {kind: text_encoder, source: ./m, inputs: {text: text}}",
    "audio": "ears: {kind: audio_encoder, source: ./m, inputs: {audio: audio}}",
}
WRITERS = {
    "image": "  writer: {kind: text_decoder, source: ./m, inputs: {context: vision.tokens}, "
    "max_tokens: 9}\n",
    "audio": "  writer: {kind: text_decoder, source: ./m, inputs: {context: ears.tokens}, "
    "max_tokens: 9}\n",
}
OUTPUTS = {"image": "vision.tokens", "text": "words.embedding", "audio": "ears.tokens"}


def export(folder, save, input_type, *, writes=False):
    """Save a checkpoint and export a pipeline over it; returns (spec, bundle)."""
    (folder / "m").mkdir()
    save(folder / "m")
    text = f"name: one\ninputs: {{{input_type}: {input_type}}}\nnodes:\n  {NODES[input_type]}\n"
    text += WRITERS[input_type] if writes else ""
    text += f"outputs: {{out: {OUTPUTS[input_type]}}}\n"
    (folder / "spec.yaml").write_text(text)
    spec = load_spec(folder / "spec.yaml", for_export=True)
    write_bundle(spec, BundleContents(models=load_models(spec)), folder=folder / "b", prove=False)
    return spec, folder / "b"


def prove(spec, bundle):
    proofs = prove_fidelity(spec, bundle=bundle, data=open_dataset(spec.data))
    return {proof.name.removeprefix("dense == library: "): proof for proof in proofs}


def change_config(bundle, node, change):
    """Apply a change to the configuration of a node in the manifest of a bundle."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["graph"]["nodes"][node]["config"])
    write_record(bundle / "manifest.json", manifest)


CASES = {
    "CLIP, picture": (save_clip, "image", False),
    "CLIP, text": (save_clip, "text", False),
    "SigLIP, picture": (save_siglip, "image", False),
    "SigLIP, text": (save_siglip, "text", False),
    "ViT": (save_vit, "image", False),
    "sentence encoder, mean": (
        lambda folder: save_sentence_encoder(folder, pooling_mode_mean_tokens=True),
        "text",
        False,
    ),
    "sentence encoder, first token": (
        lambda folder: save_sentence_encoder(folder, pooling_mode_cls_token=True),
        "text",
        False,
    ),
    "BLIP": (save_blip, "image", True),
    "Whisper": (save_whisper, "audio", True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_as_its_library_saves_it_is_answered_alike(case, tmp_path):
    save, input_type, writes = CASES[case]
    proofs = prove(*export(tmp_path, save, input_type, writes=writes))
    assert {"preprocessing"} <= set(proofs)
    assert ("texts" in proofs) == writes
    assert not [proof for proof in proofs.values() if not proof.passed]


def test_another_resize_mode_and_another_mean_are_noticed(tmp_path):
    spec, bundle = export(tmp_path, save_clip, "image")

    def shift_mean(config):
        config["preprocess"]["mean"][0] += 0.01

    change_config(bundle, "vision", shift_mean)
    assert not prove(spec, bundle)["preprocessing"].passed

    def squash(config):
        config["preprocess"]["mean"][0] -= 0.01
        config["preprocess"]["resize_mode"] = "squash"

    change_config(bundle, "vision", squash)
    assert not prove(spec, bundle)["embedding"].passed


def test_another_padding_id_is_noticed(tmp_path):
    spec, bundle = export(tmp_path, save_siglip, "text")

    def change_padding(config):
        config["pad"] = 3

    change_config(bundle, "words", change_padding)
    assert not prove(spec, bundle)["embedding"].passed


def test_another_pooling_is_noticed(tmp_path):
    spec, bundle = export(tmp_path, CASES["sentence encoder, mean"][0], "text")
    pooling = tmp_path / "m" / "1_Pooling" / "config.json"
    config = json.loads(pooling.read_text())
    config |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    pooling.write_text(json.dumps(config))
    assert not prove(spec, bundle)["embedding"].passed


def test_another_start_of_a_text_is_noticed(tmp_path):
    spec, bundle = export(tmp_path, save_blip, "image", writes=True)

    def change_start(config):
        generation = config["generation"]
        generation["bos"] = 7
        generation["prompt"] = [7 for _ in generation["prompt"]]

    change_config(bundle, "writer", change_start)
    assert not prove(spec, bundle)["texts"].passed
