"""The contract, kept by every family."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, TOKENIZER, coca_model, prove_marian
from safetensors.torch import save_file

from mmcompress.export import family_contract as contract
from mmcompress.export.proofs import (
    SURGERY_BOUND,
    compare_outputs,
    compute_outputs,
    copy_in_float64,
    make_masks,
)
from mmcompress.export.weights import save_weights
from mmcompress.models.sources import load_model
from mmcompress.prune.masks import mask_units
from mmcompress.prune.surgery import copy_without_units, resize_model_
from mmcompress.spec.schema import Node

FAST = (
    "open_clip ViT",
    "transformers BERT / MiniLM",
    "transformers GPT-2, cross-attending",
    "own fusion encoder",
)
"""One of each kind of node; the rest are not part of the fast suite."""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in FAMILIES]
)
def test_contract(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    proofs = contract.prove_library_match("node", model, run_library=model.library_says)
    proofs += contract.prove_contract(model, tmp_path)
    assert not [proof for proof in proofs if not proof.passed]
    names = {proof.name for proof in proofs}
    for cut in (*contract.group_blocks_by_kind(model), "mixture"):
        assert f"masked == sliced: {cut}" in names
    if model.kind == "text_decoder":
        assert "cached generation == library: dense" in names
        assert "cached generation == library: mixture" in names


@torch.no_grad()
def compare_wrong_cuts(model):
    """By unit kind: how far outputs are off where one unit is cut and its neighbor masked."""
    exact = copy_in_float64(model)
    inputs = contract._make_exact_inputs(model, 3)
    differences = {}
    for kind, blocks in contract.group_blocks_by_kind(model).items():
        block = blocks[-1]
        step = block.granularity
        if block.units < 3 * step or (kind == "tokens" and block.prefix_only):
            continue
        cut = {block.name: torch.arange(step, block.units)}
        neighbor = {
            block.name: torch.cat([torch.arange(step), torch.arange(2 * step, block.units)])
        }
        with mask_units(exact, make_masks(exact, neighbor)):
            masked = compute_outputs(exact, inputs)
        sliced = compute_outputs(copy_without_units(exact, cut), inputs)
        differences[kind] = compare_outputs(masked, sliced)
    return differences


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in FAMILIES]
)
def test_a_cut_that_is_wrong_by_one_unit_exceeds_the_bound_a_hundred_times(family):
    torch.manual_seed(0)
    differences = compare_wrong_cuts(FAMILIES[family]().eval())
    assert differences
    assert min(differences.values()) > 100 * SURGERY_BOUND, differences


def test_a_wrong_cut_breaks_the_contract(monkeypatch):
    model = FAMILIES["transformers LLaVA, grouped-query, gated"]().eval()

    def cut_wrongly(model, units):
        student = copy_without_units(model, units)
        for parameter in student.parameters():
            parameter.data[..., :1] += 0.01
        return student

    monkeypatch.setattr(contract, "copy_without_units", cut_wrongly)
    assert not any(proof.passed for proof in contract.prove_cuts("node", model))


def test_what_cannot_be_cut_is_refused_with_a_reason():
    model = FAMILIES["transformers GIT"]()
    with pytest.raises(ValueError, match="can't be removed whole"):
        copy_without_units(model, {"0.attention": torch.arange(0)})


def test_cocas_decoder_says_what_the_library_says():
    from mmcompress.models.families.open_clip import build_caption_decoder

    torch.manual_seed(0)
    library = coca_model()
    decoder = build_caption_decoder(
        copy.deepcopy(library), TOKENIZER(), candidates=1, max_tokens=14
    )
    image = torch.randn(2, 3, 32, 32)
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        tokens = library._encode_image(image)[1]
        expected = library(image, ids, output_labels=False)["logits"]
        assert torch.allclose(decoder(ids, tokens), expected, atol=1e-4)


def test_cocas_captions_are_as_long_as_the_librarys():
    import inspect

    from open_clip.coca_model import CoCa

    from mmcompress.models.families.open_clip import build_caption_decoder

    text = {"vocab_size": 60, "context_length": 40, "width": 32, "heads": 4, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 8}
    vision |= {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 4}
    text_side = {**text, "embed_cls": True, "output_tokens": True, "pad_id": 0}
    library = CoCa(32, text, text_side, vision)
    of_library = inspect.signature(CoCa.generate).parameters
    for asked, longest in ((0, of_library["seq_len"].default), (14, 14)):
        model = build_caption_decoder(
            copy.deepcopy(library), TOKENIZER(), candidates=1, max_tokens=asked
        )
        assert model.generation["max_tokens"] == longest
        assert model.generation["min_tokens"] == of_library["min_seq_len"].default


def _describe_module(module):
    """The class of every submodule, and a copy of every tensor."""
    classes = {path: type(part).__name__ for path, part in module.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return classes, tensors


def _assert_same_module(actual, expected):
    actual_classes, actual_tensors = actual
    expected_classes, expected_tensors = expected
    assert actual_classes == expected_classes
    assert list(actual_tensors) == list(expected_tensors)
    for name, tensor in expected_tensors.items():
        assert torch.equal(actual_tensors[name], tensor), name


def test_encoders_of_one_open_clip_source_share_nothing(tiny):
    """Cutting and rewriting one encoder leaves the cached model and every later encoder alone."""
    from mmcompress.models.families.open_clip import _load_clip

    _load_clip.cache_clear()
    cached, preprocess = _load_clip(
        f"local-dir:{tiny / 'clip'}", None, revision="", shapes_only=False
    )
    cached_before = _describe_module(cached)
    preprocess_before = copy.deepcopy(preprocess)
    output_tokens_before = (cached.visual.output_tokens, cached.text.output_tokens)
    for kind in ("image_encoder", "text_encoder"):
        node = Node(kind=kind, inputs={}, source=str(tiny / "clip"))
        first = load_model(node)
        first_before = _describe_module(first)
        config_before = copy.deepcopy(first.config)
        resize_model_(first, {block.name: block.min_units for block in first.blocks})
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.zero_()
        first.config.get("preprocess", {}).get("mean", []).clear()
        second = load_model(node)
        _assert_same_module(_describe_module(second), first_before)
        assert second.config == config_before
    assert (
        _load_clip(f"local-dir:{tiny / 'clip'}", None, revision="", shapes_only=False)[0] is cached
    )
    _assert_same_module(_describe_module(cached), cached_before)
    assert preprocess == preprocess_before
    assert (cached.visual.output_tokens, cached.text.output_tokens) == output_tokens_before


def test_patches_left_out_are_patches_nobody_attends_to():
    """Against the library's own encoder with the other patches masked out of every attention."""
    torch.manual_seed(0)
    model = FAMILIES["transformers CLIP image"]()
    vision = model.tower.vision_model
    pixels = torch.randn(2, 3, 32, 32)
    kept = torch.tensor([0, 3, 4, 9, 15])
    with torch.no_grad():
        mask = torch.full((1, 1, 1, 17), -1e9)
        class_token = torch.zeros(1, dtype=torch.long)
        mask[..., torch.cat([class_token, kept + 1])] = 0
        embedded = vision.pre_layrnorm(vision.embeddings(pixels))
        outputs = vision.encoder(
            inputs_embeds=embedded, attention_mask=mask.expand(2, 1, 17, 17)
        ).last_hidden_state
        pooled = vision.post_layernorm(outputs[:, 0])
        expected = torch.nn.functional.normalize(model.tower.visual_projection(pooled), dim=-1)
        embedding, tokens = copy_without_units(model, {"tokens": kept})(pixels)
    assert torch.allclose(embedding, expected, atol=1e-5)
    assert tokens.shape[1] == 6


