"""What a generator learns is what its library would have to write: start, words and end.

The library's own `generate` is led through the words by a logits processor. What it returns, start,
forced tokens and end included, is what the tool trains and judges on. Tokenizers differ in what
their post-processors put around a text; generation knows nothing of that.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import SPECIAL, TEXT, VISION, _stirred, coca_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LogitsProcessor

from mmcompress.data.base import Pairs
from mmcompress.kinds.base import NodeSetup
from mmcompress.kinds.text_decoder.trainable import TrainableTextDecoder
from mmcompress.models.sources import load_model
from mmcompress.runtime.beam_search import NO_TOKEN, read_generation
from mmcompress.spec.schema import Node

NAMES = ["<s>", "<pad>", "</s>", "[CLS]", "[SEP]", "en_XX", "[DEC]", "<|sot|>", "<|en|>", "<|de|>"]
NAMES += ["<|transcribe|>", "<|translate|>", "<|notimestamps|>", "<|startofprev|>", "<eot>"]
WORDS = [f"w{i}" for i in range(60 - len(NAMES))]
IDS = {name: i for i, name in enumerate([*NAMES, *WORDS])}
TEXTS = ("w3 w9", "w1", "w2 w4 w6 w8")

TEMPLATES = {
    "none": "",
    "bos": "<s> $A",
    "bos and eos": "<s> $A </s>",
    "classifier's": "[CLS] $A [SEP]",
    "eos": "$A </s>",
    "eos and language": "$A </s> en_XX",
    "language ahead": "en_XX $A </s>",
}


def make_tokenizer(template: str = "none") -> Tokenizer:
    """Words by spaces, with what a post-processor of that name puts around them."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(NAMES)
    if TEMPLATES[template]:
        special = [(name, IDS[name]) for name in TEMPLATES[template].split() if name != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=TEMPLATES[template], special_tokens=special
        )
    # MiniLM's own file does both; they have nothing to do with what is learned
    tokenizer.enable_padding(length=12, pad_id=1)
    tokenizer.enable_truncation(64)
    return tokenizer


