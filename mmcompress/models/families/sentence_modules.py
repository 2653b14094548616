"""What a folder of sentence-transformers does with the tokens of its transformer.

`modules.json` lists the steps in order. The rules are those of the library's `Pooling`, `Dense`,
`LayerNorm` and `Normalize` (https://sbert.net/docs/package_reference/sentence_transformer/).

Shapes: B batch, T tokens of a text, W width of a token, D width of the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext
from mmcompress.models.hub import describe_source, get_model_folder, load_json, summarize_error

LIMIT_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names of the file that limits the tokens of a text; the later ones are of old versions."""

MODES_BY_OLD_KEY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Modes by the keys of files of versions before 6, in the order in which they are joined."""

POOLING_KEYS = {
    "word_embedding_dimension",
    "embedding_dimension",
    "pooling_mode",
    "include_prompt",
    *MODES_BY_OLD_KEY,
}
"""Keys of `1_Pooling/config.json` that are followed."""

DENSE_KEYS = {
    "in_features",
    "out_features",
    "bias",
    "activation_function",
    "module_input_name",
    "module_output_name",
}
"""Keys of `2_Dense/config.json` that are followed."""

SENTENCE_FEATURE = "sentence_embedding"
"""The name that sentence-transformers gives the vector of a text."""

COMPARISONS = ("cosine", "dot", "euclidean")
"""Comparisons that order vectors of length 1 alike."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": nn.Identity(),
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
}
"""Activation functions by the name of their class in `torch.nn`."""


def select_first(tokens_BTW: Tensor, mask_BT: Tensor, start: int) -> Tensor:
    """Select the first token [B, W] behind a prompt."""
    return tokens_BTW[:, start]


def select_largest(tokens_BTW: Tensor, mask_BT: Tensor, start: int) -> Tensor:
    """Take the largest value of each feature [B, W]."""
    return tokens_BTW.masked_fill(~mask_BT[..., None], float("-inf")).amax(1)


