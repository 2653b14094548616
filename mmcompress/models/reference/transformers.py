"""transformers' own way from a picture, a sound or a text to an embedding or a text.

Processors and models come from the `Auto` classes. What a sentence encoder makes of its tokens
stands in the folders that sentence-transformers writes (`modules.json`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from mmcompress.models.hub import load_reference_model
from mmcompress.models.reference.base import (
    LibraryAnswer,
    LibraryReference,
    ReferenceRequest,
    WritingLimits,
    normalize,
)
from mmcompress.runtime.audio import SAMPLE_RATE

FRAME_SAMPLES = 160
"""Samples at 16 kHz from one frame of features to the next."""

CAPTIONER_TYPES = ("blip", "git", "vision-encoder-decoder")
"""Types of models that write the text of a picture; they have no embedding of their own."""


class TransformersImages(LibraryReference):
    """The image tower behind `AutoImageProcessor`, and `generate` where the model writes."""

    def __init__(self, request: ReferenceRequest):
        self.processor = transformers.AutoImageProcessor.from_pretrained(
            request.location, backend="pil"
        )
        self.config = transformers.AutoConfig.from_pretrained(request.location)
        self.model = _load_model(request.location, self.config).eval()

    @torch.inference_mode()
    def answer(self, raw: object) -> LibraryAnswer:
        """Embed one picture (PIL)."""
        pixels = self.processor(images=raw, return_tensors="pt")["pixel_values"]
        embedding = self._embed(pixels)
        return LibraryAnswer(
            prepared=pixels[0].numpy(),
            embedding=None if embedding is None else normalize(embedding[0].numpy()),
        )

    def _embed(self, pixels: Tensor) -> Tensor | None:
        """Return the library's own embedding [1, d], or None where it has none."""
        if hasattr(self.model, "get_image_features"):
            features = self.model.get_image_features(pixel_values=pixels)
            pooled = getattr(features, "pooler_output", features)
            # A chat model gives the tokens that its language model reads.
            return pooled if isinstance(pooled, Tensor) and pooled.ndim == 2 else None
        if getattr(self.model, "main_input_name", "") != "pixel_values":
            return None
        if self.config.model_type in CAPTIONER_TYPES:
            return None
        outputs = self.model(pixel_values=pixels)
        projected: Tensor | None = getattr(outputs, "image_embeds", None)
        if projected is not None:
            return projected
        first_token: Tensor = outputs.last_hidden_state[:, 0]
        pooled_output: Tensor | None = getattr(outputs, "pooler_output", None)
        # ViT's pooler is a layer for classification; its first token is the picture.
        if pooled_output is None or self.config.model_type == "vit":
            return first_token
        return pooled_output

    @torch.inference_mode()
    def write(self, raw: object, limits: WritingLimits) -> list[int] | None:
        """Write the caption of one picture."""
        if self.config.model_type not in CAPTIONER_TYPES:
            return None
        pixels = self.processor(images=raw, return_tensors="pt")["pixel_values"]
        ids: list[int] = self.model.generate(
            pixel_values=pixels, num_beams=limits.beams, max_length=limits.max_tokens
        )[0].tolist()
        return ids


