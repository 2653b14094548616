"""Models with the shapes of a checkpoint and without its numbers, to check a spec within seconds.

Every tensor is one zero that is shown as often as its shape says. It takes no memory, and a model
of such tensors can be cut up, traced through and asked for its widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from mmcompress.models.checkpoint import FLOAT_BITS, StoredTensor

_SHAPES_ONLY: ContextVar[bool] = ContextVar("shapes_only", default=False)
"""Whether models are loaded without their numbers."""


@contextmanager
def load_shapes_only() -> Iterator[None]:
    """Load models without their numbers while the block runs."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def is_loading_shapes_only() -> bool:
    """Tell whether models are loaded without their numbers now."""
    return _SHAPES_ONLY.get()


def make_shape_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Make a tensor of each stored shape: float32 as models are loaded here, or whole numbers."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        dtype = torch.float32 if tensor.dtype in FLOAT_BITS else torch.int64
        tensors[name] = torch.zeros((), dtype=dtype).expand(tensor.shape)
    return tensors


def fill_with_shapes_(module: nn.Module) -> None:
    """Put zeros that take no memory in the place of all tensors of a module without numbers."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(part, name, nn.Parameter(zeros, requires_grad=parameter.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
