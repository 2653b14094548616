"""Each key of a generation configuration is followed as the library follows it, or refused by name.

The deployed loop writes, over the untouched model of the library; the library's own `generate`
writes with the checkpoint's own configuration, not with options that the tool made.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import TEXT, TOKENIZER, _llava_whole, _stirred
from test_text_targets import IDS, make_tokenizer

from mmcompress.errors import ModelError
from mmcompress.export.onnx import export_node
from mmcompress.export.proofs import prove_generation
from mmcompress.models.families.cross_attention_decoder import assemble_decoder
from mmcompress.models.families.prefix_decoder import assemble_prefix_decoder
from mmcompress.runtime.beam_search import beam_search, read_generation
from mmcompress.runtime.token_scores import TokenScores

CONTEXTS = 2


def make_gpt2(**settings):
    """A small GPT-2 that attends to a context, with some keys in its generation configuration."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        **{**TEXT, "num_hidden_layers": 1, "vocab_size": 60},
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    model = _stirred(GPT2LMHeadModel(config))
    # flat enough that texts end, and that rules matter
    model.lm_head.weight.data *= 0.6
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    return model


def assemble(model, *, beams=1, max_tokens=0, prompt=""):
    return assemble_decoder(
        copy.deepcopy(model),
        "gpt2",
        tokenizer_json=TOKENIZER(),
        candidates=beams,
        max_tokens=max_tokens,
        prompt=prompt,
    )


def write_deployed(model, context, settings):
    """The deployed loop, over whole sequences in torch in place of a step with a cache."""
    generation = read_generation(settings)

    def step(ids_BT, position, past):
        history_BS = np.concatenate([past[0], ids_BT], 1)
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(history_BS),
                encoder_hidden_states=context.repeat(len(history_BS), 1, 1),
            ).logits[:, -1]
        scores = logits if generation.raw_scores else logits.log_softmax(-1)
        return TokenScores(scores.numpy().copy()), [history_BS]

    past = [np.zeros((generation.beams, 0), np.int64)]
    return [ids for _, ids in beam_search(step, past, generation=generation)]


def cut(rows, ends, start_length):
    """Rows of the library without what fills them up."""
    cut_rows = []
    for row in rows.tolist():
        ended = [i for i in range(start_length, len(row)) if row[i] in ends]
        cut_rows.append(row[: ended[0] + 1] if ended else row)
    return cut_rows


LIMIT = {"max_length": 14}
KEYS = {
    "several ends": {"eos_token_id": [2, 7, 11, 30, 31, 32, 33, 34], **LIMIT},
    "one end in a list": {"eos_token_id": [2], **LIMIT},
    "max_new_tokens": {"max_new_tokens": 6},
    "max_new_tokens over max_length": {"max_new_tokens": 6, "max_length": 20},
    "no limit": {},
    "min_length": {"min_length": 8, "eos_token_id": [2, 7, 11, 30, 31, 32], **LIMIT},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [2, 7, 11, 30, 31, 32], **LIMIT},
    "length_penalty": {"length_penalty": 2.0, "eos_token_id": [2, 7, 11, 30, 31], **LIMIT},
    "short texts": {"length_penalty": -1.0, "eos_token_id": [2, 7, 11, 30, 31], **LIMIT},
    "no length": {"length_penalty": 0.0, "eos_token_id": [2, 7, 11, 30, 31], **LIMIT},
    "early": {"early_stopping": True, "eos_token_id": [2, 7, 11, 30, 31], **LIMIT},
    "never early": {"early_stopping": "never", "eos_token_id": [2, 7, 11, 30], **LIMIT},
    "never, long": {
        "early_stopping": "never",
        "length_penalty": 2.0,
        "eos_token_id": [2, 7, 11, 30, 31],
        **LIMIT,
    },
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1, **LIMIT},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2, **LIMIT},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3, **LIMIT},
    "repetition_penalty": {"repetition_penalty": 1.7, **LIMIT},
    "repetition reward": {"repetition_penalty": 0.8, **LIMIT},
    "suppress_tokens": {"suppress_tokens": list(range(3, 60, 2)), **LIMIT},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(8, 60)), **LIMIT},
    "forced_bos_token_id": {"forced_bos_token_id": 9, **LIMIT},
    "forced and suppressed": {
        "forced_bos_token_id": 9,
        "begin_suppress_tokens": list(range(3, 40)),
        "min_new_tokens": 3,
        **LIMIT,
    },
    "forced_eos_token_id": {"forced_eos_token_id": 2, **LIMIT},
    "bad_words_ids": {
        "bad_words_ids": [*([i] for i in range(3, 60, 2)), [26, 22], [12, 12, 12], [2]],
        **LIMIT,
    },
    "all at once": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_length": 6,
        "length_penalty": 0.6,
        "forced_eos_token_id": 2,
        "bad_words_ids": [[9], [26, 22]],
        "early_stopping": True,
        **LIMIT,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", KEYS)
