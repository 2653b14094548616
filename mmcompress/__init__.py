"""mmcompress compresses multi-model multimodal pipelines to one end-to-end latency target.

    import mmcompress
    summary = mmcompress.run("pipelines/clip_captioner.yaml", "runs/a", overrides={"target": "2x"})
    pipeline = mmcompress.load_bundle("runs/a/bundle")
    pipeline(image="photo.png")["caption"]

Names are imported when used: `load_bundle` needs only onnxruntime, numpy, pillow and tokenizers.
Their types stand in `__init__.pyi`, which editors and type checkers read.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmcompress.version import __version__

_NAMES = {
    "load_spec": "mmcompress.graph.load_spec:load_spec",
    "run": "mmcompress.run.run_targets:run",
    "run_targets": "mmcompress.run.run_targets:run_targets",
    "open_run": "mmcompress.workspace.context:open_run",
    "profile": "mmcompress.run.profile:profile_pipeline",
    "load_summary": "mmcompress.workspace.load_summary:load_summary",
    "write_report": "mmcompress.report.page:write_report",
    "load_bundle": "mmcompress.runtime.graph:load_bundle",
    "load_modules": "mmcompress.run.load_modules:load_modules",
    "MmcompressError": "mmcompress.errors:MmcompressError",
}
"""Where each public name comes from, as `module:attribute`."""

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _NAMES:
        raise AttributeError(f"module 'mmcompress' has no attribute '{name}'")
    module, attribute = _NAMES[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """List the public names, for completion at a prompt."""
    return sorted(__all__)
