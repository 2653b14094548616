"""`dense == library`: it holds for checkpoints as their libraries save them, and it can fail."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from families import FAMILIES
from library_checkpoints import CASES_BY_FAMILY, LIBRARY_CASES, LibraryCase
from PIL import Image
from test_whisper_start import MULTILINGUAL, write_whisper
from transformers import BertLMHeadModel

from mmcompress.data.open_dataset import open_dataset
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.export.fidelity import open_reference, prove_fidelity
from mmcompress.export.written_texts import WritingInput, compare_texts, make_text_proof
from mmcompress.graph.load_spec import load_spec
from mmcompress.models.families.cross_attention_decoder import DECODER_FAMILIES
from mmcompress.models.families.fusion_encoders import FUSION_FAMILIES
from mmcompress.models.families.prefix_decoder import PREFIX_FAMILIES
from mmcompress.models.families.transformers_encoders import (
    AUDIO_FAMILIES,
    IMAGE_FAMILIES,
    TEXT_FAMILIES,
)
from mmcompress.models.reference.base import WritingRequest
from mmcompress.models.reference.transformers import TransformersImages
from mmcompress.models.sources import load_models
from mmcompress.runtime.audio import open_audio, split_sound
from mmcompress.runtime.beam_search import Generation
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.images import open_image
from mmcompress.storage import write_record

INPUT_COUNT = 5
"""Ordinary inputs of a proof here; odd ones come on top."""
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


@pytest.fixture(scope="session")
def copy_export(make_once):
    """`copy_export(folder, name, data="")`: what `export` makes of a case, exported once."""

    def copy(folder, name, *, data=""):
        label = re.sub(r"\W+", "-", name)
        made = make_once(f"export-{label}", lambda new: export(new, LIBRARY_CASES[name]))
        shutil.copytree(made, folder, dirs_exist_ok=True)
        path = folder / "spec.yaml"
        path.write_text(path.read_text() + data)
        return load_spec(path, for_export=True), folder / "b"

    return copy


def prove(spec, bundle, *, left_out=None):
    """Prove fidelity; returns the proofs by name. What is left out is added to a list."""

    def listen(message, share):
        if left_out is not None:
            left_out.append(message)

    proofs = prove_fidelity(
        spec,
        bundle=bundle,
        data=open_dataset(spec.data),
        on_progress=listen,
        input_count=INPUT_COUNT,
    )
    return {proof.name.removeprefix("dense == library: "): proof for proof in proofs}


def change_config(bundle, node, change):
    """Apply a change to the configuration of a node in the manifest of a bundle."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["graph"]["nodes"][node]["config"])
    write_record(bundle / "manifest.json", manifest)


@pytest.mark.parametrize("name", ["CLIP, picture", "CLIP, text", "Whisper"])
def test_a_bundle_of_every_type_of_input_answers_noise(name, tmp_path):
    """Memory and speed are measured so where no other request is at hand."""
    case = replace(LIBRARY_CASES[name], writer=None)
    _, bundle = export(tmp_path, case)
    pipeline = load_bundle(bundle)
    [answer] = pipeline(**pipeline.make_noise_request()).values()
    assert len(answer) > 0 and np.isfinite(answer).all()


FAST = (
    "CLIP, picture",
    "SigLIP, text",
    "sentence encoder, mean",
    "open_clip text, a vocabulary of its own",
    "BLIP",
    "Whisper",
)
"""One of each input, each library, and each way of writing; the rest are not part of the fast suite.
"""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in LIBRARY_CASES],
)
def test_a_checkpoint_as_its_library_saves_it_is_answered_alike(name, tmp_path, copy_export):
    case = LIBRARY_CASES[name]
    left_out = []
    proofs = prove(*copy_export(tmp_path, name), left_out=left_out)
    if case.model_type:
        folders = {"m": case.model_type, "d": case.writer_type}
        for folder, model_type in folders.items():
            config = tmp_path / folder / "config.json"
            assert not config.exists() or json.loads(config.read_text())["model_type"] == model_type
    assert "preprocessing" in proofs
    if "texts" in proofs:
        # one text of all inputs would prove little
        assert " 1 different texts" not in proofs["texts"].detail
    assert ("texts" in proofs) == (case.writer is not None)
    assert not [proof for proof in proofs.values() if not proof.passed]
    assert not left_out


