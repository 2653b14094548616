"""The contract, kept by every family."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, TOKENIZER, _stirred
from safetensors.torch import save_file

from mmcompress.export import family_contract as contract
from mmcompress.export.weights import save_weights
from mmcompress.models.sources import load_model
from mmcompress.prune.surgery import copy_without_units
from mmcompress.spec.schema import Node

FAST = (
    "open_clip ViT",
    "open_clip text tower",
    "open_clip CoCa caption decoder",
    "open_clip ModifiedResNet",
    "open_clip timm EfficientNet",
    "transformers CLIP image",
    "transformers DINOv2 gated",
    "transformers BERT / MiniLM",
    "transformers Whisper encoder",
    "transformers mBART",
    "transformers GPT-2, cross-attending",
    "transformers BLIP captioner",
    "transformers LLaVA, with a prompt",
    "transformers T5 gated",
)
"""One of each layout; the rest are not part of the fast suite."""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in FAMILIES]
)
def test_contract(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    proofs = contract.prove_library_match(
        "node", model, says=model.library_says
    ) + contract.prove_contract(model, tmp_path)
    assert not [p for p in proofs if not p.passed]
    names = {p.name for p in proofs}
    assert {
        f"masked == sliced: {k}" for k in (*contract.group_blocks_by_kind(model), "mixture")
    } <= names
    if model.kind == "text_decoder":
        assert {
            "cached generation == library: dense",
            "cached generation == library: mixture",
        } <= names


def test_a_wrong_cut_breaks_the_contract(tmp_path, monkeypatch):
    model = FAMILIES["transformers LLaVA, grouped-query, gated"]().eval()
    right = copy_without_units

    def wrong(m, units):
        cut = right(m, units)
        for p in cut.parameters():
            p.data[..., :1] += 0.01
        return cut

    monkeypatch.setattr(contract, "sliced", wrong)
    assert not any(p.passed for p in contract.prove_cuts("node", model))


def test_what_cannot_be_cut_is_refused_with_a_reason():
    prefix = FAMILIES["transformers GIT"]()
    with pytest.raises(ValueError, match="can't be removed whole"):
        copy_without_units(prefix, {"0.attention": torch.arange(0)})


def test_cocas_decoder_says_what_the_library_says():
    from families import TOKENIZER, coca_model

    from mmcompress.models.families.open_clip import build_caption_decoder

    torch.manual_seed(0)
    library = coca_model()
    decoder = build_caption_decoder(
        copy.deepcopy(library), TOKENIZER(), candidates=1, max_tokens=14
    )
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        tokens = library._encode_image(image)[1]
        want = library(image, ids, output_labels=False)["logits"]
        assert torch.allclose(decoder(ids, tokens), want, atol=1e-4)


def test_patches_left_out_are_patches_nobody_attends_to():
    """Against the library's own encoder with the other patches masked out of every attention."""
    torch.manual_seed(0)
    model = FAMILIES["transformers CLIP image"]()
    vision, pixels, kept = (
        model.tower.vision_model,
        torch.randn(2, 3, 32, 32),
        torch.tensor([0, 3, 4, 9, 15]),
    )
    with torch.no_grad():
        hidden = torch.full((1, 1, 1, 17), -1e9)
        hidden[..., torch.cat([torch.zeros(1, dtype=torch.long), kept + 1])] = 0
        x = vision.pre_layrnorm(vision.embeddings(pixels))
        x = vision.encoder(
            inputs_embeds=x, attention_mask=hidden.expand(2, 1, 17, 17)
        ).last_hidden_state
        want = torch.nn.functional.normalize(
            model.tower.visual_projection(vision.post_layernorm(x[:, 0])), dim=-1
        )
        embedding, tokens = copy_without_units(model, {"tokens": kept})(pixels)
    assert torch.allclose(embedding, want, atol=1e-5) and tokens.shape[1] == 6


def test_t5_layers_lose_heads_of_their_own():
    model = FAMILIES["transformers T5"]()
    cut = copy_without_units(
        model, {"0.attention": torch.tensor([1, 3]), "1.attention": torch.tensor([0])}
    )
    bias = lambda m, i: m.lm.decoder.block[i].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(bias(cut, 0), bias(model, 0)[[1, 3]]) and torch.equal(
        bias(cut, 1), bias(model, 1)[[0]]
    )


def test_saved_and_loaded_in_a_new_process_it_answers_the_same(tmp_path):
    kept = {}
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model = make()
        units = contract.sample_cuts(model)["mixture"]
        cut = copy_without_units(model, units).eval()
        kept[name] = {b: len(k) for b, k in units.items()}
        save_weights({name.replace("/", "-"): cut}, tmp_path)
        with torch.no_grad():
            out = contract.tuple_outputs(cut, contract.random_inputs(cut, 2))
        save_file(
            {str(i): x.contiguous() for i, x in enumerate(out)},
            tmp_path / f"{name.replace('/', '-')}.answers",
        )
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, here / "reload.py", tmp_path],
        check=True,
        capture_output=True,
        text=True,
        cwd=here,
        timeout=300,
    )
    worst = json.loads(run.stdout.splitlines()[-1])
    assert set(worst) == set(FAMILIES) and max(worst.values()) < 1e-5, worst


def test_the_readmes_new_line_is_one_row(tmp_path, monkeypatch):
    """The worked example of the README: a decoder this project does not list."""
    from transformers import MarianConfig, MarianForCausalLM

    from mmcompress.models.families import cross_attention_decoder as generators

    readme = (Path(__file__).parents[1] / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith('LINES["marian"]'))
    lines = dict(generators.DECODER_FAMILIES)
    exec(row, {"LINES": lines, "Line": generators.DecoderFamily, "_causal": generators._causal})
    monkeypatch.setattr(generators, "DECODER_FAMILIES", lines)
    special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    special |= {"attn_implementation": "eager", "forced_eos_token_id": None}
    sizes = {
        "vocab_size": 60,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
    }
    c = MarianConfig(
        **sizes, **special, max_position_embeddings=24, is_decoder=True, is_encoder_decoder=False
    )
    torch.manual_seed(0)
    whole = _stirred(MarianForCausalLM(c))
    whole.save_pretrained(tmp_path / "marian")
    (tmp_path / "marian" / "tokenizer.json").write_text(TOKENIZER())
    model = load_model(
        Node(
            kind="text_decoder",
            inputs={},
            source=f"transformers:{tmp_path / 'marian'}",
            candidates=2,
            max_tokens=12,
        )
    )
    says = lambda ids, context: (whole(input_ids=ids, encoder_hidden_states=context).logits,)
    proofs = contract.prove_library_match("node", model, says=says) + contract.prove_contract(
        model, tmp_path / "proofs"
    )
    assert len(proofs) > 12 and not [p for p in proofs if not p.passed]
