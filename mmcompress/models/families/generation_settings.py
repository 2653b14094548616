"""Settings of the decode loop, read from a checkpoint as the library's own `generate` reads them.

The library's rules stand in `transformers.generation.configuration_utils` and `.utils`. A key that
the deployed loop does not follow is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from tokenizers import Tokenizer
from torch import nn
from transformers import GenerationConfig

from mmcompress.errors import ModelError
from mmcompress.runtime.beam_search import NO_TOKEN

DEFAULT_NEW_TOKENS = 20
"""Tokens written at most if neither node nor checkpoint limits them: the library's own default."""

FOLLOWED_KEYS = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "decoder_start_token_id",
        "early_stopping",
        "eos_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
        "pad_token_id",
        "repetition_penalty",
        "suppress_tokens",
    }
)
"""Keys of a generation configuration that the decode loop follows."""

KEYS_OF_THE_NODE = frozenset({"num_beams", "num_return_sequences"})
"""Keys that the node's `candidates` stands for, as an argument of `generate` does."""

KEYS_WITHOUT_EFFECT = frozenset(
    {
        # read by sampling only
        "epsilon_cutoff",
        "eta_cutoff",
        "min_p",
        "temperature",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        # read by an assistant only
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "is_assistant",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "target_lookbehind",
        # how the library computes and what it returns besides the texts
        "cache_config",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "remove_invalid_values",
        "return_dict_in_generate",
        "transformers_version",
        "use_cache",
    }
)
"""Keys that change no text that is written without sampling and without an assistant."""

EXACT_CACHES = (None, "dynamic", "static", "hybrid", "offloaded", "offloaded_static")
"""Values of `cache_implementation` that change no text; a quantized cache does."""

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "cache_implementation": EXACT_CACHES,
    "guidance_scale": (None, 1, 1.0),
    "num_beam_groups": (None, 0, 1),
    "penalty_alpha": (None, 0, 0.0),
}
"""Values that change no text, of keys for which they are not the library's defaults alone."""

KEYS_OF_SPEECH = (
    "compression_ratio_threshold",
    "condition_on_prev_tokens",
    "logprob_threshold",
    "no_speech_threshold",
    "return_timestamps",
)
"""Keys that the library's Whisper knows beside those of every model, and that are not followed."""


class GenerationSettings(TypedDict):
    """Hold what the decode loop needs; the manifest of a bundle stores it under `generation`.

    The keys are those of `mmcompress.runtime.beam_search.Generation`, which tells what they mean.
    """

    bos: int
    """Token id that starts a text."""
    eos: int
    """Token id that ends a text; texts to learn end with it."""
    other_ends: list[int]
    """Further token ids that end a text."""
    pad: int
    """Token id that fills up a shorter text."""
    beams: int
    """Number of beams; the decoder returns all of them."""
    max_tokens: int
    """Tokens of the longest text, the prompt included."""
    min_tokens: int
    """Tokens of the shortest text, the prompt included."""
    prompt: list[int]
    """Token ids that every text starts with; if empty, a text starts with `bos`."""
    forced_first: int
    """Token id that follows the start, or `NO_TOKEN`."""
    forced_end: int
    """Token id that stands at the end of a text of `max_tokens`, or `NO_TOKEN`."""
    early_stopping: bool | str
    """Whether beam search ends as soon as it has enough finished texts."""
    length_penalty: float
    """Exponent of the length in the score of a text."""
    repetition_penalty: float
    """Factor that makes tokens less likely which were written already."""
    no_repeat_ngram_size: int
    """Tokens of a span that no text holds twice; 0 allows all."""
    bad_words: list[list[int]]
    """Token ids of words that are never written."""
    history: list[int]
    """Token ids ahead of the text that count as written, where repetition is looked for."""
    raw_scores: bool
    """Whether the step graph puts out logits in place of log-probabilities."""
    guard: bool
    """Whether a text that only repeats itself ends at once."""
    suppress: list[int]
    """Token ids that are never written."""
    begin_suppress: list[int]
    """Token ids that are never written directly after the prompt."""


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What a node asks of its generator."""

    candidates: int = 1
    """Texts for each input, which is the number of beams."""
    max_tokens: int = 0
    """Tokens of the longest text, prompt included; 0 leaves it to the checkpoint."""
    prompt: str = ""
    """What the generator reads before it writes."""
    language: str = ""
    """The language that it writes, if it knows several."""
    task: str = ""
    """What it does with speech, if it knows several tasks."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids that start, end and fill up the texts of a checkpoint."""

    bos: int
    """Starts a text."""
    eos: int
    """Ends a text, the one that texts to learn end with."""
    other_ends: tuple[int, ...]
    """Further ids that end a text."""
    pad: int
    """Fills up a shorter text."""