def test_the_readme_claims_the_families_that_are_proved():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    _, start, rest = readme.partition("| kind | open_clip | transformers |")
    assert start
    claims = set()
    for line in rest.partition("\n\n")[0].splitlines()[2:]:
        kind, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for library, cell in zip(("open_clip", "transformers"), cells, strict=True):
            claims |= {(kind, library, name.strip()) for name in cell.split(",") if name.strip()}
    proved = {claim for case in LIBRARY_CASES.values() for claim in case.claims}
    assert claims == proved


def test_every_family_of_the_contract_has_a_checkpoint_of_its_library():
    assert set(FAMILIES) - {"own fusion encoder"} == set(CASES_BY_FAMILY)
    assert set(CASES_BY_FAMILY.values()) <= set(LIBRARY_CASES)


def test_every_row_of_the_tables_of_families_is_proved():
    tables = {
        "image_encoder": [*IMAGE_FAMILIES, "vision-encoder-decoder"],
        "text_encoder": TEXT_FAMILIES,
        "audio_encoder": AUDIO_FAMILIES,
        "text_decoder": [*DECODER_FAMILIES, *PREFIX_FAMILIES],
        "fusion_encoder": FUSION_FAMILIES,
    }
    rows = {(kind, model_type) for kind, table in tables.items() for model_type in table}
    proved = {row for case in LIBRARY_CASES.values() for row in case.list_rows() if row[1]}
    # open_clip's CoCa is a case without a model type
    assert rows - {("text_decoder", "coca")} == proved


def test_another_resize_mode_and_another_mean_are_noticed(tmp_path, copy_export):
    spec, bundle = copy_export(tmp_path, "CLIP, picture")

    def shift_mean(config):
        config["preprocess"]["mean"][0] += 0.01

    change_config(bundle, "eyes", shift_mean)
    assert not prove(spec, bundle)["preprocessing"].passed

    def squash(config):
        config["preprocess"]["mean"][0] -= 0.01
        config["preprocess"]["resize_mode"] = "squash"

    change_config(bundle, "eyes", squash)
    assert not prove(spec, bundle)["embedding"].passed


def test_another_padding_id_is_noticed(tmp_path, copy_export):
    spec, bundle = copy_export(tmp_path, "SigLIP, text")

    def change_padding(config):
        config["pad"] = 3

    change_config(bundle, "words", change_padding)
    assert not prove(spec, bundle)["embedding"].passed


def test_another_pooling_is_noticed(tmp_path, copy_export):
    spec, bundle = copy_export(tmp_path, "sentence encoder, mean")
    pooling = tmp_path / "m" / "1_Pooling" / "config.json"
    config = json.loads(pooling.read_text())
    config |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    pooling.write_text(json.dumps(config))
    assert not prove(spec, bundle)["embedding"].passed


def test_another_start_of_a_text_is_noticed(tmp_path, copy_export):
    spec, bundle = copy_export(tmp_path, "BLIP")

    def change_start(config):
        generation = config["generation"]
        generation["bos"] = 7
        generation["prompt"] = [7 for _ in generation["prompt"]]

    change_config(bundle, "writer", change_start)
    assert not prove(spec, bundle)["texts"].passed


