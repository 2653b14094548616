"""Run a bundle without torch: `load_bundle("bundle")(image="photo.png")`.

A bundle needs onnxruntime, numpy, pillow and tokenizers only.
"""

from mmcompress.runtime.bundle import read_manifest, verify_files
from mmcompress.runtime.check_manifest import Manifest
from mmcompress.runtime.graph import Pipeline, load_bundle

load = load_bundle
"""The former name of `load_bundle`. Users have it in their code, so it stays."""

__all__ = ["Manifest", "Pipeline", "load", "load_bundle", "read_manifest", "verify_files"]
