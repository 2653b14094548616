"""What Whisper's texts start with, against `generate` of the library's own Whisper.

The library takes off what it starts with, so its ids are caught on their way to the search.
"""

from __future__ import annotations

import functools

import pytest
import torch
from families import _stirred, _whisper_config
from test_text_targets import IDS, make_tokenizer

from mmcompress.errors import ModelError
from mmcompress.models.ctranslate2 import describe_languages
from mmcompress.models.sources import load_model
from mmcompress.spec.schema import Node

SOT, EN, DE = IDS["<|sot|>"], IDS["<|en|>"], IDS["<|de|>"]
TRANSCRIBE, TRANSLATE = IDS["<|transcribe|>"], IDS["<|translate|>"]
NO_TIMES, PREVIOUS = IDS["<|notimestamps|>"], IDS["<|startofprev|>"]

ENGLISH = {"decoder_start_token_id": SOT, "no_timestamps_token_id": NO_TIMES}
MULTILINGUAL = {
    **ENGLISH,
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": EN, "<|de|>": DE},
    "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
}
OLD = {"forced_decoder_ids": [[1, None], [2, TRANSCRIBE]]}


@functools.cache
def _weights():
    from transformers import WhisperForConditionalGeneration

    torch.manual_seed(0)
    return _stirred(WhisperForConditionalGeneration(_whisper_config()))


def write_whisper(folder, **settings):
    """Save a Whisper with some keys in its generation configuration."""
    from transformers import GenerationConfig

    model = _weights()
    model.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=1, bos_token_id=2, **settings
    )
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def load(folder, **options):
    source = f"transformers:{folder}"
    return load_model(Node(kind="text_decoder", inputs={}, source=source, options=options))


def start_by_library(model, **options) -> list[int]:
    """The ids that the library's own `generate` hands to its search."""
    from transformers import GenerationMixin

    caught = []

    def catch(self, *args, **kwargs):
        caught.append(kwargs["decoder_input_ids"][0].tolist())
        raise StopIteration

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", catch)
        with pytest.raises(StopIteration):
            model.generate(torch.zeros(1, 16, 48), **options)
    return caught[0]


