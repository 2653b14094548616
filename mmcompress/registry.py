"""The plug points: names a spec may use, each resolved to code only when it is used.

An entry is `"module:attribute"` or the object itself. Code outside the project joins with `plugins: [my.module]` in
the spec; that module calls, say, `IMPORTANCE.add("mine", score)` when it is imported.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmcompress.errors import suggest_nearest


def resolve_entry(target: str) -> Any:
    """The attribute behind `module:attribute`."""
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


class Registry:
    """Names at one plug point. `what` is the word of error messages."""

    def __init__(self, what: str, entries: dict[str, tuple[Any, str]]):
        self.what = what
        self._entries = dict(entries)

    def add(self, name: str, target: Any, about: str = "") -> None:
        self._entries[name] = (target, about)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def about(self, name: str) -> str:
        return self._entries[name][1]

    def problem(self, name: str) -> str | None:
        """What is wrong with `name`, or None."""
        return (
            None
            if name in self._entries
            else f"unknown {self.what} '{name}'; {suggest_nearest(name, self._entries)}"
        )

    def get(self, name: str) -> Any:
        """The entry. Raises `KeyError` with the nearest name when there is none."""
        if problem := self.problem(name):
            raise KeyError(problem)
        target = self._entries[name][0]
        return resolve_entry(target) if isinstance(target, str) else target


class MixtureRegistry(Registry):
    """A registry whose entries can be added up: `fisher + 0.5 * magnitude`. `mix` makes one of (weight, entry)."""

    def __init__(self, what: str, mix: str, *, entries: dict[str, tuple[Any, str]]):
        super().__init__(what, entries)
        self.mix = mix

    def _parts(self, name: str) -> list[tuple[str, str]]:
        """(weight, entry) as written."""
        terms = [term.strip() for term in str(name).split("+")]
        return [tuple(map(str.strip, t.rsplit("*", 1))) if "*" in t else ("1", t) for t in terms]  # type: ignore[misc]

    def problem(self, name: str) -> str | None:
        for weight, entry in self._parts(name):
            if found := super().problem(entry):
                return found
            if not weight.replace(".", "", 1).isdigit() or float(weight) <= 0:
                return (
                    f"'{weight}' is not a positive weight; expected, say, fisher + 0.5 * magnitude"
                )
        return None

    def get(self, name: str) -> Any:
        if problem := self.problem(name):
            raise KeyError(problem)
        parts = self._parts(name)
        if len(parts) == 1:
            return super().get(parts[0][1])
        return resolve_entry(self.mix)(
            [(float(w), super(MixtureRegistry, self).get(entry)) for w, entry in parts]
        )


IMPORTANCE = MixtureRegistry(
    "importance",
    "mmcompress.prune.importance:mix_criteria",
    entries={
        "fisher": (
            "mmcompress.prune.importance:score_by_fisher",
            "sum over pairs of the squared gradient of a unit's mask",
        ),
        "taylor": (
            "mmcompress.prune.importance:score_by_taylor",
            "absolute mean gradient of a unit's mask",
        ),
        "magnitude": (
            "mmcompress.prune.importance:score_by_magnitude",
            "L2 norm of all weights of a unit, written and read",
        ),
        "activation": (
            "mmcompress.prune.importance:score_by_activation",
            "weight norm times input norm (Wanda)",
        ),
        "fluctuation": (
            "mmcompress.prune.importance:score_by_fluctuation",
            "weight norm times input variance (FLAP)",
        ),
        "reconstruction": (
            "mmcompress.prune.importance:score_by_reconstruction",
            "error of the block's output when the rest is refitted (ZipLM)",
        ),
        "magnitude_l1": (
            "mmcompress.prune.importance:score_by_magnitude_l1",
            "L1 norm of the same weights",
        ),
        "movement": (
            "mmcompress.prune.importance:score_by_movement",
            "how far fine-tuning moves a unit away from zero",
        ),
        "random": ("mmcompress.prune.importance:score_at_random", "the control"),
    },
)
ALLOCATIONS = Registry(
    "allocation",
    {
        "knapsack": (
            "mmcompress.search.allocation:allocate_by_knapsack",
            "least measured damage at the ratio of the group",
        ),
        "ranked": (
            "mmcompress.search.allocation:allocate_by_rank",
            "least important units of the group, over all its layers",
        ),
        "uniform": (
            "mmcompress.search.allocation:allocate_uniformly",
            "the same ratio in every layer",
        ),
    },
)
DATA_KINDS = Registry(
    "data kind",
    {
        "emoji_scenes": (
            "mmcompress.data.emoji_scenes:EmojiScenes",
            "captioned scenes drawn at run time",
        ),
        "folder": (
            "mmcompress.data.folder:Folder",
            "the user's own images and captions (JSONL or CSV)",
        ),
        "speech_folder": (
            "mmcompress.data.speech_folder:SpeechFolder",
            "the user's own recordings and transcripts, as LJSpeech lays them out",
        ),
    },
)
METRICS = Registry(
    "metric",
    {
        "retrieval": (
            "mmcompress.metrics.retrieval:score_retrieval",
            "R@1 image to text and text to image",
        ),
        "caption": (
            "mmcompress.metrics.caption:score_captions",
            "exact match of the pipeline's caption",
        ),
        "wer": ("mmcompress.metrics.wer:score_word_errors", "word error rate of what was heard"),
        "endings": (
            "mmcompress.metrics.endings:score_endings",
            "share of texts that end by themselves",
        ),
        "agreement": (
            "mmcompress.metrics.agreement:score_agreement",
            "share of answers that are those of the dense pipeline",
        ),
        "embedding": (
            "mmcompress.metrics.embedding:score_embeddings",
            "R@1, among the dense ones, of embeddings that no join compares",
        ),
    },
)
FAMILIES = Registry(
    "model family",
    {
        "open_clip/image_encoder": (
            "mmcompress.models.families.open_clip:load_image_encoder",
            "open_clip ViT image tower",
        ),
        "open_clip/text_decoder": (
            "mmcompress.models.families.open_clip:load_text_decoder",
            "CoCa's caption decoder",
        ),
        "open_clip/text_encoder": (
            "mmcompress.models.families.open_clip:load_text_encoder",
            "open_clip text tower",
        ),
        "transformers/image_encoder": (
            "mmcompress.models.families.transformers_encoders:load_image_encoder",
            "CLIP, SigLIP, ViT, DINOv2, BLIP, GIT, LLaVA image towers",
        ),
        "transformers/text_encoder": (
            "mmcompress.models.families.transformers_encoders:load_text_encoder",
            "CLIP and SigLIP text towers; BERT, RoBERTa, MiniLM sentence encoders",
        ),
        "transformers/audio_encoder": (
            "mmcompress.models.families.transformers_encoders:load_audio_encoder",
            "Whisper's encoder",
        ),
        "transformers/text_decoder": (
            "mmcompress.models.families.transformers_decoders:load_text_decoder",
            "cross-attending (mBART, GPT-2, BERT, BLIP, Whisper, T5) or reading a prefix (GIT, LLaVA)",
        ),
    },
)
EXECUTORS = Registry(
    "executor",
    {
        "ray": (
            "mmcompress.search.executors:RayExecutor",
            "Ray workers, on this machine or a cluster",
        ),
        "process": (
            "mmcompress.search.executors:make_process_executor",
            "processes of this machine, without Ray",
        ),
        "inline": (
            "mmcompress.search.executors:InlineExecutor",
            "this process, one trial after the other",
        ),
    },
)
PRECISIONS = Registry(
    "precision",
    {
        "fp32": ("mmcompress.quantize.base:FP32", "as trained"),
        "int8": (
            "mmcompress.quantize.base:INT8",
            "dynamic, 7-bit weights per channel: right on any CPU",
        ),
        "int8_full": (
            "mmcompress.quantize.base:INT8_FULL",
            "dynamic, 8-bit weights: for CPUs with VNNI alone",
        ),
        "uint8": ("mmcompress.quantize.base:UINT8", "dynamic, asymmetric 8-bit weights"),
        "int8_static": (
            "mmcompress.quantize.base:INT8_STATIC",
            "ranges of activations from calibration data",
        ),
        "w8": (
            "mmcompress.quantize.base:W8",
            "weights in 8 bits, in groups of 32; float between products",
        ),
        "w4": (
            "mmcompress.quantize.base:W4",
            "weights in 4 bits, in groups of 32; float between products",
        ),
        "fp16": (
            "mmcompress.quantize.base:FP16",
            "half precision: half the size, faster where a device has it",
        ),
        "bf16": (
            "mmcompress.quantize.base:BF16",
            "weights alone, as bfloat16: half the size, no faster",
        ),
    },
)
SAMPLERS = Registry(
    "sampler",
    {
        "tpe": (
            "mmcompress.search.samplers:make_tpe",
            "tree-structured Parzen estimator, multivariate",
        ),
        "gp": ("mmcompress.search.samplers:make_gp", "Gaussian process"),
        "nsga2": ("mmcompress.search.samplers:make_nsga2", "the genetic algorithm NSGA-II"),
        "cmaes": (
            "mmcompress.search.samplers:make_cmaes",
            "CMA-ES over the ranges, choices at random",
        ),
        "random": ("mmcompress.search.samplers:make_random", "the control"),
    },
)
DEPLOYED_KINDS = Registry(
    "kind of node",
    {
        "image_encoder": (
            "mmcompress.kinds.image_encoder.deployed:ImageEncoder",
            "an image to vectors",
        ),
        "audio_encoder": (
            "mmcompress.kinds.audio_encoder.deployed:AudioEncoder",
            "a sound to vectors",
        ),
        "text_encoder": ("mmcompress.kinds.text_encoder.deployed:TextEncoder", "texts to vectors"),
        "text_decoder": ("mmcompress.kinds.text_decoder.deployed:TextDecoder", "vectors to text"),
        "nearest": ("mmcompress.kinds.nearest.deployed:Nearest", "the nearest of some texts"),
        "lookup": ("mmcompress.kinds.lookup.deployed:Lookup", "the nearest of a list"),
    },
)
PLUG_POINTS = {
    "models": FAMILIES,
    "importance": IMPORTANCE,
    "allocation": ALLOCATIONS,
    "data": DATA_KINDS,
    "metrics": METRICS,
    "executors": EXECUTORS,
    "samplers": SAMPLERS,
    "precisions": PRECISIONS,
}
"""Every plug point, as `mmcompress list` names it."""