class TransformersSounds(LibraryReference):
    """`AutoFeatureExtractor`, and `generate` of a speech recognizer."""

    def __init__(self, request: ReferenceRequest):
        self.extractor = _load_feature_extractor(request.location)
        self.model = load_reference_model(
            transformers.AutoModelForSpeechSeq2Seq,
            Path(request.location),
            config=transformers.AutoConfig.from_pretrained(request.location),
        ).eval()

    def answer(self, raw: object) -> LibraryAnswer:
        """Compute the features of one sound, samples at 16 kHz."""
        return LibraryAnswer(prepared=self._extract(raw)[0].numpy())

    def _extract(self, raw: object) -> Tensor:
        """Return features [1, m, f]."""
        extracted = self.extractor(raw, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features: Tensor = extracted["input_features"]
        return features

    @torch.inference_mode()
    def write(self, raw: object, limits: WritingLimits) -> list[int] | None:
        """Transcribe one sound. Whisper's `generate` leaves out what a text starts from."""
        ids = self.model.generate(
            input_features=self._extract(raw),
            num_beams=limits.beams,
            max_new_tokens=limits.max_tokens - limits.lead_tokens,
        )[0].tolist()
        return [int(token) for token in ids]


def _load_feature_extractor(location: str) -> Any:
    """Return the feature extractor of a folder, or Whisper's where the folder has no file of it."""
    if Path(location).is_dir() and not (Path(location) / "preprocessor_config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(location)
        # Two frames of 10 ms make a position of the encoder.
        samples = int(config.max_source_positions) * 2 * FRAME_SAMPLES
        extractor = transformers.WhisperFeatureExtractor(feature_size=int(config.num_mel_bins))
        extractor.n_samples = samples
        extractor.nb_max_frames = samples // FRAME_SAMPLES
        return extractor
    return transformers.AutoFeatureExtractor.from_pretrained(location)


def _load_tokenizer(location: str) -> Any:
    """Return the tokenizer that `AutoTokenizer` gives, or a bare `tokenizer.json` as it is.

    Such a folder does not say which class its tokenizer has; the library would guess one.
    """
    bare_file = Path(location) / "tokenizer.json"
    if bare_file.is_file() and not (Path(location) / "tokenizer_config.json").is_file():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(bare_file))
    return transformers.AutoTokenizer.from_pretrained(location)


class TransformersTexts(LibraryReference):
    """The text tower behind `AutoTokenizer`; pooling as sentence-transformers' folders say."""

    def __init__(self, request: ReferenceRequest):
        self.folder = Path(request.location)
        self.tokenizer = _load_tokenizer(request.location)
        self.config = transformers.AutoConfig.from_pretrained(request.location)
        self.model = _load_model(request.location, self.config).eval()
        self.max_length = self._find_max_length(request)

    def _find_max_length(self, request: ReferenceRequest) -> int:
        """Return the most tokens of a text."""
        tower = getattr(self.config, "text_config", self.config)
        lengths = [int(tower.max_position_embeddings), int(self.tokenizer.model_max_length)]
        if self.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            lengths[0] -= int(self.config.pad_token_id) + 1
        said = self._read_json("sentence_bert_config.json").get("max_seq_length")
        if said:
            lengths.append(int(said))
        if request.max_tokens:
            lengths.append(request.max_tokens)
        return min(lengths)

    def _read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the folder; empty where there is none."""
        path = self.folder / name
        if not path.is_file():
            return {}
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    @torch.inference_mode()
    def answer(self, raw: object) -> LibraryAnswer:
        """Embed one text."""
        text = str(raw)
        prompts = self._read_json("config_sentence_transformers.json")
        prompt_name = prompts.get("default_prompt_name")
        if prompt_name:
            text = prompts["prompts"][prompt_name] + text
        if self._read_json("sentence_bert_config.json").get("do_lower_case"):
            text = text.lower()
        # SigLIP was trained on texts that are padded to the whole length.
        padding = "max_length" if self.config.model_type.startswith("siglip") else False
        encoded = self.tokenizer(
            text,
            truncation=True,
            max_length=self.max_length,
            padding=padding,
            return_tensors="pt",
        )
        ids = encoded["input_ids"]
        mask = encoded.get("attention_mask", torch.ones_like(ids))
        embedding = self._embed(ids, mask)
        return LibraryAnswer(
            prepared=np.asarray(ids[0].numpy(), np.int64),
            embedding=normalize(embedding[0].numpy()),
        )

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the library's own embedding [1, d]."""
        if hasattr(self.model, "get_text_features"):
            arguments = {"input_ids": ids}
            if not self.config.model_type.startswith("siglip"):
                arguments["attention_mask"] = mask
            features = self.model.get_text_features(**arguments)
            pooled: Tensor = getattr(features, "pooler_output", features)
            return pooled
        if self.config.model_type.startswith("siglip"):
            outputs = self.model(input_ids=ids)
        else:
            outputs = self.model(input_ids=ids, attention_mask=mask)
        projected: Tensor | None = getattr(outputs, "text_embeds", None)
        if projected is not None:
            return projected
        if self.config.model_type.startswith(("clip", "siglip")):
            tower_output: Tensor = outputs.pooler_output
            return tower_output
        pooled = self._pool(outputs.last_hidden_state, mask)
        for module in self._list_modules():
            if module["type"].endswith("Dense"):
                pooled = self._apply_dense(module["path"], pooled)
        return pooled

    def _list_modules(self) -> list[dict[str, str]]:
        """Return what a sentence-transformers folder does with the tokens, in order."""
        path = self.folder / "modules.json"
        if not path.is_file():
            return []
        modules: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
        return modules

    def _pool(self, tokens_BTW: Tensor, mask_BT: Tensor) -> Tensor:
        """Pool tokens as `1_Pooling/config.json` says; their mean where nothing is said."""
        pooling: dict[str, Any] = {}
        for module in self._list_modules():
            if module["type"].endswith("Pooling"):
                pooling = self._read_json(f"{module['path']}/config.json")
        weights_BT1 = mask_BT[..., None].to(tokens_BTW.dtype)
        parts: list[Tensor] = []
        if pooling.get("pooling_mode_cls_token"):
            parts.append(tokens_BTW[:, 0])
        if pooling.get("pooling_mode_max_tokens"):
            parts.append(tokens_BTW.masked_fill(weights_BT1 == 0, -torch.inf).amax(1))
        if pooling.get("pooling_mode_mean_tokens", not pooling):
            parts.append((tokens_BTW * weights_BT1).sum(1) / weights_BT1.sum(1))
        if pooling.get("pooling_mode_mean_sqrt_len_tokens"):
            parts.append((tokens_BTW * weights_BT1).sum(1) / weights_BT1.sum(1).sqrt())
        return torch.cat(parts, -1)

    def _apply_dense(self, path: str, pooled_BW: Tensor) -> Tensor:
        """Apply a dense layer of a sentence-transformers folder."""
        config = self._read_json(f"{path}/config.json")
        weights = load_file(self.folder / path / "model.safetensors")
        output = pooled_BW @ weights["linear.weight"].T
        if config.get("bias", True):
            output = output + weights["linear.bias"]
        activation = str(config.get("activation_function", "")).rpartition(".")[2]
        return torch.tanh(output) if activation == "Tanh" else output


def _load_model(location: str, config: Any) -> Any:
    """Return the model without a head, or in the class it was saved as where that has the answer.

    Those are captioners, and towers with their projection.
    """
    model_class = transformers.AutoModel
    for name in config.architectures or ():
        has_answer = name.endswith("WithProjection") or config.model_type in CAPTIONER_TYPES
        if has_answer and hasattr(transformers, name):
            model_class = getattr(transformers, name)
    return load_reference_model(model_class, Path(location), config=config)