CASES = {
    "English alone": (ENGLISH, {}, [SOT, NO_TIMES]),
    "English alone, old file": (
        {**ENGLISH, "is_multilingual": False, "forced_decoder_ids": [[1, NO_TIMES]]},
        {},
        [SOT, NO_TIMES],
    ),
    "a language": (MULTILINGUAL, {"language": "de"}, [SOT, DE, TRANSCRIBE, NO_TIMES]),
    "a name": (MULTILINGUAL, {"language": "German"}, [SOT, DE, TRANSCRIBE, NO_TIMES]),
    "a token": (MULTILINGUAL, {"language": "<|en|>"}, [SOT, EN, TRANSCRIBE, NO_TIMES]),
    "a task": (
        MULTILINGUAL,
        {"language": "de", "task": "translate"},
        [SOT, DE, TRANSLATE, NO_TIMES],
    ),
    "the file's language and task": (
        {**MULTILINGUAL, "language": "de", "task": "translate"},
        {},
        [SOT, DE, TRANSLATE, NO_TIMES],
    ),
    "a language over the file's": (
        {**MULTILINGUAL, "language": "de"},
        {"language": "en"},
        [SOT, EN, TRANSCRIBE, NO_TIMES],
    ),
    "old file, a language": (
        {**MULTILINGUAL, **OLD},
        {"language": "de"},
        [SOT, DE, TRANSCRIBE, NO_TIMES],
    ),
    "old file, its language": (
        {**MULTILINGUAL, "forced_decoder_ids": [[1, DE], [2, TRANSLATE]]},
        {},
        [SOT, DE, TRANSLATE, NO_TIMES],
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_texts_start_as_in_the_library(tmp_path, name):
    settings, options, expected = CASES[name]
    library_model = write_whisper(tmp_path, **settings)
    assert start_by_library(library_model, **options) == expected
    assert load(tmp_path, max_tokens=14, **options).generation["prompt"] == expected


@pytest.mark.filterwarnings("ignore")
def test_a_prompt_is_what_was_said_before(tmp_path):
    """`get_prompt_ids` of the library's tokenizer, and `prompt_ids` of its `generate`."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.whisper.tokenization_whisper import WhisperTokenizer

    library_model = write_whisper(tmp_path, **MULTILINGUAL)
    words = make_tokenizer()
    words.no_padding()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    prompt_ids = torch.tensor([PREVIOUS, *tokenizer(" w3 w4", add_special_tokens=False).input_ids])
    # the method reads no more of the tokenizer than the fast one has
    tokenizer.add_special_tokens({"eos_token": "w44"})
    assert WhisperTokenizer.get_prompt_ids(tokenizer, " w3 w4 ").tolist() == prompt_ids.tolist()
    expected = [PREVIOUS, IDS["w3"], IDS["w4"], SOT, DE, TRANSCRIBE, NO_TIMES]
    assert start_by_library(library_model, language="de", prompt_ids=prompt_ids) == expected
    model = load(tmp_path, prompt=" w3 w4 ", language="de", max_tokens=14)
    assert model.generation["prompt"] == expected
    with pytest.raises(ModelError, match=r"prompt: <\|en\|> is a special token"):
        load(tmp_path, prompt="w3 <|en|>", language="de", max_tokens=14)
    with pytest.raises(ModelError, match="leave nothing of max_tokens 6"):
        load(tmp_path, prompt="w3 w4", language="de", max_tokens=6)


@pytest.mark.filterwarnings("ignore")
def test_a_whole_text_is_the_librarys(tmp_path):
    """From the encoder's output on: the tool's reference against `generate` of Whisper itself."""
    library_model = write_whisper(
        tmp_path, **MULTILINGUAL, suppress_tokens=[20, 21], begin_suppress_tokens=[2, 30]
    )
    features = torch.randn(1, 16, 48)
    with torch.no_grad():
        expected = library_model.generate(features, language="de", task="translate", max_length=10)
        context = library_model.model.encoder(features).last_hidden_state
    model = load(tmp_path, language="de", task="translate", max_tokens=14)
    # the library counts the four ids that it starts with on top of max_length
    ids = model.generate_with_library(context)[0]
    words = [token for token in ids[4:] if token not in (1, 2)]
    assert words == [token for token in expected[0].tolist()[-10:] if token not in (1, 2)]


@pytest.mark.filterwarnings("ignore")
def test_the_longest_text_counts_the_start_on_top(tmp_path):
    """As `_set_max_new_tokens_and_length` of the library, up to the decoder's positions."""
    write_whisper(tmp_path, **MULTILINGUAL, max_length=12)
    assert load(tmp_path, language="de").generation["max_tokens"] == 16
    write_whisper(tmp_path, **MULTILINGUAL, max_length=448)
    assert load(tmp_path, language="de").generation["max_tokens"] == 24


REFUSED = {
    "no language": (MULTILINGUAL, {}, r"name it, such as `language: en` \(known: de, en\)"),
    "old file, no language": ({**MULTILINGUAL, **OLD}, {}, "name it, such as `language: en`"),
    "unknown language": (MULTILINGUAL, {"language": "fr"}, r"language: fr: .*known: de, en"),
    "unknown task": (
        MULTILINGUAL,
        {"language": "de", "task": "sing"},
        "task: sing: .*known: transcribe, translate",
    ),
    "English alone": (ENGLISH, {"language": "de"}, "language: de: this model writes English alone"),
    "English alone, a task": (ENGLISH, {"task": "translate"}, "task: translate: this model writes"),
    "a gap": (
        {**ENGLISH, "forced_decoder_ids": [[1, EN], [3, TRANSCRIBE]]},
        {},
        "forced_decoder_ids: .*place 2 is missing",
    ),
    "times": ({**ENGLISH, "return_timestamps": True}, {}, "return_timestamps: True"),
    "thresholds": ({**ENGLISH, "no_speech_threshold": 0.6}, {}, "no_speech_threshold: 0.6"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_refused_with_a_cure(tmp_path, name):
    settings, options, message = REFUSED[name]
    write_whisper(tmp_path, **settings)
    with pytest.raises(ModelError, match=message):
        load(tmp_path, max_tokens=14, **options)


def test_other_models_take_no_language(tmp_path):
    from test_text_targets import make_library_model

    make_library_model("BLIP").save_pretrained(tmp_path)
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="language: de: a model of type 'blip' takes none"):
        load(tmp_path, language="de")


def test_languages_of_a_ctranslate2_folder_become_the_librarys():
    """CTranslate2 takes a model for multilingual by the size of its vocabulary."""
    stored = {"lang_ids": [EN, DE]}
    settings = describe_languages(stored, make_tokenizer(), vocabulary=51_865)
    assert settings == {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": EN, "<|de|>": DE},
        "task_to_id": {"transcribe": TRANSCRIBE, "translate": TRANSLATE},
    }
    assert describe_languages(stored, make_tokenizer(), vocabulary=51_864) == {
        "is_multilingual": False
    }
    assert describe_languages({}, make_tokenizer(), vocabulary=51_866)["lang_to_id"] == {
        "<|en|>": EN,
        "<|de|>": DE,
    }
