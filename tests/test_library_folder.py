"""A pruned model as a checkpoint of its own library: loaded by the library, it answers alike."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import library_checkpoints as checkpoints
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, CLIPModel, GPT2Config, GPT2LMHeadModel

from mmcompress.cli import main
from mmcompress.errors import ModelError
from mmcompress.export.family_contract import make_random_inputs, sample_cuts
from mmcompress.export.library_folder import (
    PrunedNode,
    find_library_folder,
    write_library_folder,
)
from mmcompress.export.proofs import compute_outputs
from mmcompress.models.sources import load_model
from mmcompress.prune.surgery import copy_without_units
from mmcompress.run.load_modules import load_modules
from mmcompress.spec.schema import Node

WRITER = {"max_tokens": 9}
CASES = {
    "CLIP, image": (checkpoints.save_clip, "image_encoder", {}),
    "CLIP, text": (checkpoints.save_clip, "text_encoder", {}),
    "SigLIP, image": (checkpoints.save_siglip, "image_encoder", {}),
    "ViT": (checkpoints.save_vit, "image_encoder", {}),
    "BERT": (
        partial(checkpoints.save_sentence_encoder, pooling_mode_mean_tokens=True),
        "text_encoder",
        {},
    ),
    "RoBERTa": (checkpoints.save_roberta, "text_encoder", {}),
    "BLIP, image": (checkpoints.save_blip, "image_encoder", {}),
    "BLIP, decoder": (checkpoints.save_blip, "text_decoder", WRITER),
    "GIT, decoder": (checkpoints.save_git, "text_decoder", WRITER),
    "LLaVA, decoder": (
        checkpoints.save_llava,
        "text_decoder",
        {**WRITER, "prompt": "a cat <image> left of"},
    ),
    "Whisper, encoder": (checkpoints.save_whisper, "audio_encoder", {}),
    "Whisper, decoder": (checkpoints.save_whisper, "text_decoder", WRITER),
    "mBART": (checkpoints.save_mbart, "text_decoder", WRITER),
    "GPT-2": (
        partial(checkpoints.save_cross_attending, config=GPT2Config, model=GPT2LMHeadModel),
        "text_decoder",
        WRITER,
    ),
    "open_clip, image": (checkpoints.save_open_clip, "image_encoder", {}),
    "open_clip, text": (checkpoints.save_open_clip, "text_encoder", {}),
}


def prune(folder: Path, kind: str, options: dict, *, heads: bool = True) -> PrunedNode:
    """Cut a model by its description, and train it: every weight moves a little."""
    node = Node(kind=kind, inputs={}, source=str(folder), options=options)
    dense = load_model(node)
    units = {
        name: kept
        for name, kept in sample_cuts(dense)["mixture"].items()
        if dense.get_block(name).group != "tokens"
    }
    for block in dense.blocks:
        if block.kind.endswith("ffn"):
            # No block keeps all: the library's layers can be smaller.
            units[block.name] = units[block.name][: block.units // 2]
            if not heads and not len(units[block.name]):
                units[block.name] = torch.arange(block.granularity)
        elif not heads:
            units.pop(block.name, None)
    droppable = [block for block in dense.blocks if block.drop and block.group == "heads"]
    if heads and droppable:
        units[droppable[0].name] = torch.zeros(0, dtype=torch.long)
    pruned = copy_without_units(dense, units)
    generator = torch.Generator().manual_seed(5)
    for parameter in pruned.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    kept = {block.name: len(units.get(block.name, range(block.units))) for block in dense.blocks}
    return PrunedNode(name="node", node=node, dense=dense, pruned=pruned.eval(), kept=kept)


@pytest.mark.examples(3)
@pytest.mark.parametrize("case", CASES)
def test_the_library_answers_as_the_pruned_model(case, tmp_path):
    save, kind, options = CASES[case]
    source = tmp_path / "source"
    save(source)
    # Layers of Llama have no bias for what a dropped one adds.
    pruned = prune(source, kind, options, heads=case != "LLaVA, decoder")
    folder, scheme = find_library_folder(pruned.node)
    proof = write_library_folder(folder, tmp_path / "out", pruned=pruned, scheme=scheme)
    assert proof.passed and proof.name == "library == pruned"
    # The dense model answers otherwise.
    inputs = make_random_inputs(pruned.dense, 2)
    with torch.no_grad():
        dense = compute_outputs(pruned.dense, inputs)[0]
        cut = compute_outputs(pruned.pruned, inputs)[0]
    assert not torch.allclose(dense, cut, atol=1e-2)
    if (source / "config.json").exists() and kind != "image_encoder":
        before = AutoConfig.from_pretrained(source).to_dict()
        after = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
        assert json.dumps(before, default=str) != json.dumps(after, default=str)
        size = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
        assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.safetensors")) < size


@pytest.mark.slow
def test_two_nodes_of_one_checkpoint_share_a_folder(tmp_path):
    source = tmp_path / "source"
    checkpoints.save_clip(source)
    image = prune(source, "image_encoder", {})
    text = prune(source, "text_encoder", {})
    first = write_library_folder(source, tmp_path / "first", pruned=image, scheme="")
    both = write_library_folder(tmp_path / "first", tmp_path / "both", pruned=text, scheme="")
    assert first.passed and both.passed
    library = CLIPModel.from_pretrained(tmp_path / "both")
    sizes = (
        library.config.vision_config.intermediate_size,
        library.config.text_config.intermediate_size,
    )
    assert max(sizes) < 64
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = image.pruned(images)[0]
        actual = library.get_image_features(pixel_values=images)
        actual = getattr(actual, "pooler_output", actual)
    actual = torch.nn.functional.normalize(actual, dim=-1)
    assert torch.allclose(expected, actual, atol=1e-5)


@pytest.mark.slow
def test_what_a_library_cannot_express_is_told(tmp_path):
    checkpoints.save_vit(tmp_path / "vit")
    pruned = prune(tmp_path / "vit", "image_encoder", {})
    [tokens] = [block for block in pruned.dense.blocks if block.group == "tokens"]
    kept = {**pruned.kept, tokens.name: tokens.units - 2}
    with pytest.raises(ModelError, match="positions were cut"):
        write_library_folder(
            tmp_path / "vit",
            tmp_path / "out",
            pruned=PrunedNode(
                name="node",
                node=pruned.node,
                dense=pruned.dense,
                pruned=pruned.pruned,
                kept=kept,
            ),
            scheme="",
        )
    assert not (tmp_path / "out").exists()
    checkpoints.save_t5(tmp_path / "t5")
    pruned = prune(tmp_path / "t5", "text_decoder", WRITER)
    with pytest.raises(ModelError, match=r"no bias for the mean|were trained apart"):
        write_library_folder(tmp_path / "t5", tmp_path / "out", pruned=pruned, scheme="")
    with pytest.raises(ModelError, match="no folder of a library"):
        find_library_folder(Node(kind="image_encoder", inputs={}, source="python:own_tower:build"))


@pytest.mark.slow
def test_a_finished_run_is_written_as_far_as_its_libraries_go(run_folder, tmp_path):
    command = ["export", str(run_folder), "--as-transformers", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    modules = load_modules(run_folder)
    written = {folder.name for folder in (tmp_path / "out").iterdir()}
    assert "captioner" in written
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or file.stat().st_mode & 0o044
    node = Node(
        kind="text_decoder", inputs={}, source=str(tmp_path / "out" / "captioner"), options=WRITER
    )
    inputs = make_random_inputs(modules["captioner"], 2)
    with torch.no_grad():
        expected = compute_outputs(modules["captioner"], inputs)[0]
        actual = compute_outputs(load_model(node), inputs)[0]
    assert torch.allclose(expected, actual, atol=1e-4)
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2 and "not empty" in again.output
    unfinished = CliRunner().invoke(main, [*command[:1], str(tmp_path), *command[2:]])
    assert unfinished.exit_code == 2