@pytest.mark.examples(6)
def test_a_key_is_followed_token_for_token(name, beams):
    library_model = make_gpt2(**KEYS[name])
    settings = assemble(library_model, beams=beams).generation
    generation = read_generation(settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(CONTEXTS):
        context = 2 * torch.randn(1, 5, 32, generator=generator)
        expected = library_model.generate(
            encoder_hidden_states=context,
            num_beams=beams,
            num_return_sequences=beams,
            use_cache=False,
        )
        written = write_deployed(library_model, context, settings)
        assert written == cut(expected, generation.ends, 1)


@pytest.mark.slow
def test_the_keys_of_the_test_change_what_is_written():
    """Else agreement would say nothing: every key gives another text than none does."""
    generator = torch.Generator().manual_seed(1)
    contexts = [2 * torch.randn(1, 5, 32, generator=generator) for _ in range(CONTEXTS)]

    def write_all(settings, beams):
        model = make_gpt2(**settings)
        generation = assemble(model, beams=beams).generation
        return [write_deployed(model, context, generation) for context in contexts]

    plain = {beams: write_all(LIMIT, beams) for beams in (1, 3)}
    same = {"one end in a list"}
    for name, settings in KEYS.items():
        changed = any(write_all(settings, beams) != plain[beams] for beams in (1, 3))
        assert changed != (name in same), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 3])
def test_the_proof_of_the_exported_graphs_follows_them_too(tmp_path, beams):
    """Greedy search applies a repetition penalty to logits, beam search to log-probabilities."""
    keys = {**KEYS["all at once"], "eos_token_id": [2, 7, 11]}
    model = assemble(make_gpt2(**keys), beams=beams)
    assert model.generation["raw_scores"] == (beams == 1)
    files = export_node(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER())
    contexts = 2 * torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    proofs = prove_generation("w", model, files=files, folder=tmp_path, contexts=contexts)
    assert [proof.passed for proof in proofs] == [True]


