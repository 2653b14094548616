"""transformers' own way from a picture, a sound or a text to an embedding or a text.

Processors and models come from the `Auto` classes. What a sentence encoder makes of its tokens
stands in the folders that sentence-transformers writes (`modules.json`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from mmcompress.models.hub import load_reference_model
from mmcompress.models.reference.base import (
    LibraryAnswer,
    LibraryReference,
    MatchAnswer,
    ReferenceRequest,
    WritingRequest,
    normalize,
)
from mmcompress.models.reference.files import LIBRARY_SAMPLE_RATE

FRAME_SAMPLES = 160
"""Samples at 16 kHz from one frame of features to the next."""

CAPTIONER_TYPES = ("blip", "git", "llava", "vision-encoder-decoder")
"""Types of models that write the text of a picture; they have no embedding of their own."""

DECODER_TYPES = ("mbart", "gpt2", "bert", "blip_text_model", "t5")
"""Types of models whose decoder may read the vectors of another checkpoint."""

PROMPTED_IMAGE = "<image>"
"""Where the picture stands in a prompt of LLaVA."""

MATCHING_CLASS = 1
"""The class of BLIP's matching head that says that a text describes a picture."""


class TransformersImages(LibraryReference):
    """The image tower behind `AutoImageProcessor`, and `generate` where the model writes."""

    def __init__(self, request: ReferenceRequest):
        self.location = request.location
        self.processor = _load_image_processor(request.location)
        self.text_processor: Any = None
        self.config = transformers.AutoConfig.from_pretrained(request.location)
        self.model = _load_model(request.location, self.config).float().eval()

    @torch.inference_mode()
    def answer(self, raw: object) -> LibraryAnswer:
        """Embed one picture (PIL)."""
        pixels = self._prepare(raw)
        embedding = self._embed(pixels)
        return LibraryAnswer(
            prepared=pixels[0].numpy(),
            embedding=None if embedding is None else normalize(embedding[0].numpy()),
        )

    def _prepare(self, raw: object) -> Tensor:
        """Return the pixels [1, 3, h, w] of one picture."""
        pixels: Tensor = self.processor(images=raw, return_tensors="pt")["pixel_values"]
        return pixels

    def _embed(self, pixels: Tensor) -> Tensor | None:
        """Return the library's own embedding [1, d], or None where it has none."""
        if self.config.model_type in CAPTIONER_TYPES:
            return None
        if hasattr(self.model, "get_image_features"):
            features = self.model.get_image_features(pixel_values=pixels)
            pooled_vector: Tensor = getattr(features, "pooler_output", features)
            return pooled_vector
        if getattr(self.model, "main_input_name", "") != "pixel_values":
            return None
        outputs = self.model(pixel_values=pixels)
        projected_vector: Tensor | None = getattr(outputs, "image_embeds", None)
        if projected_vector is not None:
            return projected_vector
        first_token: Tensor = outputs.last_hidden_state[:, 0]
        pooled_output: Tensor | None = getattr(outputs, "pooler_output", None)
        # ViT's pooler is a layer for classification; its first token is the picture.
        if pooled_output is None or self.config.model_type == "vit":
            return first_token
        return pooled_output

    @torch.inference_mode()
    def compute_tokens(self, raw: object) -> np.ndarray | None:
        """Return the vectors [n, w] of the tower's last layer."""
        tower = self.model
        if hasattr(tower, "vision_model"):
            tower = tower.vision_model
        elif self.config.model_type == "vision-encoder-decoder":
            tower = tower.encoder
        elif self.config.model_type in CAPTIONER_TYPES:
            return None
        outputs = tower(pixel_values=self._prepare(raw))
        tokens: np.ndarray | None = None
        if getattr(outputs, "last_hidden_state", None) is not None:
            tokens = outputs.last_hidden_state[0].numpy()
        return tokens

    @torch.inference_mode()
    def write(self, raw: object, request: WritingRequest) -> list[int] | None:
        """Write the caption of one picture.

        LLaVA reads a picture only where its prompt names one.
        """
        model_type = self.config.model_type
        if model_type not in CAPTIONER_TYPES:
            return None
        if model_type == "llava" and PROMPTED_IMAGE not in request.prompt:
            return None
        inputs = self._make_inputs(raw, request)
        options = _limit_length(request)
        if model_type == "llava":
            # Its input holds the picture and the words ahead of it as well.
            options = _limit_new_tokens(request)
        outputs = self.model.generate(**inputs, num_beams=request.beams, **options)
        ids: list[int] = outputs[0].tolist()
        return ids[self._count_ids_ahead(ids) :]

    def _make_inputs(self, raw: object, request: WritingRequest) -> dict[str, Any]:
        """Return what `generate` is given: pixels, and a prompt where there is one."""
        inputs: dict[str, Any] = {"pixel_values": self._prepare(raw)}
        if not request.prompt:
            return inputs
        model_type = self.config.model_type
        if model_type in ("blip", "llava"):
            if self.text_processor is None:
                self.text_processor = transformers.AutoProcessor.from_pretrained(self.location)
                self.text_processor.image_processor = self.processor
            return dict(self.text_processor(images=raw, text=request.prompt, return_tensors="pt"))
        tokenizer = _load_tokenizer(self.location)
        words = tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
        if model_type == "git":
            # As the library's example of question answering does.
            inputs["input_ids"] = torch.tensor([[self.config.bos_token_id, *words]])
            return inputs
        start = self.model.generation_config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start, *words]])
        return inputs

    def _count_ids_ahead(self, ids: Sequence[int]) -> int:
        """Return how many ids stand ahead of a text, through those of the picture."""
        if self.config.model_type != "llava":
            return 0
        image_id = self.config.image_token_id
        return max(place for place, token in enumerate(ids) if token == image_id) + 1

    @torch.inference_mode()
    def compute_logits(
        self, raw: object, *, ids: Sequence[int], request: WritingRequest
    ) -> np.ndarray:
        """Return the logits [v] of the token behind a text."""
        model_type = self.config.model_type
        pixels = self._prepare(raw)
        if model_type == "blip":
            context = self.model.vision_model(pixel_values=pixels)[0]
            outputs = self.model.text_decoder(
                input_ids=torch.tensor([[*ids]]), encoder_hidden_states=context
            )
        elif model_type == "vision-encoder-decoder":
            outputs = self.model(pixel_values=pixels, decoder_input_ids=torch.tensor([[*ids]]))
        elif model_type == "llava":
            asked_ids = self._make_inputs(raw, request)["input_ids"][0].tolist()
            ids_ahead = asked_ids[: self._count_ids_ahead(asked_ids)]
            outputs = self.model(pixel_values=pixels, input_ids=torch.tensor([[*ids_ahead, *ids]]))
        else:
            outputs = self.model(pixel_values=pixels, input_ids=torch.tensor([[*ids]]))
        logits: np.ndarray = outputs.logits[0, -1].numpy()
        return logits


