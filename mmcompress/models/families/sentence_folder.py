"""What a sentence-transformers folder does beside the model of transformers in it.

`modules.json` lists the steps: the model, its pooling, dense layers, normalization. Two further
files say how texts are cut, lower-cased and prompted. Source: the file formats of
sentence-transformers, https://www.sbert.net.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmcompress.errors import ModelError
from mmcompress.models.base import LoadContext
from mmcompress.models.hub import describe_source, get_model_folder, load_json, load_json_list

Pool = Callable[[Tensor, Tensor], Tensor]
"""Pools tokens [B, T, W] behind a mask [B, T] to [B, W]."""

FOLLOWED_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
"""Steps that are followed; a folder with another one is refused."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
}
"""Activations of dense layers, by the last part of their class name."""


def pool_first_token(tokens_BTW: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the first token [B, W]."""
    return tokens_BTW[:, 0]


def pool_mean(tokens_BTW: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean of the tokens that are no padding [B, W]."""
    weights_BT1 = mask_BT[..., None].to(tokens_BTW.dtype)
    return (tokens_BTW * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


def pool_mean_of_root(tokens_BTW: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the sum of the tokens over the root of their number [B, W]."""
    weights_BT1 = mask_BT[..., None].to(tokens_BTW.dtype)
    return (tokens_BTW * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1).sqrt()


def pool_max(tokens_BTW: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the largest value of every feature [B, W]."""
    lowest = torch.finfo(tokens_BTW.dtype).min
    return tokens_BTW.masked_fill(~mask_BT[..., None], lowest).amax(1)


POOLINGS: dict[str, Pool] = {
    "pooling_mode_cls_token": pool_first_token,
    "pooling_mode_max_tokens": pool_max,
    "pooling_mode_mean_tokens": pool_mean,
    "pooling_mode_mean_sqrt_len_tokens": pool_mean_of_root,
}
"""Poolings by their key, in the order in which several are joined."""


@dataclass(frozen=True, kw_only=True)
class SentenceSetup:
    """What a folder says of texts and their tokens."""

    pools: tuple[Pool, ...] = (pool_mean,)
    """Poolings whose results are joined."""
    layers: tuple[nn.Module, ...] = ()
    """What runs behind the pooling."""
    prompt: str = ""
    """What stands ahead of every text."""
    lower_case: bool = False
    """Whether texts are lower-cased."""
    max_tokens: int = 0
    """The longest text in tokens; 0: the model says it."""


def read_sentence_setup(context: LoadContext) -> SentenceSetup:
    """Read what a folder or a model of a hub says; the mean of the tokens where it says nothing.

    Raises:
        ModelError: It does something that is not followed here.
    """
    source = describe_source(context)
    modules = load_json_list(context, "modules.json")
    pools: tuple[Pool, ...] = (pool_mean,)
    layers: list[nn.Module] = []
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = str(module.get("path", ""))
        if kind not in FOLLOWED_MODULES:
            raise ModelError(f"{source}: modules.json: '{kind}' is not followed here")
        if kind == "Pooling":
            pools = _read_pools(load_json(context, f"{path}/config.json"), source)
        elif kind == "Dense":
            layers += _read_dense(context, path)
    texts = load_json(context, "sentence_bert_config.json")
    prompts = load_json(context, "config_sentence_transformers.json")
    return SentenceSetup(
        pools=pools,
        layers=tuple(layers),
        prompt=_read_prompt(prompts, source),
        lower_case=bool(texts.get("do_lower_case")),
        max_tokens=int(texts.get("max_seq_length") or 0),
    )


def _read_pools(config: dict[str, Any], source: str) -> tuple[Pool, ...]:
    """Return the poolings that a configuration switches on."""
    chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        chosen.append(f"pooling_mode_{mode}_tokens" if mode != "cls" else "pooling_mode_cls_token")
    for key in chosen:
        if key not in POOLINGS:
            raise ModelError(f"{source}: 1_Pooling: {key} is not followed here")
    if config.get("include_prompt") is False:
        raise ModelError(f"{source}: 1_Pooling: include_prompt: false is not followed here")
    pools = tuple(pool for key, pool in POOLINGS.items() if key in chosen)
    return pools or (pool_mean,)


def _read_dense(context: LoadContext, path: str) -> list[nn.Module]:
    """Return a dense layer and its activation."""
    source = describe_source(context)
    config = load_json(context, f"{path}/config.json")
    activation = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        raise ModelError(f"{source}: {path}: the activation '{activation}' is not followed here")
    file = get_model_folder(context) / path / "model.safetensors"
    if not file.is_file():
        raise ModelError(f"{source}: {path}/model.safetensors is missing")
    weights = load_file(file)
    rows, columns = weights["linear.weight"].shape
    linear = nn.Linear(columns, rows, bias="linear.bias" in weights)
    linear.weight.data = weights["linear.weight"].float()
    if linear.bias is not None:
        linear.bias.data = weights["linear.bias"].float()
    return [linear, ACTIVATIONS[activation]()]


def _read_prompt(config: dict[str, Any], source: str) -> str:
    """Return the prompt that stands ahead of every text."""
    name = config.get("default_prompt_name")
    if not name:
        return ""
    prompts = config.get("prompts") or {}
    if name not in prompts:
        raise ModelError(f"{source}: default_prompt_name: no prompt is named '{name}'")
    return str(prompts[name])
