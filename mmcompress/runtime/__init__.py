"""Runs a bundle with onnxruntime, numpy, pillow and tokenizers alone: `load("bundle")(image="photo.png")`."""

from mmcompress.runtime.bundle import Manifest, read_manifest, verify_files
from mmcompress.runtime.graph import Pipeline, load_bundle

__all__ = ["Manifest", "Pipeline", "load_bundle", "read_manifest", "verify_files"]