def _limit_length(request: WritingRequest) -> dict[str, int | None]:
    """Return options of `generate` for the longest text, where the spec names one."""
    if not request.max_tokens:
        return {}
    return {"max_length": request.max_tokens, "max_new_tokens": None}


def _limit_new_tokens(request: WritingRequest) -> dict[str, int | None]:
    """Return the same where the library counts what its texts start from otherwise."""
    if not request.max_tokens:
        return {}
    return {"max_new_tokens": request.max_tokens - len(request.start), "max_length": None}


class TransformersDecoders:
    """`generate` of a decoder that reads the vectors of an encoder from another checkpoint."""

    def __init__(self, request: ReferenceRequest):
        self.location = request.location
        self.config = transformers.AutoConfig.from_pretrained(request.location)
        self.model: Any = None
        if self.config.model_type not in DECODER_TYPES:
            return
        model_class: Any = transformers.AutoModelForCausalLM
        if self.config.is_encoder_decoder:
            model_class = transformers.AutoModelForSeq2SeqLM
        model_class = [*_list_saved_classes(self.config), model_class][0]
        self.model = (
            load_reference_model(model_class, Path(request.location), config=self.config)
            .float()
            .eval()
        )

    @torch.inference_mode()
    def write(self, raw: object, request: WritingRequest) -> list[int] | None:
        """Write a text of the vectors [n, w] of an encoder."""
        if self.model is None:
            return None
        context = torch.tensor(np.asarray(raw, np.float32))[None]
        options: dict[str, Any] = {**_limit_length(request)}
        # For a decoder alone, `generate` makes a cache of another kind than cross-attention needs.
        options["use_cache"] = self.config.is_encoder_decoder
        if self.config.is_encoder_decoder:
            options["encoder_outputs"] = BaseModelOutput(context)
            start = self.model.generation_config.decoder_start_token_id
            key = "decoder_input_ids"
        else:
            options["encoder_hidden_states"] = context
            start = self.model.generation_config.bos_token_id
            key = "input_ids"
        if request.prompt:
            tokenizer = _load_tokenizer(self.location)
            words = tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
            options[key] = torch.tensor([[start, *words]])
        ids: list[int] = self.model.generate(num_beams=request.beams, **options)[0].tolist()
        return ids

    @torch.inference_mode()
    def compute_logits(
        self, raw: object, *, ids: Sequence[int], request: WritingRequest
    ) -> np.ndarray:
        """Return the logits [v] of the token behind a text."""
        context = torch.tensor(np.asarray(raw, np.float32))[None]
        text = torch.tensor([[*ids]])
        if self.config.is_encoder_decoder:
            outputs = self.model(encoder_outputs=BaseModelOutput(context), decoder_input_ids=text)
        else:
            outputs = self.model(input_ids=text, encoder_hidden_states=context)
        logits: np.ndarray = outputs.logits[0, -1].numpy()
        return logits