def find_generation_config(library_model: nn.Module, decoder: nn.Module) -> Any:
    """Return the configuration that the library's `generate` of this model reads.

    BLIP generates with its text decoder, so what is stored for the whole model is not read.

    Raises:
        ModelError: The configuration asks for something that the decode loop does not follow.
    """
    owner = decoder if library_model.config.model_type == "blip" else library_model
    generation_config = getattr(owner, "generation_config", None) or GenerationConfig()
    _refuse_unknown_keys(generation_config, is_speech=owner.config.model_type == "whisper")
    return generation_config


def _refuse_unknown_keys(generation_config: GenerationConfig, *, is_speech: bool) -> None:
    """Raise `ModelError` with every key that changes texts and that is not followed."""
    defaults = generation_config._get_default_generation_params()
    known_keys = set(vars(GenerationConfig())) | set(KEYS_OF_SPEECH)
    if not is_speech:
        # the library refuses it too, where it is no token of Whisper
        known_keys.add("forced_decoder_ids")
    accepted_keys = FOLLOWED_KEYS | KEYS_OF_THE_NODE | KEYS_WITHOUT_EFFECT
    problems: list[str] = []
    for key, value in sorted(vars(generation_config).items()):
        if key.startswith("_") or key in accepted_keys or key not in known_keys:
            continue
        if value not in NEUTRAL_VALUES.get(key, (None, False, defaults.get(key))):
            problems.append(f"{key}: {value!r}")
    if problems:
        raise ModelError(
            f"its generation configuration sets {'; '.join(problems)}, which is not followed here: "
            "take it out of generation_config.json, or set it to its default"
        )


def read_special_tokens(
    library_model: nn.Module,
    decoder: nn.Module,
    *,
    tokenizer_json: str,
    is_encoder_decoder: bool,
) -> SpecialTokens:
    """Read the ids that start and end texts, as the library's `generate` of this model uses them.

    Args:
        library_model: the library's model as it was loaded.
        decoder: its decoder; may be the same module.
        tokenizer_json: a fast tokenizer as JSON.
        is_encoder_decoder: whether the library starts with `decoder_start_token_id`.

    Raises:
        ModelError: The configuration names no start token or no end token.
    """
    if library_model.config.model_type == "blip":
        # Its `generate` starts, ends and fills up with these, whatever `eos_token_id` is.
        sources: list[object] = [library_model.config.text_config]
        end_key = "sep_token_id"
    else:
        sources = _list_configurations(library_model, decoder)
        end_key = "eos_token_id"
    start_keys = ("decoder_start_token_id",) if is_encoder_decoder else ()
    bos = _find_setting(sources, (*start_keys, "bos_token_id"))
    ends = _list_ids(_find_setting(sources, (end_key,)))
    pad = _find_setting(sources, ("pad_token_id",))
    if bos is None or not ends:
        raise ModelError(
            "its configuration names no start and end token (bos_token_id, eos_token_id)"
        )
    if isinstance(bos, list):
        raise ModelError(
            f"decoder_start_token_id: {bos}: several start tokens are not followed; name one"
        )
    eos = _choose_end(ends, tokenizer_json)
    return SpecialTokens(
        bos=int(bos),
        eos=eos,
        other_ends=tuple(token for token in ends if token != eos),
        pad=eos if pad is None else _list_ids(pad)[0],
    )