def _get_t5_bias(model, layer):
    return model.lm.decoder.block[layer].layer[0].SelfAttention.relative_attention_bias.weight


def test_t5_layers_lose_heads_of_their_own():
    model = FAMILIES["transformers T5"]()
    cut = copy_without_units(
        model, {"0.attention": torch.tensor([1, 3]), "1.attention": torch.tensor([0])}
    )
    assert torch.equal(_get_t5_bias(cut, 0), _get_t5_bias(model, 0)[[1, 3]])
    assert torch.equal(_get_t5_bias(cut, 1), _get_t5_bias(model, 1)[[0]])


@pytest.mark.very_slow
def test_saved_and_loaded_in_a_new_process_it_answers_the_same(tmp_path):
    kept_units = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model = make()
        units = contract.sample_cuts(model)["mixture"]
        cut = copy_without_units(model, units).eval()
        kept_units[name] = {block: len(indices) for block, indices in units.items()}
        file_name = name.replace("/", "-")
        save_weights({file_name: cut}, tmp_path)
        with torch.no_grad():
            outputs = contract.compute_outputs(cut, contract.make_random_inputs(cut, 2))
        answers = {str(i): output.contiguous() for i, output in enumerate(outputs)}
        save_file(answers, tmp_path / f"{file_name}.answers")
    (tmp_path / "kept.json").write_text(json.dumps(kept_units))
    tests_folder = Path(__file__).parent
    root = tests_folder.parent
    process = subprocess.run(
        [sys.executable, tests_folder / "reload.py", tmp_path],
        check=True,
        capture_output=True,
        text=True,
        cwd=tests_folder,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tools'}"},
        timeout=300,
    )
    worst = json.loads(process.stdout.splitlines()[-1])
    assert set(worst) == set(FAMILIES) and max(worst.values()) < 1e-5, worst


@pytest.mark.slow
def test_the_readmes_new_line_is_one_row(tmp_path, monkeypatch):
    """The worked example of the documentation: a decoder this project does not list."""
    from mmcompress.models.families import cross_attention_decoder

    readme = (Path(__file__).parents[1] / "docs/how_to/own_model.md").read_text()
    _, start, rest = readme.partition('DECODER_FAMILIES["marian"]')
    row = start + rest.partition("\n```")[0]
    families = dict(cross_attention_decoder.DECODER_FAMILIES)
    public_names = {
        "DECODER_FAMILIES": families,
        "DecoderFamily": cross_attention_decoder.DecoderFamily,
        "run_causal_decoder": cross_attention_decoder.run_causal_decoder,
    }
    exec(row, public_names)
    monkeypatch.setattr(cross_attention_decoder, "DECODER_FAMILIES", families)
    monkeypatch.setattr(
        "mmcompress.models.families.transformers_decoders.DECODER_FAMILIES", families
    )
    proofs = prove_marian(tmp_path)
    assert len(proofs) > 12 and not [proof for proof in proofs if not proof.passed]
