"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmcompress.models.base import Model


def save_weights(models: Mapping[str, Model], folder: Path) -> None:
    """Weights of pruned models as safetensors, so that they can be trained further or exported again."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        unique: dict[int, str] = {}
        state = {}
        for key, value in model.state_dict().items():
            if unique.setdefault(value.data_ptr(), key) == key or value.numel() == 0:
                state[key] = value.contiguous()
        save_file(state, folder / f"{name}.safetensors")


def load_weights(model: Model, path: Path) -> Model:
    """Read weights written by `save_weights` into a model of the same structure."""
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    tied = {n for n, p in model.named_parameters(remove_duplicate=False)} - {
        n for n, _ in model.named_parameters()
    }
    left = [m for m in missing if m not in tied]
    if left or unexpected:
        raise ValueError(f"{path}: does not fit the structure: {(left + list(unexpected))[:3]}")
    return model