def _list_configurations(library_model: nn.Module, decoder: nn.Module) -> list[object]:
    """List the configurations that may name special tokens, the most specific first."""
    sources: list[object] = []
    for module in (library_model, decoder):
        for configuration in (getattr(module, "generation_config", None), module.config):
            if configuration is not None:
                sources.append(configuration)
    text_config = getattr(library_model.config, "text_config", None)
    if text_config is not None:
        sources.append(text_config)
    return sources


def _find_setting(sources: Sequence[object], keys: Sequence[str]) -> Any:
    """Find the value of the first key that any configuration sets, the first one that does."""
    for key in keys:
        for source in sources:
            value = getattr(source, key, None)
            if value is not None:
                return value
    return None


def _list_ids(value: int | Sequence[int] | None) -> list[int]:
    """Return token ids as a list: none, one or several."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else [int(token) for token in value]


def _choose_end(ends: Sequence[int], tokenizer_json: str) -> int:
    """Choose the end that texts to learn get: the tokenizer's own, else the first one."""
    if len(ends) > 1:
        ids = load_plain_tokenizer(tokenizer_json).encode("a").ids
        if ids and ids[-1] in ends:
            return int(ids[-1])
    return ends[0]


def load_plain_tokenizer(tokenizer_json: str) -> Tokenizer:
    """Load a tokenizer that neither pads nor cuts, whatever its file says."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def refuse_languages(language: str, task: str, *, model_type: str) -> None:
    """Raise `ModelError` if a node names a language or task of a model that takes none."""
    for key, value in (("language", language), ("task", task)):
        if value:
            raise ModelError(f"{key}: {value}: a model of type '{model_type}' takes none")


def build_generation_settings(
    generation_config: GenerationConfig,
    tokens: SpecialTokens,
    *,
    request: TextRequest,
    prompt: Sequence[int],
    position_limit: int | None,
    history: Sequence[int] = (),
) -> GenerationSettings:
    """Build the settings of the decode loop.

    Args:
        generation_config: what the library's `generate` reads.
        tokens: start and end of a text.
        request: what the node asks for.
        prompt: token ids that every text starts with; empty: the start token alone.
        position_limit: tokens that the decoder has positions for; None: any number.
        history: token ids ahead of the prompt that count as written.

    Raises:
        ModelError: The prompt leaves nothing to write, or a setting can't be followed.
    """
    input_length = len(prompt) or 1
    forced_first = _read_forced_first(generation_config)
    if input_length > 1:
        # The library forces it after a single start token only.
        forced_first = NO_TOKEN
    max_tokens = _choose_max_tokens(
        generation_config,
        request=request,
        input_length=input_length,
        position_limit=position_limit,
    )
    start_length = input_length + (forced_first != NO_TOKEN)
    if start_length >= max_tokens:
        raise ModelError(
            f"prompt: {start_length} tokens with the start leave nothing of max_tokens "
            f"{max_tokens} to write"
        )
    min_new_tokens = getattr(generation_config, "min_new_tokens", None)
    min_tokens = getattr(generation_config, "min_length", None) or 0
    if min_new_tokens is not None:
        min_tokens = input_length + min_new_tokens
    ends = [tokens.eos, *tokens.other_ends]
    bad_words: list[list[int]] = []
    for word in getattr(generation_config, "bad_words_ids", None) or ():
        if list(word) not in [[end] for end in ends]:
            bad_words.append([int(token) for token in word])
    repetition_penalty = float(_read_number(generation_config, "repetition_penalty", default=1.0))
    is_greedy = request.candidates == 1
    # Greedy search reads neither.
    early_stopping: Any = False
    length_penalty = 1.0
    if not is_greedy:
        early_stopping = _read_number(generation_config, "early_stopping", default=False)
        length_penalty = _read_number(generation_config, "length_penalty", default=1.0)
    return GenerationSettings(
        bos=tokens.bos,
        eos=tokens.eos,
        other_ends=list(tokens.other_ends),
        pad=tokens.pad,
        beams=request.candidates,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        prompt=list(prompt),
        forced_first=forced_first,
        forced_end=_read_forced_end(generation_config),
        early_stopping=early_stopping,
        length_penalty=float(length_penalty),
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=int(
            _read_number(generation_config, "no_repeat_ngram_size", default=0)
        ),
        bad_words=bad_words,
        history=list(history),
        raw_scores=is_greedy and repetition_penalty != 1.0,
        # Whisper may repeat itself until the longest text is full.
        guard=getattr(generation_config, "no_timestamps_token_id", None) is not None,
        suppress=_list_ids(getattr(generation_config, "suppress_tokens", None)),
        begin_suppress=_list_ids(getattr(generation_config, "begin_suppress_tokens", None)),
    )


def _read_number(generation_config: GenerationConfig, key: str, *, default: Any) -> Any:
    """Read a setting; one that is missing or None is the library's default."""
    value = getattr(generation_config, key, None)
    return default if value is None else value