class Lead(LogitsProcessor):
    """Leads `generate` through words and an end, but for tokens that the library forces."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __call__(self, input_ids, scores):
        if torch.isfinite(scores).sum(1).max() == 1:
            return scores
        led = torch.full_like(scores, -torch.inf)
        led[:, self.ids.pop(0)] = 0.0
        return led


def _composite(text, **settings):
    from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    image = ViTConfig(**{**VISION, "hidden_size": 48})
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    model = VisionEncoderDecoderModel(config)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    return model


def _vit_gpt2():
    from transformers import GPT2Config

    text = GPT2Config(**TEXT, is_decoder=True, add_cross_attention=True)
    ids = {"decoder_start_token_id": 2, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 2}
    return _composite(text, **ids)


def _mbart_config(**options):
    from transformers import MBartConfig

    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4}
    return MBartConfig(
        vocab_size=60,
        decoder_ffn_dim=64,
        encoder_layers=0,
        max_position_embeddings=24,
        is_decoder=True,
        is_encoder_decoder=False,
        add_cross_attention=True,
        **sizes,
        **SPECIAL,
        **options,
    )


def _vit_mbart():
    settings = {"decoder_start_token_id": 2, "forced_bos_token_id": 5, "forced_eos_token_id": 2}
    return _composite(_mbart_config(), **settings)


def _mbart():
    from transformers import MBartForCausalLM

    model = MBartForCausalLM(_mbart_config())
    # A decoder alone starts with `bos` in the library, whatever stands here.
    model.generation_config.decoder_start_token_id = 2
    return model


def _blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {**TEXT, "bos_token_id": 6, "sep_token_id": 4, "encoder_hidden_size": 32}
    return BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=VISION, image_text_hidden_size=16)
    )


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 1, "eos_token_id": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes, **ids))


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**TEXT, is_decoder=True, add_cross_attention=True))


def _git():
    from transformers import GitConfig, GitForCausalLM

    return GitForCausalLM(GitConfig(vision_config={**VISION, "hidden_size": 48}, **TEXT))


def _llava():
    from families import _llava_whole

    return _llava_whole(60)


def _whisper():
    from families import _whisper_config
    from transformers import WhisperForConditionalGeneration

    model = WhisperForConditionalGeneration(_whisper_config())
    settings = {
        "decoder_start_token_id": IDS["<|sot|>"],
        "no_timestamps_token_id": IDS["<|notimestamps|>"],
        "lang_to_id": {"<|en|>": IDS["<|en|>"], "<|de|>": IDS["<|de|>"]},
        "task_to_id": {
            "transcribe": IDS["<|transcribe|>"],
            "translate": IDS["<|translate|>"],
        },
        "is_multilingual": True,
        "language": "german",
    }
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    # else the library drops what no model configuration knows when it loads the file
    model.generation_config._from_model_config = False
    return model


FAMILIES = {
    "ViT-GPT2": _vit_gpt2,
    "ViT-mBART": _vit_mbart,
    "mBART": _mbart,
    "BLIP": _blip,
    "T5": _t5,
    "GPT-2": _gpt2,
    "GIT": _git,
    "LLaVA": _llava,
    "Whisper": _whisper,
}


@functools.cache
def make_library_model(family: str):
    torch.manual_seed(0)
    return _stirred(FAMILIES[family]())


@pytest.fixture(scope="module")
def load_family(tmp_path_factory):
    """Load the decoder node of a family from what its library saves, once."""

    @functools.cache
    def load(family: str, language: str = ""):
        folder = tmp_path_factory.mktemp("family")
        make_library_model(family).save_pretrained(folder)
        make_tokenizer().save(str(folder / "tokenizer.json"))
        source = f"transformers:{folder}"
        return load_model(
            Node(
                kind="text_decoder",
                inputs={},
                source=source,
                options={"max_tokens": 14, "language": language},
            )
        )

    return load


def generate_by_library(family: str, lead: list[int]) -> list[int]:
    """What the library's own `generate` returns when it is led through some words."""
    model = make_library_model(family)
    options = {"logits_processor": [Lead(lead)], "max_new_tokens": 12, "use_cache": False}
    context = torch.randn(1, 5, 32)
    pixels = torch.zeros(1, 3, 32, 32)
    if family == "Whisper":
        from transformers import GenerationMixin

        # `generate` of Whisper takes off what it starts with: it is caught on its way in
        caught = {}

        def catch(self, *args, **kwargs):
            caught["ids"] = kwargs["decoder_input_ids"][0].tolist()
            raise StopIteration

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GenerationMixin, "generate", catch)
            with pytest.raises(StopIteration):
                model.generate(torch.zeros(1, 16, 48))
        return [*caught["ids"], *lead]
    if family in ("mBART", "GPT-2"):
        return model.generate(encoder_hidden_states=context, **options)[0].tolist()
    if family == "T5":
        from transformers.modeling_outputs import BaseModelOutput

        return model.generate(encoder_outputs=BaseModelOutput(context), **options)[0].tolist()
    if family == "LLaVA":
        # the image first, then the start of a text: so does the node without a prompt
        ids = torch.tensor([[*[model.config.image_token_id] * 16, 0]])
        written = model.generate(input_ids=ids, pixel_values=pixels, **options)
        return written[0, 16:].tolist()
    return model.generate(pixel_values=pixels, **options)[0].tolist()


def make_node(model, template: str = "none") -> TrainableTextDecoder:
    """The node in torch, with a tokenizer of that kind."""
    setup = NodeSetup(
        name="writer",
        config=model.config,
        tokenizer_json=make_tokenizer(template).to_str(),
        sources={"context": "eyes"},
        feeds_list=False,
        is_unjoined=False,
        labels_by_teacher=False,
    )
    return TrainableTextDecoder(setup)


def list_targets(node: TrainableTextDecoder, texts=TEXTS) -> list[list[int]]:
    """The ids of each text, without what fills it up."""
    ids, has_next = node.collate(Pairs(inputs=[np.zeros(1)] * len(texts), texts=tuple(texts)))
    lengths = has_next.sum(1) + 1
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_targets_are_what_the_library_writes_when_it_writes_those_words(load_family, family):
    model = load_family(family)
    end = model.generation["eos"]
    expected = []
    for text in TEXTS:
        words = [IDS[word] for word in text.split()]
        expected.append(generate_by_library(family, [*words, end]))
    for template in TEMPLATES:
        assert list_targets(make_node(model, template)) == expected, template


def test_the_starts_and_ends_are_those_of_the_checkpoints(load_family):
    """The issue's own values: written out, so that no reference can be wrong with us."""
    first = {family: list_targets(make_node(load_family(family)), ["w1 w2"]) for family in FAMILIES}
    a, b = IDS["w1"], IDS["w2"]
    start_of_german = [IDS[n] for n in ("<|sot|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>")]
    assert first == {
        "ViT-GPT2": [[2, a, b, 2]],
        "ViT-mBART": [[2, 5, a, b, 2]],
        "mBART": [[0, a, b, 2]],
        "BLIP": [[IDS["[DEC]"], a, b, IDS["[SEP]"]]],
        "T5": [[1, a, b, 2]],
        "GPT-2": [[0, a, b, 2]],
        "GIT": [[0, a, b, 2]],
        "LLaVA": [[0, a, b, 2]],
        "Whisper": [[*start_of_german, a, b, 2]],
    }


