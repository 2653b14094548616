"""open_clip's own way from a picture or a text to an embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmcompress.models.families.open_clip import strip_wrappers_of_weights
from mmcompress.models.hub import refuse_pickles
from mmcompress.models.reference.base import (
    LibraryAnswer,
    LibraryReference,
    ReferenceRequest,
    normalize,
)

CONFIG_FILE = "open_clip_config.json"
"""The file that tells open_clip what lies in a folder."""

DEFAULT_CONTEXT_LENGTH = 77
"""Tokens of a text where the configuration does not say: CLIP's."""


def _create_model(request: ReferenceRequest) -> Any:
    """Return open_clip's model, and its preprocessing for inference."""
    with refuse_pickles(request.location), strip_wrappers_of_weights():
        model, _, preprocess = open_clip.create_model_and_transforms(
            request.location, pretrained=request.pretrained, weights_only=True
        )
    return model.float().eval(), preprocess


class OpenClipImages(LibraryReference):
    """`encode_image` behind the transform that `create_model_and_transforms` gives."""

    def __init__(self, request: ReferenceRequest):
        self.model, self.preprocess = _create_model(request)

    @torch.inference_mode()
    def answer(self, raw: object) -> LibraryAnswer:
        """Embed one picture (PIL)."""
        pixels = self.preprocess(raw)
        embedding = self.model.encode_image(pixels[None])[0]
        return LibraryAnswer(prepared=pixels.numpy(), embedding=normalize(embedding.numpy()))


class OpenClipTexts(LibraryReference):
    """`encode_text` behind the tokenizer that `get_tokenizer` gives.

    A local folder may bring a `tokenizer.json` that its configuration does not name: that file is
    then used as it is.
    """

    def __init__(self, request: ReferenceRequest):
        self.model, _ = _create_model(request)
        self.tokenize = _open_own_tokenizer(request) or open_clip.get_tokenizer(request.location)

    @torch.inference_mode()
    def answer(self, raw: object) -> LibraryAnswer:
        """Embed one text."""
        ids = self.tokenize([str(raw)])
        embedding = self.model.encode_text(ids)[0]
        return LibraryAnswer(
            prepared=np.asarray(ids[0].numpy(), np.int64), embedding=normalize(embedding.numpy())
        )


def _open_own_tokenizer(request: ReferenceRequest) -> Callable[[list[str]], Tensor] | None:
    """Return the tokenizer of a local folder whose configuration names none."""
    scheme, _, path = request.location.partition(":")
    file = Path(path) / "tokenizer.json"
    if scheme != "local-dir" or not file.is_file():
        return None
    config = json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8"))
    text_config = config["model_cfg"]["text_cfg"]
    if "hf_tokenizer_name" in text_config:
        return None
    tokenizer = Tokenizer.from_file(str(file))
    length = int(text_config.get("context_length", DEFAULT_CONTEXT_LENGTH))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=int(text_config.get("pad_id", 0)))

    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])

    return tokenize
