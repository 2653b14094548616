"""open_clip's own way from a picture or a text to an embedding."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from mmcompress.models.families.open_clip import (
    find_tagged_weights,
    read_weights_from,
    strip_wrappers_of_weights,
)
from mmcompress.models.hub import refuse_pickles
from mmcompress.models.reference.base import (
    LibraryAnswer,
    LibraryReference,
    ReferenceRequest,
    WritingRequest,
    normalize,
)

CONFIG_FILE = "open_clip_config.json"
"""The file that tells open_clip what lies in a folder."""

DEFAULT_CONTEXT_LENGTH = 77
"""Tokens of a text where the configuration does not say: CLIP's."""

DEFAULT_CAPTION_LENGTH = 30
"""Tokens of the longest caption: the default of `seq_len` in CoCa's `generate`."""

DEFAULT_SHORTEST_CAPTION = 5
"""Tokens before which no caption ends: the default of `min_seq_len` there."""


def _create_model(request: ReferenceRequest) -> Any:
    """Return open_clip's model, and its preprocessing for inference.

    open_clip knows no revisions, so it is given the file of the commit that the spec names.
    """
    weights_file: Path | None = None
    if request.pretrained and request.revision:
        weights_file = find_tagged_weights(
            request.location,
            request.location,
            tag=request.pretrained,
            revision=request.revision,
            shapes_only=False,
        )
    with (
        refuse_pickles(request.location),
        strip_wrappers_of_weights(),
        read_weights_from(weights_file),
    ):
        model, _, preprocess = open_clip.create_model_and_transforms(
            request.location, pretrained=request.pretrained, weights_only=True
        )
    return model.float().eval(), preprocess


class CocaWriter(PreTrainedModel, GenerationMixin):
    """open_clip's own forward of CoCa for one picture, for the `generate` of transformers.

    Args:
        model: The whole CoCa.
        pixels: The picture [1, 3, h, w].
        pad: The id of padding.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"
    _supports_cache_class = False

    def __init__(self, model: Any, pixels: Tensor, *, pad: int):
        vocabulary = int(model.text.token_embedding.num_embeddings)
        options: dict[str, object] = {
            # The library's tokenizer ends its vocabulary with the start and the end of a text.
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": pad,
            "vocab_size": vocabulary,
            "num_hidden_layers": 1,
            "is_decoder": True,
        }
        super().__init__(PretrainedConfig.from_dict(options))
        self.model = model
        self.pixels = pixels
        latent, vectors = model._encode_image(pixels)
        self.image_latent = latent
        self.image_vectors = vectors

    def prepare_inputs_for_generation(self, input_ids: Tensor, *_: object, **__: object) -> Any:
        """Return the whole texts: the library's model has no cache."""
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        """Return the logits [b, t, v] of texts [b, t] about the picture."""
        count = len(input_ids)
        outputs = self.model(
            None,
            input_ids,
            image_latent=self.image_latent.expand(count, -1),
            image_embs=self.image_vectors.expand(count, -1, -1),
            output_labels=False,
        )
        return CausalLMOutput(logits=outputs["logits"])


class OpenClipImages(LibraryReference):
    """`encode_image` behind the transform that `create_model_and_transforms` gives.

    CoCa also writes. Its own `generate` needs functions that transformers 5 no longer has. Its
    beams went in groups and added up logits that are no probabilities. So the library's own forward
    is given to the `generate` of transformers.
    """

    def __init__(self, request: ReferenceRequest):
        self.location = request.location
        self.model, self.preprocess = _create_model(request)

    @torch.inference_mode()
    def answer(self, raw: object) -> LibraryAnswer:
        """Embed one picture (PIL)."""
        pixels = self.preprocess(raw)
        embedding = self.model.encode_image(pixels[None])[0]
        return LibraryAnswer(prepared=pixels.numpy(), embedding=normalize(embedding.numpy()))

    @torch.inference_mode()
    def compute_tokens(self, raw: object) -> np.ndarray | None:
        """Return the vectors [n, w] that the tower gives beside its embedding."""
        visual = self.model.visual
        if not hasattr(visual, "output_tokens"):
            return None
        kept = visual.output_tokens
        visual.output_tokens = True
        try:
            _, tokens = visual(self.preprocess(raw)[None])
        finally:
            visual.output_tokens = kept
        vectors: np.ndarray = tokens[0].numpy()
        return vectors

    @torch.inference_mode()
    def write(self, raw: object, request: WritingRequest) -> list[int] | None:
        """Write the caption of one picture."""
        if not isinstance(self.model, open_clip.CoCa):
            return None
        # The library's tokenizer ends its vocabulary with the start and the end of a text.
        end = int(self.model.text.token_embedding.num_embeddings) - 1
        ids = [end - 1]
        positions = min(self.model.text.context_length, self.model.text_decoder.context_length)
        longest = request.max_tokens or min(DEFAULT_CAPTION_LENGTH, positions)
        if request.prompt:
            tokenizer = open_clip.get_tokenizer(self.location)
            ids += tokenizer.encode(request.prompt)
        pixels = self.preprocess(raw)[None]
        writer: Any = CocaWriter(self.model, pixels, pad=int(self.model.pad_id))
        written = writer.eval().generate(
            torch.tensor([ids]),
            num_beams=request.beams,
            max_length=longest,
            min_length=DEFAULT_SHORTEST_CAPTION,
            do_sample=False,
            use_cache=False,
        )
        best: list[int] = written[0].tolist()
        return best

    @torch.inference_mode()
    def compute_logits(
        self, raw: object, *, ids: Sequence[int], request: WritingRequest
    ) -> np.ndarray:
        """Return the logits [v] of the token behind a caption."""
        pixels = self.preprocess(raw)[None]
        outputs = self.model(pixels, torch.tensor([[*ids]]), output_labels=False)
        logits: np.ndarray = outputs["logits"][0, -1].numpy()
        return logits


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
