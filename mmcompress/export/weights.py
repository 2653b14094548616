"""Saves and loads the weights of pruned models, to be trained further or exported again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcompress.errors import DataError
from mmcompress.models.base import Model
from mmcompress.models.device import CPU, copy_to_device
from mmcompress.storage import replace_file

WEIGHTS_CURE = "remove the folder of the weights and add --resume: they are trained again"
"""What a person can do about weights that can't be used."""


def save_weights(models: Mapping[str, Model], folder: Path) -> None:
    """Write the weights of models as safetensors, one file `<node>.safetensors` for each.

    Args:
        models: The models by node.
        folder: Where the files go; it is made when it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for node_name, model in models.items():
        with replace_file(folder / f"{node_name}.safetensors") as unfinished:
            save_file(_select_unshared_tensors(copy_to_device(model, CPU)), unfinished)


def _select_unshared_tensors(model: Model) -> dict[str, Tensor]:
    """Return the tensors of a model, tied ones once: safetensors refuses shared memory.

    Empty tensors have no memory of their own, so all of them are kept.
    """
    first_keys: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        first_key = first_keys.setdefault(tensor.data_ptr(), key)
        if first_key == key or tensor.numel() == 0:
            tensors[key] = tensor.contiguous()
    return tensors


def load_weights(model: Model, path: Path) -> Model:
    """Read weights written by `save_weights` into a model of the same structure.

    Args:
        model: The model; its weights are replaced.
        path: The file of one node.

    Returns:
        The same model.

    Raises:
        DataError: The file is damaged, lacks weights of the model, or has others.
    """
    try:
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DataError(f"{path}: the weights can't be read: {error}; {WEIGHTS_CURE}") from error
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied_names = all_names - {name for name, _ in model.named_parameters()}
    unfit_names = [name for name in missing if name not in tied_names]
    unfit_names += unexpected
    if unfit_names:
        raise DataError(f"{path}: does not fit the structure: {unfit_names[:3]}; {WEIGHTS_CURE}")
    return model