def average(tokens_BTW: Tensor, mask_BT: Tensor, start: int) -> Tensor:
    """Average tokens [B, W]."""
    weight_BT1 = mask_BT[..., None].to(tokens_BTW.dtype)
    return (tokens_BTW * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


def divide_by_root(tokens_BTW: Tensor, mask_BT: Tensor, start: int) -> Tensor:
    """Divide the sum of tokens by the root of their number [B, W]."""
    weight_BT1 = mask_BT[..., None].to(tokens_BTW.dtype)
    return (tokens_BTW * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1).sqrt()


def average_by_position(tokens_BTW: Tensor, mask_BT: Tensor, start: int) -> Tensor:
    """Average tokens [B, W], each as often as its position says, counted from 1."""
    positions_T = torch.arange(1, tokens_BTW.shape[1] + 1, device=tokens_BTW.device)
    weight_BT1 = (mask_BT * positions_T)[..., None].to(tokens_BTW.dtype)
    return (tokens_BTW * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


def select_last(tokens_BTW: Tensor, mask_BT: Tensor, start: int) -> Tensor:
    """Select the last token [B, W]."""
    positions_T = torch.arange(tokens_BTW.shape[1], device=tokens_BTW.device)
    last_B = (mask_BT * positions_T).amax(1)
    index_B1W = last_B[:, None, None].expand(-1, 1, tokens_BTW.shape[2])
    return tokens_BTW.gather(1, index_B1W)[:, 0]


POOLINGS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "cls": select_first,
    "max": select_largest,
    "mean": average,
    "mean_sqrt_len_tokens": divide_by_root,
    "weightedmean": average_by_position,
    "lasttoken": select_last,
}
"""Functions by the modes of `1_Pooling`: (tokens [B, T, W], mask [B, T], tokens of the prompt that
are left out) -> [B, W]."""


class Normalize(nn.Module):
    """Give vectors the length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


class Dense(nn.Module):
    """A linear layer and an activation."""

    def __init__(self, linear: nn.Linear, activation: str):
        super().__init__()
        self.linear = linear
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.linear(x))


class SentenceHead(nn.Module):
    """Pool tokens [B, T, W] to one vector [B, D], and run the steps behind.

    Args:
        modes: Names of `POOLINGS`; what they give is joined.
        steps: Modules from [B, D] to [B, D].
        left_out: Tokens of a prompt at the start that are not pooled.
    """

    def __init__(self, modes: tuple[str, ...], steps: list[nn.Module], *, left_out: int = 0):
        super().__init__()
        self.modes = modes
        self.steps = nn.ModuleList(steps)
        self.left_out = left_out

    def forward(self, tokens_BTW: Tensor, mask_BT: Tensor) -> Tensor:
        if self.left_out:
            positions_T = torch.arange(tokens_BTW.shape[1], device=tokens_BTW.device)
            mask_BT = mask_BT & (positions_T >= self.left_out)
        parts = [POOLINGS[mode](tokens_BTW, mask_BT, self.left_out) for mode in self.modes]
        vector_BD = torch.cat(parts, -1)
        for step in self.steps:
            vector_BD = step(vector_BD)
        return vector_BD


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """What the files of sentence-transformers say of texts."""

    max_length: int = 0
    """Tokens of the longest text; 0 where nothing is said."""
    lower_case: bool = False
    """Whether texts are turned into small letters."""
    prompt: str = ""
    """What stands before every text."""


def read_sentence_settings(context: LoadContext) -> SentenceSettings:
    """Read how a folder of sentence-transformers prepares texts.

    Raises:
        ModelError: The default prompt has no text.
    """
    limits: dict[str, Any] = {}
    for file_name in LIMIT_FILES:
        limits = limits or load_json(context, file_name)
    config = load_json(context, "config_sentence_transformers.json")
    prompts = config.get("prompts") or {}
    name = config.get("default_prompt_name")
    if name is not None and name not in prompts:
        raise ModelError(
            f"{describe_source(context)}: config_sentence_transformers.json:"
            f" default_prompt_name: '{name}' is none of the prompts ({', '.join(prompts)})"
        )
    return SentenceSettings(
        max_length=int(limits.get("max_seq_length") or 0),
        lower_case=bool(limits.get("do_lower_case")),
        prompt="" if name is None else str(prompts[name]),
    )


def count_prompt_tokens(prompt: str, tokenizer: Tokenizer) -> int:
    """Count the tokens of a prompt, without the special token behind it."""
    encoding = tokenizer.encode(prompt)
    ends_in_special = bool(encoding.special_tokens_mask) and encoding.special_tokens_mask[-1] == 1
    return len(encoding.ids) - int(ends_in_special)


def load_sentence_head(context: LoadContext, *, prompt_tokens: int) -> SentenceHead | None:
    """Load the steps behind the transformer; None for a folder of transformers alone.

    Args:
        context: Where the folder is.
        prompt_tokens: Tokens of the default prompt; `include_prompt: false` leaves them out.

    Raises:
        ModelError: A step, or a setting of one, is not followed; the message names it.
    """
    path = _find_file(context, "modules.json")
    if path is None:
        return None
    modes: tuple[str, ...] = ()
    steps: list[nn.Module] = []
    left_out = 0
    names = []
    for module in _read_json(path):
        name = str(module["type"]).rpartition(".")[2]
        folder = str(module.get("path", ""))
        names.append(name)
        place = f"{path}: {folder or name}"
        if name == "Transformer" and folder:
            raise ModelError(f"{place}: a transformer in a folder of its own is not followed")
        if name == "Pooling" and not modes:
            config = _read_step_config(context, folder, known_keys=POOLING_KEYS)
            modes = _list_pooling_modes(config, place=place)
            left_out = 0 if config.get("include_prompt", True) else prompt_tokens
        elif name == "Dense" and modes:
            steps.append(_load_dense(context, folder))
        elif name == "LayerNorm" and modes:
            steps.append(_load_layer_norm(context, folder))
        elif name == "Normalize" and modes:
            steps.append(Normalize())
        elif name not in ("Transformer", "Dropout"):
            raise ModelError(f"{place}: a step of type '{module['type']}' is not followed")
    if not modes:
        raise ModelError(f"{path}: has no Pooling; one vector for each text is needed")
    _check_comparison(context, is_normalized=names[-1] == "Normalize")
    return SentenceHead(modes, steps, left_out=left_out)


def _check_comparison(context: LoadContext, *, is_normalized: bool) -> None:
    """Raise `ModelError` where vectors of length 1 would be compared otherwise than they should."""
    config = load_json(context, "config_sentence_transformers.json")
    comparison = config.get("similarity_fn_name") or "cosine"
    if comparison == "cosine" or (is_normalized and comparison in COMPARISONS):
        return
    raise ModelError(
        f"{describe_source(context)}: config_sentence_transformers.json: similarity_fn_name:"
        f" '{comparison}' is not followed; embeddings are compared by their cosine"
    )


def _find_file(context: LoadContext, name: str) -> Path | None:
    """Return a file of a folder or a hub; None where it does not exist.

    Raises:
        ModelError: The hub does not tell.
    """
    path = get_model_folder(context) / name
    return path if path.is_file() else None


def _read_json(path: Path) -> Any:
    """Read a JSON file; raise `ModelError` where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}; copy or download it again") from error