def write_picture_folder(folder):
    """Pictures as people have them, each in a mode of its own; returns the section `data`."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    lines = []
    for i in range(12):
        pixels = Image.fromarray(rng.integers(0, 255, (5, 7, 3), np.uint8)).resize((70, 50))
        name = f"{i}.jpg" if i % 3 == 0 else f"{i}.png"
        if i % 3 == 0:
            pixels.save(folder / name, exif=exif)
        else:
            if i % 3 == 1:
                pixels.putalpha(Image.fromarray(np.asarray(pixels)[..., 0]))
            pixels.save(folder / name)
        split = ("val", "train", "val", "test")[i % 4]
        lines.append(json.dumps({"image": name, "caption": f"a red {i}", "split": split}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return f"data: {{kind: folder, options: {{path: {folder}}}}}\n"


def test_files_of_the_data_go_to_the_library_as_they_are(tmp_path, copy_export):
    data = write_picture_folder(tmp_path / "photos")
    spec, bundle = copy_export(tmp_path, "CLIP, picture", data=data)
    proofs = prove(spec, bundle)
    assert all(proof.passed for proof in proofs.values())
    # input 1 is turned by EXIF, others have alpha
    assert "alpha on white, on purpose: input" in proofs["preprocessing"].detail


def test_a_dataset_that_forgets_how_a_camera_was_held_is_noticed(
    tmp_path, monkeypatch, copy_export
):
    data = write_picture_folder(tmp_path / "photos")
    spec, bundle = copy_export(tmp_path, "CLIP, picture", data=data)

    def read_carelessly(path):
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    monkeypatch.setattr("mmcompress.data.folder._read_pixels", read_carelessly)
    proof = prove(spec, bundle)["preprocessing"]
    assert not proof.passed
    assert "as the data decode it" in proof.detail


def open_without(step):
    """`open_image` of the runtime without one of the things that it does."""

    def open_carelessly(source):
        if isinstance(source, np.ndarray):
            return open_image(source)
        with Image.open(source) as picture:
            picture.load()
        has_alpha = picture.mode == "RGBA" or "transparency" in picture.info
        skipped = {
            "EXIF": picture.getexif().get(0x0112, 1) != 1,
            "alpha": has_alpha,
            "depth": picture.mode[0] in "IF",
        }
        if skipped[step]:
            return picture.convert("RGBA" if has_alpha else picture.mode).convert("RGB")
        return open_image(source)

    return open_carelessly


@pytest.mark.parametrize(
    ("step", "noticed"),
    [
        ("EXIF", ("turned by EXIF",)),
        ("alpha", ("RGBA", "palette with alpha")),
        ("depth", ("16 bits", "floats")),
    ],
)
def test_a_picture_that_is_opened_otherwise_is_noticed(
    step, noticed, tmp_path, monkeypatch, copy_export
):
    spec, bundle = copy_export(tmp_path, "CLIP, picture")
    monkeypatch.setattr("mmcompress.runtime.images.open_image", open_without(step))
    proof = prove(spec, bundle)["preprocessing"]
    assert not proof.passed
    assert any(f"most at {name}" in proof.detail for name in noticed)


@pytest.mark.slow
def test_odd_sounds_are_heard_as_what_they_are(tmp_path, copy_export):
    """Stereo of another rate from files, and what the bundle does with channels and rates."""
    folder = tmp_path / "speech"
    (folder / "wavs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(10):
        noise = 0.1 * rng.standard_normal((int((0.4 + 0.2 * i) * 22050), 2))
        soundfile.write(folder / "wavs" / f"{i}.wav", noise, 22050)
        lines.append(f"{i}|a red {i}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    data = f"data: {{kind: speech_folder, options: {{path: {folder}}}}}\n"
    spec, bundle = copy_export(tmp_path, "Whisper", data=data)
    proofs = prove(spec, bundle)
    assert all(proof.passed for proof in proofs.values())
    assert "of silence nothing is written, on purpose" in proofs["texts"].detail


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["two channels", "8 kHz", "a long sound"])
def test_a_sound_that_is_opened_otherwise_is_noticed(fault, tmp_path, monkeypatch, copy_export):
    spec, bundle = copy_export(tmp_path, "Whisper")

    def open_carelessly(source):
        if fault == "8 kHz" and isinstance(source, tuple):
            return source[0]
        if fault == "two channels" and not isinstance(source, tuple) and source.ndim == 2:
            return source[:, 0]
        return open_audio(source)

    def cut_carelessly(samples, seconds):
        is_made_up = len(samples) == int(2.5 * seconds * 16000)
        return [samples[:16000]] if is_made_up else split_sound(samples, seconds)

    monkeypatch.setattr("mmcompress.kinds.audio_encoder.deployed.open_audio", open_carelessly)
    if fault == "a long sound":
        monkeypatch.setattr("mmcompress.kinds.audio_encoder.deployed.split_sound", cut_carelessly)
    proofs = prove(spec, bundle)
    assert not proofs["preprocessing"].passed
    assert f"most at {fault}" in proofs["preprocessing"].detail


def make_writing(written, library_text, *, logits):
    """A deployed generator and a library's, each with a fixed text."""
    trace = SimpleNamespace(sequences=((0.0, tuple(written)),))
    generation = Generation(bos=0, eos=2, pad=1, beams=1, max_tokens=9)

    class Deployed:
        def __init__(self):
            self.generation = generation
            self.traces = [trace]

        def __call__(self, tokens):
            return {}

    class Library:
        def write(self, raw, request):
            return list(library_text)

        def compute_logits(self, raw, *, ids, request):
            return np.asarray(logits, np.float32)

    return Deployed(), Library()


