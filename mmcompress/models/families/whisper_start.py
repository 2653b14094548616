"""What Whisper's texts start with: a prompt, the start, a language, a task, and words alone.

The library's rules: `WhisperGenerationMixin._retrieve_init_tokens` and `get_prompt_ids`.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PretrainedConfig
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from mmcompress.errors import ModelError
from mmcompress.models.families.generation_settings import TextRequest, load_plain_tokenizer

PREVIOUS_TEXT_TOKEN = "<|startofprev|>"
"""Name of the token ahead of a prompt: what was said before."""

DEFAULT_TASK = "transcribe"
"""The task of a language without a task, as in the library."""


def list_whisper_start(
    generation_config: GenerationConfig,
    config: PretrainedConfig,
    *,
    tokenizer_json: str,
    request: TextRequest,
) -> list[int]:
    """List the token ids that every text starts with.

    Args:
        generation_config: the library's generation configuration of the model.
        config: the library's configuration of the model, which old checkpoints keep ids in.
        tokenizer_json: a fast tokenizer as JSON.
        request: what the node asks for.

    Raises:
        ModelError: The node names no language where one is needed, or one that is unknown.
    """
    start = [int(generation_config.decoder_start_token_id or config.decoder_start_token_id)]
    if request.language or request.task:
        _check_multilingual(generation_config, request)
    language = request.language or getattr(generation_config, "language", None)
    task = request.task or getattr(generation_config, "task", None)
    if not language and not task:
        start += _list_forced_ids(generation_config, config)
    languages = getattr(generation_config, "lang_to_id", None)
    if language:
        start[1:2] = [_find_language(language, languages or {})]
    elif languages and (len(start) == 1 or start[1] is None):
        raise ModelError(
            "this model writes several languages, and a bundle does not guess which one it hears: "
            f"name it, such as `language: en` (known: {', '.join(_list_codes(languages))})"
        )
    start = _add_task(start, task, has_language=bool(language), generation_config=generation_config)
    no_times = getattr(generation_config, "no_timestamps_token_id", None)
    if no_times is not None and start[-1] != no_times:
        start.append(int(no_times))
    ids = [int(token) for token in start if token is not None]
    if not request.prompt:
        return ids
    return [*_list_prompt(generation_config, tokenizer_json, prompt=request.prompt), *ids]


def _check_multilingual(generation_config: GenerationConfig, request: TextRequest) -> None:
    """Raise `ModelError` if a node names a language or task of a model that knows one alone."""
    is_multilingual = getattr(generation_config, "is_multilingual", None)
    has_languages = bool(getattr(generation_config, "lang_to_id", None))
    if is_multilingual is False or (is_multilingual is None and not has_languages):
        key, value = "language", request.language
        if not request.language:
            key, value = "task", request.task
        raise ModelError(f"{key}: {value}: this model writes English alone; take the key out")


def _list_forced_ids(generation_config: GenerationConfig, config: PretrainedConfig) -> list[Any]:
    """List what old checkpoints say in `forced_decoder_ids`; None stands for a language."""
    pairs = getattr(generation_config, "forced_decoder_ids", None)
    if pairs is None:
        pairs = getattr(config, "forced_decoder_ids", None)
    ids: list[Any] = []
    for place, (index, token) in enumerate(pairs or (), 1):
        if index != place:
            raise ModelError(
                f"forced_decoder_ids: {pairs}: the place {place} is missing; "
                "name `language` and `task` in their stead"
            )
        ids.append(token)
    return ids


def _find_language(language: str, languages: dict[str, int]) -> int:
    """Return the token of a language, by its code, name or token, in any case of letters."""
    name = language.lower()
    code = TO_LANGUAGE_CODE.get(name, name)
    for token in (name, f"<|{code}|>"):
        if token in languages:
            return int(languages[token])
    raise ModelError(
        f"language: {language}: unknown to this model "
        f"(known: {', '.join(_list_codes(languages)) or 'none: it has no lang_to_id'})"
    )


def _list_codes(languages: dict[str, int]) -> list[str]:
    """List the codes of languages, sorted."""
    return sorted(token.strip("<|>") for token in languages)


def _add_task(
    start: list[Any], task: str | None, *, has_language: bool, generation_config: GenerationConfig
) -> list[Any]:
    """Return the start with the token of the task; a language alone asks to transcribe."""
    tasks = getattr(generation_config, "task_to_id", None) or {}
    has_task = any(token in start for token in tasks.values())
    if not task and has_language and tasks and not has_task:
        task = DEFAULT_TASK
    if not task:
        return start
    if task not in tasks:
        raise ModelError(
            f"task: {task}: unknown to this model (known: {', '.join(sorted(tasks)) or 'none'})"
        )
    return [*start, tasks[task]]


def _list_prompt(
    generation_config: GenerationConfig, tokenizer_json: str, *, prompt: str
) -> list[int]:
    """List the ids of a prompt: the text before, which stands ahead of the start."""
    tokenizer = load_plain_tokenizer(tokenizer_json)
    previous_text = tokenizer.token_to_id(PREVIOUS_TEXT_TOKEN)
    if previous_text is None:
        previous_text = getattr(generation_config, "prev_sot_token_id", None)
    if previous_text is None:
        raise ModelError(
            f"prompt: this model takes none: its tokenizer has no {PREVIOUS_TEXT_TOKEN}"
        )
    words = tokenizer.encode(" " + prompt.strip(), add_special_tokens=False).ids
    special_ids = {
        index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    for token in words:
        if token in special_ids:
            name = tokenizer.id_to_token(token)
            raise ModelError(f"prompt: {name} is a special token; a prompt holds words alone")
    return [int(previous_text), *words]