def _read_step_config(context: LoadContext, folder: str, *, known_keys: set[str]) -> dict[str, Any]:
    """Read the settings of a step; raise `ModelError` for a key that is not followed."""
    config = load_json(context, f"{folder}/config.json")
    if not config:
        raise ModelError(
            f"{describe_source(context)}: {folder}/config.json is missing, though modules.json"
            " names it; copy or download it again"
        )
    for key, value in config.items():
        if key not in known_keys and value:
            raise ModelError(
                f"{describe_source(context)}: {folder}/config.json: {key}: not followed"
            )
    return config


def _list_pooling_modes(config: dict[str, Any], *, place: str) -> tuple[str, ...]:
    """Return the modes of a pooling step, in the order in which their vectors are joined."""
    named_modes = config.get("pooling_mode")
    if named_modes is None:
        modes = tuple(mode for key, mode in MODES_BY_OLD_KEY.items() if config.get(key))
    else:
        modes = (named_modes,) if isinstance(named_modes, str) else tuple(named_modes)
    for mode in modes:
        if mode not in POOLINGS:
            raise ModelError(
                f"{place}: pooling_mode: '{mode}' is unknown (known: {', '.join(POOLINGS)})"
            )
    return modes or ("mean",)


def _load_step_weights(context: LoadContext, folder: str) -> dict[str, Tensor]:
    """Load the weights of a step, from safetensors only."""
    path = _find_file(context, f"{folder}/model.safetensors")
    if path is None:
        raise ModelError(
            f"{describe_source(context)}: {folder}/model.safetensors is missing; weights in"
            " pytorch_model.bin can run code: save the model anew with safetensors"
        )
    try:
        weights: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors raises an error of its own
        raise ModelError(f"{path}: damaged: {summarize_error(error)}; copy it again") from error
    return weights


def _load_dense(context: LoadContext, folder: str) -> Dense:
    """Load a linear layer with its activation."""
    config = _read_step_config(context, folder, known_keys=DENSE_KEYS)
    place = f"{describe_source(context)}: {folder}/config.json"
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, SENTENCE_FEATURE):
            raise ModelError(f"{place}: {key}: '{config[key]}' is not followed")
    full_name = str(config.get("activation_function") or "torch.nn.modules.linear.Identity")
    activation = full_name.rpartition(".")[2]
    if activation not in ACTIVATIONS or not full_name.startswith("torch.nn."):
        raise ModelError(
            f"{place}: activation_function: '{full_name}' is not followed"
            f" (known: {', '.join(ACTIVATIONS)})"
        )
    bias = bool(config.get("bias", True))
    linear = nn.Linear(int(config["in_features"]), int(config["out_features"]), bias=bias)
    weights = _load_step_weights(context, folder)
    _load_weights(linear, {key.removeprefix("linear."): value for key, value in weights.items()})
    return Dense(linear, activation)


def _load_layer_norm(context: LoadContext, folder: str) -> nn.LayerNorm:
    """Load a layer norm."""
    config = _read_step_config(context, folder, known_keys={"dimension"})
    norm = nn.LayerNorm(int(config["dimension"]))
    weights = _load_step_weights(context, folder)
    _load_weights(norm, {key.removeprefix("norm."): value for key, value in weights.items()})
    return norm


def _load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the weights of a step in float32; raise `ModelError` where their shapes differ."""
    try:
        module.load_state_dict({key: value.float() for key, value in weights.items()})
    except RuntimeError as error:
        raise ModelError(f"modules.json: {type(module).__name__}: {error}") from error