@pytest.mark.parametrize(
    ("logits", "is_tie"), [([0, 0, 0, 1.0, 1.00005, 0], True), ([0, 0, 0, 1.0, 1.001, 0], False)]
)
def test_a_tie_of_two_logits_is_told_and_does_not_fail(logits, is_tie):
    deployed, library = make_writing([0, 5, 3, 2], [0, 5, 4, 4, 2], logits=logits)
    request = WritingRequest(beams=1, max_tokens=9, start=(0,))
    one = WritingInput(name="input 1", tokens=np.zeros((1, 1, 1)), references=(None,))
    found = compare_texts(deployed, library, request=request, inputs=[one])
    proof = make_text_proof("writer", found, notes=[])
    assert proof.passed == is_tie
    assert ("ties: input 1: tokens 4 and 3 have logits 5.0e-05 apart" in proof.detail) == is_tie
    assert ("from token 3 on [3, 2] deployed" in proof.detail) != is_tie


@pytest.mark.parametrize("written", [[0, 5, 4], [0, 5, 4, 4, 2], [5, 4, 2]])
def test_a_text_of_another_start_or_end_is_no_tie(written):
    deployed, library = make_writing(written, [0, 5, 4, 2], logits=[0.0] * 6)
    request = WritingRequest(beams=1, max_tokens=9, start=(0,))
    one = WritingInput(name="input 1", tokens=np.zeros((1, 1, 1)), references=(None,))
    found = compare_texts(deployed, library, request=request, inputs=[one])
    is_tie = written == [0, 5, 4, 4, 2]
    assert make_text_proof("writer", found, notes=[]).passed == is_tie


@pytest.mark.slow
def test_what_is_left_out_is_named(tmp_path, monkeypatch):
    """A model of one's own, what reads it, and an odd input that a library refuses."""
    case = LIBRARY_CASES["mBART"]
    spec, bundle = export(tmp_path, case)
    own = replace(spec.nodes["eyes"], source="python:own_tower:build")
    left_out = []
    assert not prove(replace(spec, nodes={**spec.nodes, "eyes": own}), bundle, left_out=left_out)
    assert "eyes is not compared: a model of one's own has no library" in left_out[0]
    assert "writer is not compared: it reads eyes, which is not compared" in left_out[1]

    height, width, _ = open_dataset(spec.data).load("val", 1).inputs[0].shape

    def refuse(self, raw):
        if raw.size == (width // 3, height):
            raise ValueError("too narrow")
        return answer(self, raw)

    answer = TransformersImages.answer
    monkeypatch.setattr(TransformersImages, "answer", refuse)
    proof = prove(spec, bundle)["preprocessing"]
    assert proof.passed
    assert "its library refuses portrait (ValueError: too narrow)" in proof.detail


def save_multilingual_whisper(folder):
    write_whisper(folder, **MULTILINGUAL, max_length=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    ["language: de", "language: en, task: translate", "language: de, prompt: a red cat"],
)
def test_whispers_language_task_and_prompt_are_the_librarys(options, tmp_path):
    case = LibraryCase(
        save=save_multilingual_whisper,
        input_type="audio",
        claims=(),
        writer=f"max_tokens: 20, {options}",
    )
    proofs = prove(*export(tmp_path, case))
    assert all(proof.passed for proof in proofs.values()), proofs["texts"].detail


@pytest.mark.very_slow
@pytest.mark.parametrize("candidates", [1, 3])
def test_coca_writes_captions_as_long_as_its_library_does(tmp_path, candidates):
    case = replace(LIBRARY_CASES["open_clip CoCa"], writer=f"candidates: {candidates}")
    left_out = []
    proof = prove(*export(tmp_path, case), left_out=left_out)["texts"]
    assert proof.passed, proof.detail


@pytest.mark.slow
def test_weights_in_half_precision_are_compared_in_float32(tmp_path):
    def save(folder):
        LIBRARY_CASES["BERT"].save_writer(folder)
        BertLMHeadModel.from_pretrained(folder).half().save_pretrained(folder)

    case = replace(LIBRARY_CASES["BERT"], save_writer=save)
    assert all(proof.passed for proof in prove(*export(tmp_path, case)).values())


def test_random_weights_of_open_clip_are_not_compared(tiny):
    """The library would draw others: the answers of two random models tell nothing."""
    overrides = {"nodes.vision.source": "open_clip:ViT-B-32@random"}
    assert open_reference(load_spec(tiny / "spec.yaml", overrides), "vision") is None
