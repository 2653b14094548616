"""A fusion encoder: texts that attend to a picture, from the library's answer to the pruned bundle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import TOKENIZER, blip_matching_model
from test_several_nodes import add_second_nodes
from tokenizers import Tokenizer

from mmcompress.data.open_dataset import open_dataset
from mmcompress.errors import SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.modality import classify_layers
from mmcompress.kinds.fusion_encoder.deployed import FusionEncoder
from mmcompress.models.sources import load_model, load_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.run.run_targets import run
from mmcompress.runtime.graph import load_bundle
from mmcompress.spec.schema import Node

MATCH = """\
  match:
    kind: fusion_encoder
    source: python:own_fusion:build
    inputs: {text: captioner.texts, context: vision.tokens}
"""
QUICK = {
    "target": "1.3x",
    "search.trials": 2,
    "search.level_switches": 0,
    "search.linearization_rounds": 0,
    "search.max_artifacts": 1,
    "distill.steps": 2,
}


@pytest.fixture(scope="module")
def fused(tiny, tmp_path_factory):
    """The tiny pipeline, whose captions are also scored by how well they match the picture."""
    head, _, tail = (tiny / "spec.yaml").read_text().partition("  text:\n")
    text = head + MATCH + "  text:\n" + tail
    path = tmp_path_factory.mktemp("fused") / "fused.yaml"
    path.write_text(
        text.replace("./", f"{tiny}/").replace("scores: captioner.scores", "scores: match.scores")
    )
    return path


def test_layers_are_cross_modal_from_the_first_cross_attention_on(fused):
    spec = load_spec(fused)
    models = load_models(spec)
    layers = classify_layers(spec, {"match": models["match"].blocks})
    reasons = {layer.name: layer.reason for layer in layers if layer.node == "match"}
    cross_modal = {layer.name for layer in layers if layer.node == "match" and layer.cross_modal}
    assert cross_modal == {*reasons} - {"0.attention"}
    assert reasons["0.attention"] == "only the text stream passes through it"
    assert reasons["0.cross_attention"] == (
        "values meet: text from 'stream' and image from 'context'"
    )
    met = "the stream holds image+text since they met in '0.cross_attention'"
    assert reasons["0.ffn"] == reasons["1.attention"] == reasons["1.ffn"] == met


def test_matching_is_learned_from_the_own_picture_and_another_one(fused):
    spec = load_spec(fused)
    models = load_models(spec)
    pipeline = TorchPipeline(spec, models)
    batch = pipeline.collate(open_dataset(spec.data).load("train", 6))
    outputs = pipeline.forward(models, batch)
    own = outputs["match"]
    vision_tokens = outputs["vision"]["tokens"]
    ids = batch.inputs["match"][:, 0]
    for i in range(6):
        other = vision_tokens[(i + 1) % 6][None]
        expected = models["match"](ids[i : i + 1], other)[2]
        assert torch.allclose(own["other_scores"][i], expected, atol=1e-5)
    right = -torch.log(torch.sigmoid(own["scores"])).sum()
    wrong = -torch.log(1 - torch.sigmoid(own["other_scores"])).sum()
    losses = pipeline.compute_losses(outputs, batch)
    assert losses["match.match"].item() == pytest.approx((right + wrong).item() / 12, rel=1e-4)
    assert pipeline.compute_quality(outputs, batch)["match_accuracy"] == pytest.approx(
        float((own["scores"] > own["other_scores"]).float().mean())
    )
    alone = pipeline.forward(models, batch[:1])["match"]
    empty = models["match"](ids[:1], torch.zeros_like(vision_tokens[:1]))[2]
    assert torch.allclose(alone["other_scores"], empty, atol=1e-5)


def test_labels_of_the_teacher_are_its_scores(fused):
    spec = load_spec(fused, {"data.labels": "teacher"})
    models = load_models(spec)
    pipeline = TorchPipeline(spec, models)
    batch = pipeline.collate(open_dataset(spec.data).load("train", 6))
    reference = pipeline.compute_reference_outputs(models, batch)
    outputs = pipeline.forward_in_pieces(models, batch)
    own = outputs["match"]
    logits = torch.cat([own["scores"], own["other_scores"]])
    loss = pipeline.compute_losses(outputs, batch, dense=reference)["match.match"]
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().mean()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-5)


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_fusion_encoder_and_two_generators_go_the_whole_way_under_their_own_names(
    fused, tiny, tmp_path, machine, one_artifact
):
    """For batches of two requests, so that both are answered together from the table to the end."""
    path = tmp_path / "spec.yaml"
    path.write_text(add_second_nodes(fused.read_text()).replace("./", f"{tiny}/"))
    out = tmp_path / "run"
    metrics = ["retrieval", {"kind": "caption", "of": "pick"}, "endings"]
    changes = QUICK | {"metrics": metrics, "measure.batch": 2, "target": "1.8x"}
    summary = run(path, out, overrides=changes, policy=one_artifact, **machine)
    figures = {"caption_exact_match", "ends_by_itself.captioner", "ends_by_itself.writer"}
    for figure in ("image_to_text_r1", "text_to_image_r1"):
        figures |= {f"{figure}.choose", f"{figure}.pick"}
    assert set(summary.compressed.quality) == figures == set(summary.baseline.quality)
    assert all(proof.passed for proof in summary.proofs)
    assert {proof.name for proof in summary.proofs if proof.node == "match"} >= {
        "masked == sliced",
        "torch == onnx",
    }
    before = summary.baseline.nodes["match"]
    after = summary.compressed.nodes["match"]
    assert after.params < before.params
    assert summary.device.endswith("-batch2")
    assert "a batch of 2 requests may take" in (out / "report.md").read_text()
    assert "Batch size 2" in (out / "report.html").read_text()
    bundle = load_bundle(out / "bundle")
    assert bundle.manifest["batch"] == 2
    picture = np.zeros((32, 32, 3), np.uint8)
    values = bundle.run(image=picture)
    assert len(values["match"]["scores"]) == len(values["captioner"]["texts"]) == 2
    lengths = np.linalg.norm(values["match"]["embedding"], axis=1)
    assert lengths == pytest.approx(np.ones(2), abs=1e-5)
    similarity = values["text"]["embedding"] @ values["vision"]["embedding"][0]
    rank = similarity + 0.1 * np.array(values["match"]["scores"])
    assert values["choose"]["best"] == values["captioner"]["texts"][int(rank.argmax())]


def deploy_blip_matching(tmp_path):
    """Return a BLIP of the library, its tokenizer, its image tower, and its deployed text side."""
    from transformers import BlipImageProcessor

    from mmcompress.export.onnx import export_node
    from mmcompress.runtime.sessions import TimedSession

    tokenizer = Tokenizer.from_str(TOKENIZER())
    library = blip_matching_model(tokenizer.get_vocab_size())
    folder = tmp_path / "blip"
    library.save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    vision = load_model(Node(kind="image_encoder", inputs={}, source=str(folder)))
    match = load_model(Node(kind="fusion_encoder", inputs={}, source=str(folder)))
    files = export_node(match, tmp_path / "match")
    (tmp_path / "match" / "tokenizer.json").write_text(match.tokenizer_json)
    sessions = {name: TimedSession(file, 0) for name, file in files.items()}
    deployed = FusionEncoder(sessions, match.config, tmp_path / "match")
    return library, tokenizer, vision, deployed


def test_blip_matches_raw_pictures_and_texts_as_its_library_does(tmp_path):
    """Both nodes of one checkpoint, deployed on ONNX Runtime, against the library's whole model."""
    library, tokenizer, vision, deployed = deploy_blip_matching(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    texts = ["a cat", "two dogs and a cat left of the tree", ""]
    with torch.no_grad():
        tokens = vision(pixels)[1]
        for text, score in zip(texts, deployed(texts, tokens.numpy())["scores"], strict=True):
            ids = torch.tensor([tokenizer.encode(text).ids])
            expected = library(input_ids=ids, pixel_values=pixels).itm_score.softmax(-1)[0, 1]
            probability = 1 / (1 + np.exp(-score))
            assert probability == pytest.approx(float(expected), abs=1e-5)


def test_the_query_of_a_list_cannot_come_from_a_fusion_encoder(fused):
    spec = load_spec(fused)
    lookup = Node(
        kind="lookup", inputs={"query": "match.embedding"}, options={"texts": "texts.txt"}
    )
    from mmcompress.graph.validate import list_problems

    wrong = replace(spec, nodes={**spec.nodes, "found": lookup})
    messages = [message for _, message in list_problems(wrong)]
    assert "must be the embedding of a text_encoder: it embeds the list too" in messages


def test_tokens_of_another_width_are_refused(fused):
    text = fused.read_text().replace("context: vision.tokens}\n  text", "context: vision}\n  text")
    path = fused.with_name("wrong.yaml")
    path.write_text(text)
    with pytest.raises(SpecError, match="nothing is named 'vision'"):
        load_spec(path)