def test_forced_tokens_are_no_choice_of_the_model(load_family):
    node = make_node(load_family("ViT-mBART"))
    _ids, has_next = node.collate(Pairs(inputs=[np.zeros(1)], texts=("w1 w2",)))
    batch = SimpleNamespace(keep={"writer": has_next})
    # 2 and the language stand there; two words and the end are judged
    assert node.find_target_positions(batch).tolist() == [[False, True, True, True]]


def test_a_text_that_is_too_long_stops_without_an_end(load_family):
    """As the library does at the longest length; a forced end is not judged."""
    long_text = " ".join(f"w{i}" for i in range(1, 30))
    words = [IDS[f"w{i}"] for i in range(1, 30)]
    assert list_targets(make_node(load_family("BLIP")), [long_text]) == [[6, *words[:13]]]
    node = make_node(load_family("ViT-mBART"))
    ids, has_next = node.collate(Pairs(inputs=[np.zeros(1)], texts=(long_text,)))
    assert ids.shape == (1, 14) and has_next.sum() == 12


def test_coca_learns_what_open_clip_reads():
    """open_clip's tokenizer puts both of CoCa's special tokens around a text."""
    from open_clip.tokenizer import SimpleTokenizer

    from mmcompress.models.families.open_clip import build_caption_decoder, clip_tokenizer_json

    model = build_caption_decoder(coca_model(), clip_tokenizer_json(), candidates=1, max_tokens=14)
    tokenizer = SimpleTokenizer()
    generation = {
        **model.generation,
        "bos": tokenizer.sot_token_id,
        "eos": tokenizer.eot_token_id,
    }
    # the tiny model has 60 words: its special tokens are the last two, as in CLIP's vocabulary
    assert (model.generation["bos"], model.generation["eos"]) == (58, 59)
    setup = SimpleNamespace(
        name="writer",
        config={**model.config, "generation": generation},
        tokenizer_json=clip_tokenizer_json(),
        labels_by_teacher=False,
    )
    text = "a cat left of a dog"
    expected = tokenizer([text])[0]
    expected = expected[: int(expected.argmax()) + 1].tolist()
    assert list_targets(TrainableTextDecoder(setup), [text]) == [expected]


def test_every_end_counts_as_the_end_of_a_text():
    from mmcompress.kinds.text_decoder.trainable import merge_ends

    options = {"bos": 0, "pad": 1, "beams": 1, "max_tokens": 9}
    generation = read_generation({**options, "eos": 2, "other_ends": [4, 5]})
    logits = torch.randn(2, 3, 8)
    merged = merge_ends(logits, generation)
    shares = logits.softmax(-1)
    assert torch.allclose(merged.softmax(-1)[..., 2], shares[..., [2, 4, 5]].sum(-1), atol=1e-6)
    assert torch.allclose(merged.softmax(-1)[..., 6], shares[..., 6], atol=1e-6)
    assert (merged.softmax(-1)[..., [4, 5]] == 0).all()
    assert generation.forced_first == NO_TOKEN


def test_the_end_that_is_learned_is_the_tokenizers_own(tmp_path):
    """A chat model ends a text by its second end: its tokenizer tells which."""
    library_model = _gpt2()
    library_model.generation_config.eos_token_id = [14, 2]
    library_model.save_pretrained(tmp_path)
    node = Node(
        kind="text_decoder", inputs={}, source=f"transformers:{tmp_path}", options={"max_tokens": 9}
    )
    for template, end in (("none", 14), ("bos and eos", 2), ("classifier's", 14)):
        make_tokenizer(template).save(str(tmp_path / "tokenizer.json"))
        generation = load_model(node).generation
        assert generation["eos"] == end and set(generation["other_ends"]) == {2, 14} - {end}


@pytest.mark.parametrize("prompt", ["w1 <image> w2", "<image> w2 w3"])
@pytest.mark.parametrize("template", ["none", "bos"])
def test_a_prompt_around_an_image_is_the_librarys(tmp_path, prompt, template):
    """What the library's tokenizer gives for the whole prompt, cut where the image stands."""
    from families import _llava_whole
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens(["<image>"])
    _llava_whole(61).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = f"transformers:{tmp_path}"
    node = Node(
        kind="text_decoder", inputs={}, source=source, options={"max_tokens": 9, "prompt": prompt}
    )
    model = load_model(node)
    tokenizer.no_padding()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer)(prompt).input_ids
    place = whole.index(60)
    assert model.ids_before_image.tolist() == whole[:place]
    assert model.generation["prompt"] == whole[place + 1 :]
