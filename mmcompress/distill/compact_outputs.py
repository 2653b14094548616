"""Outputs of the teacher in a compact form: half precision, and of large vocabularies the likeliest
tokens.

    T: positions, V: vocabulary, K: likeliest tokens that are kept
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mmcompress.models.device import CPU

LARGEST_HALF = 60_000.0
"""Largest value that is kept in half precision, whose own limit is 65,504."""

MAX_WHOLE_VOCABULARY = 4096
"""Tokens of a vocabulary up to which the logits of all of them are kept."""

LIKELIEST_TOKENS = 64
"""Tokens of a larger vocabulary whose probabilities are kept. The others share what is left."""

MIN_LEFT_SHARE = 1e-9
"""Probability of all other tokens together at least: its logarithm is taken."""

NAME_SEPARATOR = "/"
"""Stands between the node and the output in the name of a tensor."""

PART_SEPARATOR = "."
"""Stands between the output and the part of it in the name of a tensor."""

VOCABULARY_PART = "vocabulary"
"""Name of the part that holds the size of a vocabulary: all pairs of a batch share it."""


def compact_outputs(outputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return outputs in their compact form, on the processor.

    Their names are `node/output`, or `node/output.part`.
    """
    tensors: dict[str, Tensor] = {}
    for node_name, node_outputs in outputs.items():
        for output_name, tensor in node_outputs.items():
            name = f"{node_name}{NAME_SEPARATOR}{output_name}"
            if output_name == "logits" and tensor.shape[-1] > MAX_WHOLE_VOCABULARY:
                for part, values in _compact_logits(tensor).items():
                    tensors[f"{name}{PART_SEPARATOR}{part}"] = values.to(CPU)
            else:
                tensors[name] = _round_to_half(tensor).contiguous().to(CPU)
    return tensors


def name_tensors(outputs: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return outputs as they are, by `node/output`."""
    tensors: dict[str, Tensor] = {}
    for node_name, node_outputs in outputs.items():
        for output_name, tensor in node_outputs.items():
            tensors[f"{node_name}{NAME_SEPARATOR}{output_name}"] = tensor
    return tensors


def pick_pair(tensors: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    """Return the compact form of one pair of a batch."""
    picked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        is_shared = name.endswith(f"{PART_SEPARATOR}{VOCABULARY_PART}")
        picked[name] = tensor if is_shared else tensor[place]
    return picked


def expand_outputs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the outputs behind a compact form, in float32."""
    outputs: dict[str, dict[str, Tensor]] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        node_name, _, output_name = name.rpartition(NAME_SEPARATOR)
        output_name, _, part = output_name.partition(PART_SEPARATOR)
        if part:
            parts.setdefault((node_name, output_name), {})[part] = tensor
            continue
        is_half = tensor.dtype == torch.float16
        outputs.setdefault(node_name, {})[output_name] = tensor.float() if is_half else tensor
    for (node_name, output_name), logit_parts in parts.items():
        outputs.setdefault(node_name, {})[output_name] = _expand_logits(logit_parts)
    return outputs


def _compact_logits(logits_TV: Tensor) -> dict[str, Tensor]:
    """Return the logarithms of the largest probabilities, and of what is left of them."""
    vocabulary = logits_TV.shape[-1]
    log_TV = logits_TV.float().log_softmax(-1)
    log_TK, ids_TK = log_TV.topk(LIKELIEST_TOKENS, dim=-1)
    left_T = (1 - log_TK.exp().sum(-1)).clamp(min=MIN_LEFT_SHARE)
    return {
        "log_probabilities": log_TK.to(torch.float16),
        "ids": ids_TK.to(torch.int32),
        "log_left": left_T.log().to(torch.float16),
        VOCABULARY_PART: torch.tensor([vocabulary], device=logits_TV.device),
    }


def _expand_logits(parts: Mapping[str, Tensor]) -> Tensor:
    """Return logits with the kept probabilities; the tokens that are left share theirs evenly."""
    vocabulary = int(parts[VOCABULARY_PART])
    log_TK = parts["log_probabilities"].float()
    log_each_T = parts["log_left"].float() - math.log(vocabulary - LIKELIEST_TOKENS)
    logits_TV = log_each_T.unsqueeze(-1).repeat_interleave(vocabulary, dim=-1)
    return logits_TV.scatter(-1, parts["ids"].long(), log_TK)


def _round_to_half(tensor: Tensor) -> Tensor:
    """Return a tensor of floats in half precision, unless it holds larger values."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    if float(tensor.abs().max()) > LARGEST_HALF:
        return tensor
    return tensor.to(torch.float16)