REFUSED = {
    "do_sample": True,
    "num_beam_groups": 3,
    "diversity_penalty": 0.5,
    "penalty_alpha": 0.6,
    "prompt_lookup_num_tokens": 4,
    "assistant_early_exit": 2,
    "dola_layers": "high",
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "sequence_bias": [[[5], 1.0]],
    "exponential_decay_length_penalty": (3, 1.1),
    "renormalize_logits": True,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "stop_strings": ["."],
    "max_time": 1.0,
    "token_healing": True,
    "cache_implementation": "quantized",
    "forced_decoder_ids": [[1, 5]],
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_not_followed_is_refused_by_its_name(key):
    with pytest.raises(ModelError, match=f"sets {key}: .*not followed here"):
        assemble(make_gpt2(**{key: REFUSED[key]}))


def test_all_refused_keys_are_named_at_once_and_others_are_let_pass():
    model = make_gpt2(do_sample=True, num_beam_groups=2, max_length=12)
    with pytest.raises(ModelError, match=r"do_sample: True; num_beam_groups: 2, which"):
        assemble(model)
    harmless = {"temperature": 0.6, "top_p": 0.9, "top_k": 5, "num_beams": 4, "use_cache": False}
    assert assemble(make_gpt2(**harmless, user_token_id=195)).generation["beams"] == 1
    with pytest.raises(ModelError, match=r"forced_eos_token_id: \[2, 7\]: several"):
        assemble(make_gpt2(forced_eos_token_id=[2, 7]))


def test_a_key_of_a_later_library_is_refused_until_it_is_known(monkeypatch):
    """Every standard key is followed, harmless or refused: a new one is none of the first two."""
    from transformers import GenerationConfig

    from mmcompress.models.families import generation_settings as room

    class Later(GenerationConfig):
        def __init__(self, **keys):
            super().__init__(**keys)
            self.write_backwards = None

    monkeypatch.setattr(room, "GenerationConfig", Later)
    with pytest.raises(ModelError, match="write_backwards: True"):
        assemble(make_gpt2(write_backwards=True))


def test_a_limit_is_the_nodes_then_the_checkpoints_then_the_librarys():
    limits = {
        ("", 9): assemble(make_gpt2(max_length=14), max_tokens=9),
        ("max_length", 14): assemble(make_gpt2(max_length=14)),
        ("max_new_tokens", 7): assemble(make_gpt2(max_new_tokens=6)),
        ("default", 21): assemble(make_gpt2()),
        ("positions", 24): assemble(make_gpt2(max_length=1000)),
    }
    for (_, expected), model in limits.items():
        assert model.generation["max_tokens"] == expected
    with pytest.raises(ModelError, match="max_tokens 30 exceeds the decoder's 24 positions"):
        assemble(make_gpt2(), max_tokens=30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 2])
def test_llava_looks_for_repetition_in_its_prompt_too(tmp_path, beams):
    """As the library, whose prompt and image are ids like the words."""
    torch.manual_seed(3)
    library_model = _stirred(_llava_whole(60))
    keys = {"repetition_penalty": 1.6, "no_repeat_ngram_size": 2, "min_new_tokens": 3}
    for key, value in keys.items():
        setattr(library_model.generation_config, key, value)
    library_model.config.image_token_id = IDS["<pad>"]
    context = torch.randn(1, 5, 48)
    features = library_model.model.multi_modal_projector(context)
    model = assemble_prefix_decoder(
        copy.deepcopy(library_model),
        "llava",
        tokenizer_json=make_tokenizer("bos").to_str(),
        candidates=beams,
        max_tokens=12,
        prompt="w3 w9 <image> w4 w5",
    )
    assert model.generation["history"] == [0, IDS["w3"], IDS["w9"], 1, 1]
    words = [IDS["w4"], IDS["w5"]]
    ids = torch.tensor([[0, IDS["w3"], IDS["w9"], *[1] * 5, *words]])
    embed = library_model.model.language_model.embed_tokens
    embeddings = torch.cat([embed(ids[:, :3]), features, embed(ids[:, 8:])], 1)
    rows = library_model.generate(
        input_ids=ids,
        inputs_embeds=embeddings,
        attention_mask=torch.ones(ids.shape),
        max_new_tokens=10,
        num_beams=beams,
        num_return_sequences=beams,
    )
    expected = cut(rows[:, 8:], [2], 2)
    generated = cut(torch.tensor(model.generate_with_library(context)), [2], 2)
    assert generated == expected
    files = export_node(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text(make_tokenizer("bos").to_str())
    proofs = prove_generation("w", model, files=files, folder=tmp_path, contexts=context)
    assert [proof.passed for proof in proofs] == [True]


def test_lengths_that_count_the_image_are_refused(tmp_path):
    def load(**keys):
        library_model = _llava_whole(60)
        for key, value in keys.items():
            setattr(library_model.generation_config, key, value)
        return assemble_prefix_decoder(
            library_model, "llava", tokenizer_json=TOKENIZER(), candidates=1, max_tokens=0
        )

    with pytest.raises(ModelError, match="max_length: 99: the library counts the image"):
        load(max_length=99)
    with pytest.raises(ModelError, match="min_length: 5: the library counts the image"):
        load(min_length=5)
    assert load(max_new_tokens=7).generation["max_tokens"] == 8
