"""A second device for tests: its tensors lie in the memory of this machine, and mix with no others.

Torch lets a device be written in Python (`torch.utils.backend_registration`). Products run on the
processor, so figures can be compared. An operation that mixes tensors of two devices raises, as it
does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
"""What torch calls the device."""

INDEXING = ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_")
"""Operations that take indices on the processor, as those of a GPU do."""

BETWEEN_DEVICES = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._has_compatible_shallow_copy_type.default,
)
"""Operations that take tensors of two devices."""

RESIZED_FACTORIES = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")
"""Factories that torch would fill by resizing what `empty` gives."""


class AcceleratorTensor(torch.Tensor):
    """A tensor that torch takes for one of another device."""

    memory: torch.Tensor
    """Its values."""

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> AcceleratorTensor:
        """Make a tensor of the other device of one on the processor."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device=torch.device(NAME, 0),
            requires_grad=False,
        )
        made.memory = memory
        return made

    @property
    def data(self) -> torch.Tensor:
        """The same values without a gradient."""
        return self.detach()

    @data.setter
    def data(self, values: AcceleratorTensor) -> None:
        torch.Tensor.data.__set__(self, values)
        self.memory = values.memory

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the processor, when all of its tensors are on this device."""
        # A tensor within a tensor can't be one of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return _run_on_processor(func, args, kwargs or {})


def get_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a tensor of either device, on the processor."""
    return tensor.memory if isinstance(tensor, AcceleratorTensor) else tensor


def _run_on_processor(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values of tensors; what it gives is on the device of its tensors."""
    if func not in BETWEEN_DEVICES:
        _require_one_device(func, args, kwargs)
    device = kwargs.get("device")
    goes_to_processor = device is not None and torch.device(device).type == "cpu"
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    plain_args, plain_kwargs = pytree.tree_map_only(AcceleratorTensor, get_memory, (args, kwargs))
    results = func(*plain_args, **plain_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if goes_to_processor:
        return results
    owners: dict[int, AcceleratorTensor] = {}
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, AcceleratorTensor):
            owners[id(value.memory)] = value

    def wrap(result: torch.Tensor) -> torch.Tensor:
        owner = owners.get(id(result))
        assert owner is None or owner.shape == result.shape, f"{func} resizes its tensor"
        return AcceleratorTensor(result) if owner is None else owner

    return pytree.tree_map_only(torch.Tensor, wrap, results)


def _require_one_device(func: Any, args: Any, kwargs: Any) -> None:
    """Raise `RuntimeError` when a tensor with axes is on the processor beside others that are not."""
    if str(func.overloadpacket) in INDEXING:
        args = (args[0], *args[2:])
    for value in pytree.tree_leaves((args, kwargs)):
        is_elsewhere = isinstance(value, torch.Tensor) and not isinstance(value, AcceleratorTensor)
        if is_elsewhere and value.ndim > 0:
            raise RuntimeError(f"{func}: a tensor {tuple(value.shape)} is on the processor")


@cache
def register_accelerator() -> torch.device:
    """Make the device known to torch; returns it."""
    _setup_privateuseone_for_python_backend(NAME)
    # It works as long as it lives.
    register_accelerator.library = library = torch.library.Library("aten", "IMPL")  # type: ignore[attr-defined]

    def empty(size: Any, dtype: Any = None, *_: Any, **__: Any) -> torch.Tensor:
        return AcceleratorTensor(torch.empty(size, dtype=dtype, device="cpu"))

    def empty_strided(size: Any, stride: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
        return AcceleratorTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source: torch.Tensor, target: torch.Tensor, *_: Any) -> torch.Tensor:
        with torch.no_grad():
            get_memory(target).copy_(get_memory(source))
        return target

    def make_on_processor(make: Any) -> Callable[..., torch.Tensor]:
        def make_values(*args: Any, **kwargs: Any) -> torch.Tensor:
            return AcceleratorTensor(make(*args, **{**kwargs, "device": "cpu"}))

        return make_values

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    for overload in RESIZED_FACTORIES:
        make = getattr(torch.ops.aten, overload.partition(".")[0])
        library.impl(overload, make_on_processor(make), "PrivateUse1")
    return torch.device(NAME, 0)


@contextmanager
def use_accelerator() -> Iterator[torch.device]:
    """Give the device; layers that share a weight share it there, too."""
    device = register_accelerator()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield device
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
