"""Runs a bundle with onnxruntime, numpy, pillow and tokenizers alone: `load("bundle")(image="photo.png")`."""

from mmcompress.runtime.bundle import Manifest, read_manifest, verify
from mmcompress.runtime.pipeline import Pipeline, load

__all__ = ["Manifest", "Pipeline", "load", "read_manifest", "verify"]