class TransformersMatching(LibraryReference):
    """BLIP's image-text matching behind `AutoProcessor`'s parts."""

    def __init__(self, request: ReferenceRequest):
        self.processor = _load_image_processor(request.location)
        self.tokenizer = _load_tokenizer(request.location)
        self.config = transformers.AutoConfig.from_pretrained(request.location)
        self.max_length = int(self.config.text_config.max_position_embeddings)
        for limit in (int(self.tokenizer.model_max_length), request.max_tokens):
            self.max_length = min(self.max_length, limit or self.max_length)
        self.model = (
            load_reference_model(
                transformers.BlipForImageTextRetrieval, Path(request.location), config=self.config
            )
            .float()
            .eval()
        )

    def answer(self, raw: object) -> LibraryAnswer:
        """Refuse one input alone: `match` reads two."""
        raise TypeError("a text is matched with a picture")

    @torch.inference_mode()
    def match(self, picture: object, text: str) -> MatchAnswer:
        """Tell how well a text describes a picture (PIL)."""
        pixels = self.processor(images=picture, return_tensors="pt")["pixel_values"]
        encodings = self.tokenizer(
            text, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        outputs = self.model(
            pixel_values=pixels,
            input_ids=encodings["input_ids"],
            attention_mask=encodings["attention_mask"],
        )
        classes = outputs.itm_score.softmax(-1)
        return MatchAnswer(
            prepared=np.asarray(encodings["input_ids"][0].numpy(), np.int64),
            embedding=normalize(outputs.question_embeds[0, 0].numpy()),
            match=float(classes[0, MATCHING_CLASS]),
        )


class TransformersSounds(LibraryReference):
    """`AutoFeatureExtractor`, and `generate` of a speech recognizer."""

    def __init__(self, request: ReferenceRequest):
        self.location = request.location
        self.extractor = _load_feature_extractor(request.location)
        self.model = (
            load_reference_model(
                transformers.AutoModelForSpeechSeq2Seq,
                Path(request.location),
                config=transformers.AutoConfig.from_pretrained(request.location),
            )
            .float()
            .eval()
        )

    def answer(self, raw: object) -> LibraryAnswer:
        """Compute the features of one sound, samples at 16 kHz."""
        return LibraryAnswer(prepared=self._extract(raw)[0].numpy())

    def _extract(self, raw: object) -> Tensor:
        """Return features [1, m, f]."""
        extraction = self.extractor(raw, sampling_rate=LIBRARY_SAMPLE_RATE, return_tensors="pt")
        features: Tensor = extraction["input_features"]
        return features

    @torch.inference_mode()
    def compute_tokens(self, raw: object) -> np.ndarray | None:
        """Return the vectors [n, w] of the encoder."""
        outputs = self.model.get_encoder()(self._extract(raw))
        tokens: np.ndarray = outputs.last_hidden_state[0].numpy()
        return tokens

    @torch.inference_mode()
    def write(self, raw: object, request: WritingRequest) -> list[int] | None:
        """Transcribe one sound."""
        options: dict[str, Any] = {}
        if request.max_tokens:
            options["max_new_tokens"] = request.max_tokens - len(request.start)
            # Both limits at once make the library warn of every sound.
            self.model.generation_config.max_length = None
        if request.language:
            options["language"] = request.language
        if request.task:
            options["task"] = request.task
        if request.prompt:
            # As `WhisperTokenizer.get_prompt_ids` does; other classes lack it.
            encodings = _load_tokenizer(self.location)(
                "<|startofprev|>", f" {request.prompt.strip()}", add_special_tokens=False
            )
            options["prompt_ids"] = torch.tensor(encodings["input_ids"])
        outputs = self.model.generate(
            input_features=self._extract(raw),
            num_beams=request.beams,
            # Then the ids that a text starts from and its end are returned as well.
            return_dict_in_generate=True,
            **options,
        )
        ids: list[int] = outputs["sequences"][0].tolist()
        return ids

    @torch.inference_mode()
    def compute_logits(
        self, raw: object, *, ids: Sequence[int], request: WritingRequest
    ) -> np.ndarray:
        """Return the logits [v] of the token behind a text."""
        outputs = self.model(
            input_features=self._extract(raw), decoder_input_ids=torch.tensor([[*ids]])
        )
        logits: np.ndarray = outputs.logits[0, -1].numpy()
        return logits


def _load_image_processor(location: str) -> Any:
    """Return the processor of a folder, by Pillow: the default one gives other pixels."""
    return transformers.AutoImageProcessor.from_pretrained(location, backend="pil")


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
        self.model = _load_model(request.location, self.config).float().eval()
        self.max_length = self._find_max_length(request)

    def _find_max_length(self, request: ReferenceRequest) -> int:
        """Return the most tokens of a text."""
        tower = getattr(self.config, "text_config", self.config)
        lengths = [int(tower.max_position_embeddings), int(self.tokenizer.model_max_length)]
        if self.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            lengths[0] -= int(self.config.pad_token_id) + 1
        own_settings = self._read_json("sentence_bert_config.json").get("max_seq_length")
        if own_settings:
            lengths.append(int(own_settings))
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
        encodings = self.tokenizer(
            text,
            truncation=True,
            max_length=self.max_length,
            padding=padding,
            return_tensors="pt",
        )
        ids = encodings["input_ids"]
        mask = encodings.get("attention_mask", torch.ones_like(ids))
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
            pooled_vector: Tensor = getattr(features, "pooler_output", features)
            return pooled_vector
        if self.config.model_type.startswith("siglip"):
            outputs = self.model(input_ids=ids)
        else:
            outputs = self.model(input_ids=ids, attention_mask=mask)
        projected_vector: Tensor | None = getattr(outputs, "text_embeds", None)
        if projected_vector is not None:
            return projected_vector
        if self.config.model_type.startswith(("clip", "siglip")):
            tower_output: Tensor = outputs.pooler_output
            return tower_output
        pooled_vector = self._pool(outputs.last_hidden_state, mask)
        for module in self._list_modules():
            if module["type"].endswith("Dense"):
                pooled_vector = self._apply_dense(module["path"], pooled_vector)
        return pooled_vector

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

    Those are captioners, and towers with their projection. `AutoModel` does not know some towers.
    """
    model_class: Any = transformers.AutoModel
    for saved_class in _list_saved_classes(config):
        has_answer = saved_class.__name__.endswith("WithProjection")
        has_answer = has_answer or config.model_type in CAPTIONER_TYPES
        if has_answer or type(config) not in transformers.MODEL_MAPPING:
            model_class = saved_class
    return load_reference_model(model_class, Path(location), config=config)


def _list_saved_classes(config: Any) -> list[Any]:
    """Return the classes of the library that a configuration names as those of its weights."""
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    return [getattr(transformers, name) for name in names]