def _read_forced_first(generation_config: GenerationConfig) -> int:
    """Read the token that follows a single start token, or `NO_TOKEN`."""
    return int(_read_number(generation_config, "forced_bos_token_id", default=NO_TOKEN))


def _read_forced_end(generation_config: GenerationConfig) -> int:
    """Read the token at the end of the longest text, or `NO_TOKEN`."""
    ids = _list_ids(getattr(generation_config, "forced_eos_token_id", None))
    if len(ids) > 1:
        raise ModelError(f"forced_eos_token_id: {ids}: several are not followed; name one")
    return ids[0] if ids else NO_TOKEN


def _choose_max_tokens(
    generation_config: GenerationConfig,
    *,
    request: TextRequest,
    input_length: int,
    position_limit: int | None,
) -> int:
    """Return the tokens of the longest text: the node's, else those of the library's `generate`."""
    if request.max_tokens:
        if position_limit and request.max_tokens > position_limit:
            raise ModelError(
                f"max_tokens {request.max_tokens} exceeds the decoder's {position_limit} positions"
            )
        return request.max_tokens
    new_tokens = getattr(generation_config, "max_new_tokens", None)
    total = getattr(generation_config, "max_length", None)
    if new_tokens is None and total is not None:
        is_speech = getattr(generation_config, "no_timestamps_token_id", None) is not None
        # Whisper's own `generate` counts what it starts with on top.
        max_tokens = total + input_length if is_speech else total
    else:
        max_tokens = input_length + (DEFAULT_NEW_TOKENS if new_tokens is None else new_tokens)
    return min(max_tokens, position_limit) if position_limit else max_tokens


def make_generate_options(settings: GenerationSettings) -> dict[str, object]:
    """Translate generation settings into arguments of the library's `generate`.

    The limit of the length is missing: its argument differs between families.

    Args:
        settings: settings of the decode loop.

    Returns:
        Keyword arguments of `transformers.GenerationMixin.generate`.
    """
    options: dict[str, object] = {
        "num_beams": settings["beams"],
        "num_return_sequences": settings["beams"],
        "do_sample": False,
        "eos_token_id": [settings["eos"], *settings["other_ends"]],
        "pad_token_id": settings["pad"],
        "use_cache": False,
        "min_length": settings["min_tokens"],
        "min_new_tokens": None,
        "forced_bos_token_id": _get_token(settings, "forced_first"),
        "forced_eos_token_id": _get_token(settings, "forced_end"),
        "repetition_penalty": settings["repetition_penalty"],
        "no_repeat_ngram_size": settings["no_repeat_ngram_size"],
        "bad_words_ids": settings["bad_words"] or None,
        "suppress_tokens": settings["suppress"] or None,
        "begin_suppress_tokens": settings["begin_suppress"] or None,
    }
    # Greedy search warns about options that only beam search reads.
    if settings["beams"] > 1:
        options["early_stopping"] = settings["early_stopping"]
        options["length_penalty"] = settings["length_penalty"]
    return options


def _get_token(settings: Mapping[str, Any], key: str) -> int | None:
    """Return a token id of the settings; None for no token."""
    return None if settings[key] == NO_TOKEN else int(settings[key])
