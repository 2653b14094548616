"""The plug points: names that a spec may use, each resolved to code when it is used.

An entry names its code as `"module:attribute"`, or holds the object itself. Beside it stand one
line for people and the facts that validation asks for, as plain data. Code outside the project
joins with `plugins: [my.module]` in the spec: that module calls, for example,
`IMPORTANCE.add("mine", score_mine, "my criterion")` when it is imported. An installed package
joins without a word in the spec: it names such a module as an entry point of `mmcompress.plugins`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mmcompress.errors import MissingPackage, PluginWarning, shorten, suggest_nearest


@dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """A package that the plain install lacks."""

    distribution: str
    """The name that pip installs it by."""
    extra: str = "compress"
    """The extra of this project that brings it."""


OPTIONAL_PACKAGES = {
    "pandas": OptionalPackage(distribution="pandas", extra="cluster"),
    "pyarrow": OptionalPackage(distribution="pyarrow", extra="cluster"),
    "altair": OptionalPackage(distribution="altair", extra="report"),
    "aiohttp": OptionalPackage(distribution="ray[default]"),
    "cachetools": OptionalPackage(distribution="cachetools"),
    "cmaes": OptionalPackage(distribution="cmaes"),
    "emoji": OptionalPackage(distribution="emoji"),
    "jiwer": OptionalPackage(distribution="jiwer"),
    "mlflow": OptionalPackage(distribution="mlflow-skinny", extra="track"),
    "open_clip": OptionalPackage(distribution="open_clip_torch"),
    "optuna": OptionalPackage(distribution="optuna"),
    "psycopg": OptionalPackage(distribution="psycopg[binary]", extra="postgresql"),
    "adlfs": OptionalPackage(distribution="adlfs", extra="azure"),
    "gcsfs": OptionalPackage(distribution="gcsfs", extra="gcs"),
    "s3fs": OptionalPackage(distribution="s3fs", extra="s3"),
    "ray": OptionalPackage(distribution="ray[default]"),
    "safetensors": OptionalPackage(distribution="safetensors"),
    "scipy": OptionalPackage(distribution="scipy"),
    "soundfile": OptionalPackage(distribution="soundfile", extra="audio"),
    "soxr": OptionalPackage(distribution="soxr", extra="audio"),
    "torch": OptionalPackage(distribution="torch"),
    "torchvision": OptionalPackage(distribution="torchvision"),
    "transformers": OptionalPackage(distribution="transformers"),
    "vl_convert": OptionalPackage(distribution="vl-convert-python", extra="report"),
}
"""Optional packages by the name that Python imports them by."""


def resolve_entry(target: str) -> Any:
    """Import and return what `module:attribute` names.

    Raises:
        MissingPackage: The module imports an optional package that is not installed.
    """
    module, attribute = target.split(":")
    with name_missing_packages():
        return getattr(importlib.import_module(module), attribute)


@contextmanager
def name_missing_packages() -> Iterator[None]:
    """Name the extra that brings a package, where an import in the block lacks it.

    Raises:
        MissingPackage: An optional package is not installed.
        ModuleNotFoundError: Any other module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = OPTIONAL_PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise MissingPackage(package.distribution, package.extra) from error


PLUGIN_GROUP = "mmcompress.plugins"
"""The group of entry points under which an installed package names its modules of plug-ins."""

_begun_groups: set[str] = set()
"""The groups whose modules are imported, or just being imported."""


def import_installed_plugins() -> None:
    """Import the modules that installed packages name as plug-ins, once in a process.

    They are imported only where a name is asked for that is not known, or where all names are. So a
    command that needs no plug-in does not wait for one.
    API: https://packaging.python.org/en/latest/specifications/entry-points/

    Warns:
        PluginWarning: A module can't be imported. The rest is usable.
    """
    if PLUGIN_GROUP in _begun_groups:
        return
    _begun_groups.add(PLUGIN_GROUP)
    for plugin in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        try:
            plugin.load()
        except Exception as error:  # a module of someone else's may raise anything
            package = plugin.dist.name if plugin.dist else "?"
            warnings.warn(
                f"the plug-in '{plugin.name}' of the package {package} can't be imported: "
                f"{type(error).__name__}: {error}",
                PluginWarning,
                stacklevel=2,
            )


@dataclass(frozen=True, kw_only=True)
class RegistryEntry:
    """One name at a plug point."""

    target: Any
    """`module:attribute` of the code, or the object itself."""
    about: str = ""
    """One line for people, as `mmcompress list` shows it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain data that validation asks for without importing the code."""


Row = tuple[Any, str] | tuple[Any, str, Mapping[str, Any]]
"""An entry as the tables below write it: target, about, and facts when there are any."""


def _make_entry(row: Row) -> RegistryEntry:
    """Make an entry of a row of a table."""
    facts = row[2] if len(row) == 3 else {}
    return RegistryEntry(target=row[0], about=row[1], facts=facts)


class Registry:
    """The names at one plug point."""

    def __init__(self, noun: str, entries: Mapping[str, Row]):
        """Make a plug point.

        Args:
            noun: The word for an entry in messages: "metric", "sampler".
            entries: The entries by name.
        """
        self.noun = noun
        self._entries = {name: _make_entry(row) for name, row in entries.items()}

    def add(self, name: str, target: Any, about: str = "", **facts: Any) -> None:
        """Add an entry.

        Args:
            name: The name that a spec uses.
            target: `module:attribute`, or the object itself.
            about: One line for people.
            facts: What validation asks of entries of this plug point (`needs` of a metric, say).

        Raises:
            ValueError: The name is taken by something else.
        """
        entry = RegistryEntry(target=target, about=about, facts=facts)
        existing = self._entries.get(name)
        if existing is not None and existing.target != target:
            raise ValueError(f"'{name}' names another {self.noun} already; choose another name")
        self._entries[name] = entry

    def list_names(self) -> tuple[str, ...]:
        """Return all names, those of installed plug-ins too."""
        import_installed_plugins()
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        """Return whether there is an entry of that name."""
        if not isinstance(name, str):
            return False
        if name not in self._entries:
            import_installed_plugins()
        return name in self._entries

    def get_about(self, name: str) -> str:
        """Return the line for people on an entry."""
        return self._entries[name].about

    def get_fact(self, name: str, key: str) -> Any:
        """Return one fact of an entry, None when it has none of that key."""
        return self._entries[name].facts.get(key)

    def find_problem(self, name: str) -> str | None:
        """Return what is wrong with a name, None when there is an entry of that name."""
        if name in self:
            return None
        return f"unknown {self.noun} '{shorten(name)}'; {suggest_nearest(name, self._entries)}"

    def get(self, name: str) -> Any:
        """Return the code behind a name.

        Raises:
            KeyError: There is no such entry; the message tells the nearest name.
        """
        problem = self.find_problem(name)
        if problem:
            raise KeyError(problem)
        target = self._entries[name].target
        return resolve_entry(target) if isinstance(target, str) else target


class MixtureRegistry(Registry):
    """A plug point whose entries can be added up: `fisher + 0.5 * magnitude`."""

    def __init__(self, noun: str, mix: str, *, entries: Mapping[str, Row]):
        """Make a plug point.

        Args:
            noun: The word for an entry in messages.
            mix: `module:attribute` of a function that makes one entry of a list of (weight, entry).
            entries: The entries by name.
        """
        super().__init__(noun, entries)
        self.mix = mix

    def _split_terms(self, name: str) -> list[tuple[str, str]]:
        """Split a mixture into its terms: (weight, entry), as they are written."""
        terms: list[tuple[str, str]] = []
        for term in str(name).split("+"):
            weight, star, entry = term.rpartition("*")
            terms.append((weight.strip() if star else "1", entry.strip()))
        return terms

    def find_problem(self, name: str) -> str | None:
        """Return what is wrong with a name or a mixture, None when nothing is."""
        for weight, entry in self._split_terms(name):
            unknown = super().find_problem(entry)
            if unknown:
                return unknown
            if not weight.replace(".", "", 1).isdigit() or float(weight) <= 0:
                return (
                    f"'{shorten(weight)}' is not a positive weight;"
                    " expected, say, fisher + 0.5 * magnitude"
                )
        return None

    def get(self, name: str) -> Any:
        """Return the code behind a name, or the mixture of several."""
        problem = self.find_problem(name)
        if problem:
            raise KeyError(problem)
        terms = self._split_terms(name)
        if len(terms) == 1:
            return super().get(terms[0][1])
        weighted: list[tuple[float, Callable[..., Any]]] = []
        for weight, entry in terms:
            weighted.append((float(weight), super().get(entry)))
        return resolve_entry(self.mix)(weighted)


IMPORTANCE = MixtureRegistry(
    "importance",
    "mmcompress.prune.importance.mixture:mix_criteria",
    entries={
        "fisher": (
            "mmcompress.prune.importance.gradients:score_by_fisher",
            "sum over pairs of the squared gradient of a unit's mask",
            {"takes_gradients": True},
        ),
        "taylor": (
            "mmcompress.prune.importance.gradients:score_by_taylor",
            "absolute mean gradient of a unit's mask",
            {"takes_gradients": True},
        ),
        "magnitude": (
            "mmcompress.prune.importance.norms:score_by_magnitude",
            "L2 norm of all weights of a unit, written and read",
        ),
        "activation": (
            "mmcompress.prune.importance.activations:score_by_activation",
            "weight norm times input norm (Wanda)",
        ),
        "fluctuation": (
            "mmcompress.prune.importance.activations:score_by_fluctuation",
            "weight norm times input variance (FLAP)",
        ),
        "reconstruction": (
            "mmcompress.prune.importance.reconstruction:score_by_reconstruction",
            "error of the block's output when the rest is refitted (ZipLM)",
        ),
        "magnitude_l1": (
            "mmcompress.prune.importance.norms:score_by_magnitude_l1",
            "L1 norm of the same weights",
        ),
        "movement": (
            "mmcompress.prune.importance.gradients:score_by_movement",
            "how far fine-tuning moves a unit away from zero",
            {"takes_gradients": True},
        ),
        "random": ("mmcompress.prune.importance.random:score_at_random", "the control"),
    },
)
"""Criteria that score the units of every block."""
ALLOCATIONS = Registry(
    "allocation",
    {
        "knapsack": (
            "mmcompress.search.allocation:allocate_by_knapsack",
            "least measured loss increase at the ratio of the group",
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
"""Ways to spread a ratio over the blocks of a group."""
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
        "drawn": (
            "mmcompress.data.drawn_inputs:DrawnInputs",
            "pictures, sounds or texts without meaning, for an export without data",
        ),
        "speech_folder": (
            "mmcompress.data.speech_folder:SpeechFolder",
            "the user's own recordings and transcripts, as LJSpeech lays them out",
        ),
        "text_lines": (
            "mmcompress.data.text_lines:TextLines",
            "the user's own texts, one a line",
        ),
    },
)
"""Sources of pairs of input and text."""
METRICS = Registry(
    "metric",
    {
        "retrieval": (
            "mmcompress.metrics.retrieval:score_retrieval",
            "R@1 image to text and text to image",
            {"needs": "compared_embeddings", "judges": "a node that compares two embeddings"},
        ),
        "wide_retrieval": (
            "mmcompress.metrics.retrieval:score_wide_retrieval",
            "R@5 and R@10 image to text and text to image",
            {"needs": "compared_embeddings", "judges": "a node that compares two embeddings"},
        ),
        "caption": (
            "mmcompress.metrics.caption:score_captions",
            "exact match of the pipeline's caption",
            {"needs": "final_texts", "judges": "a node that writes text"},
        ),
        "wer": (
            "mmcompress.metrics.wer:score_word_errors",
            "word error rate of what was heard",
            {"needs": "final_texts", "judges": "a node that writes text"},
        ),
        "endings": (
            "mmcompress.metrics.endings:score_endings",
            "share of texts that end by themselves",
            {"needs": "written_texts", "judges": "a node that writes text"},
        ),
        "agreement": (
            "mmcompress.metrics.agreement:score_agreement",
            "share of answers that are those of the dense pipeline",
            {"needs": "answers", "judges": "a node that writes or finds a text"},
        ),
        "embedding": (
            "mmcompress.metrics.embedding:score_embeddings",
            "R@1, among the dense ones, of embeddings that no join compares",
            {"needs": "unjoined_embeddings", "judges": "embeddings that no joining node reads"},
        ),
    },
)
"""Figures that answers are scored by."""
INPUT_TYPES = Registry(
    "type of input",
    {
        "image": ("mmcompress.runtime.input_types:IMAGE", "a picture"),
        "audio": ("mmcompress.runtime.input_types:AUDIO", "a sound"),
        "text": ("mmcompress.runtime.input_types:TEXT", "one text"),
    },
)
"""Types of value that a pipeline may be given."""
NODE_KINDS = Registry(
    "kind of node",
    {
        "image_encoder": ("mmcompress.kinds.image_encoder.entry:ENTRY", "a picture to vectors"),
        "audio_encoder": ("mmcompress.kinds.audio_encoder.entry:ENTRY", "a sound to vectors"),
        "text_encoder": ("mmcompress.kinds.text_encoder.entry:ENTRY", "texts to vectors"),
        "fusion_encoder": (
            "mmcompress.kinds.fusion_encoder.entry:ENTRY",
            "texts and the vectors of a picture to vectors and scores",
        ),
        "text_decoder": ("mmcompress.kinds.text_decoder.entry:ENTRY", "vectors to texts"),
        "nearest": ("mmcompress.kinds.nearest.entry:ENTRY", "the nearest of a few texts"),
        "similarity": ("mmcompress.kinds.similarity.entry:ENTRY", "how alike two embeddings are"),
        "lookup": ("mmcompress.kinds.lookup.entry:ENTRY", "the nearest text of a list"),
    },
)
"""What a node of the graph may be."""
FAMILIES = Registry(
    "model family",
    {
        "open_clip/image_encoder": (
            "mmcompress.models.families.open_clip:load_image_encoder",
            "ViT, CoCa, ModifiedResNet, timm ResNet, timm EfficientNet",
        ),
        "open_clip/text_decoder": (
            "mmcompress.models.families.open_clip:load_text_decoder",
            "CoCa",
        ),
        "open_clip/text_encoder": (
            "mmcompress.models.families.open_clip:load_text_encoder",
            "text towers",
        ),
        "transformers/image_encoder": (
            "mmcompress.models.families.transformers_encoders:load_image_encoder",
            "CLIP, SigLIP, ViT, DINOv2, BLIP, GIT, LLaVA, VisionEncoderDecoder",
        ),
        "transformers/text_encoder": (
            "mmcompress.models.families.transformers_encoders:load_text_encoder",
            "CLIP, SigLIP, BERT, MiniLM, RoBERTa",
        ),
        "transformers/audio_encoder": (
            "mmcompress.models.families.transformers_encoders:load_audio_encoder",
            "Whisper",
        ),
        "transformers/fusion_encoder": (
            "mmcompress.models.families.fusion_encoders:load_fusion_encoder",
            "BLIP's image-text matching",
        ),
        "transformers/text_decoder": (
            "mmcompress.models.families.transformers_decoders:load_text_decoder",
            "mBART, GPT-2, BERT, VisionEncoderDecoder, BLIP, Whisper, T5, GIT, LLaVA",
        ),
    },
)
"""Loaders of models, as `library/kind of node`."""
LIBRARY_REFERENCES = Registry(
    "library reference",
    {
        "open_clip/image_encoder": (
            "mmcompress.models.reference.open_clip:OpenClipImages",
            "open_clip's transform and encode_image",
        ),
        "open_clip/text_encoder": (
            "mmcompress.models.reference.open_clip:OpenClipTexts",
            "open_clip's tokenizer and encode_text",
        ),
        "transformers/image_encoder": (
            "mmcompress.models.reference.transformers:TransformersImages",
            "AutoImageProcessor and the model as it was saved",
        ),
        "transformers/audio_encoder": (
            "mmcompress.models.reference.transformers:TransformersSounds",
            "AutoFeatureExtractor and AutoModelForSpeechSeq2Seq",
        ),
        "transformers/text_encoder": (
            "mmcompress.models.reference.transformers:TransformersTexts",
            "AutoTokenizer, AutoModel and sentence-transformers' folders",
        ),
        "transformers/text_decoder": (
            "mmcompress.models.reference.transformers:TransformersDecoders",
            "generate of a decoder that reads another checkpoint's vectors",
        ),
        "transformers/fusion_encoder": (
            "mmcompress.models.reference.transformers:TransformersMatching",
            "AutoImageProcessor, AutoTokenizer and BlipForImageTextRetrieval",
        ),
    },
)
"""A library's own way from a raw input to an answer, as `library/kind of node`: what the dense
bundle is compared with."""
EXECUTORS = Registry(
    "executor",
    {
        "ray": (
            "mmcompress.search.ray_executor:RayExecutor",
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
"""Where trials run."""
PRECISIONS = Registry(
    "precision",
    {
        "fp32": ("mmcompress.quantize.schemes.fp32:FP32", "as trained"),
        "int8": (
            "mmcompress.quantize.schemes.dynamic:INT8",
            "dynamic, 7-bit weights per channel: right on any CPU",
        ),
        "int8_full": (
            "mmcompress.quantize.schemes.dynamic:INT8_FULL",
            "dynamic, 8-bit weights: for CPUs with VNNI alone",
        ),
        "uint8": ("mmcompress.quantize.schemes.dynamic:UINT8", "dynamic, asymmetric 8-bit weights"),
        "int8_static": (
            "mmcompress.quantize.schemes.static:INT8_STATIC",
            "ranges of activations from calibration data",
        ),
        "w8": (
            "mmcompress.quantize.schemes.weights_only:W8",
            "weights in 8 bits, in groups of 32; float between products",
        ),
        "w4": (
            "mmcompress.quantize.schemes.weights_only:W4",
            "weights in 4 bits, in groups of 32; float between products",
        ),
        "fp16": (
            "mmcompress.quantize.schemes.sixteen_bit:FP16",
            "half precision: half the size, faster where a device has it",
        ),
        "bf16": (
            "mmcompress.quantize.schemes.sixteen_bit:BF16",
            "weights alone, as bfloat16: half the size, no faster",
        ),
    },
)
"""Precisions that a node may be deployed in."""
PROVIDERS = Registry(
    "provider",
    {
        "cpu": (
            "mmcompress.runtime.providers:PROCESSOR",
            "the processor, by ONNX Runtime itself",
            {"distribution": "onnxruntime"},
        ),
        "openvino": (
            "mmcompress.runtime.providers:OPENVINO",
            "Intel processors (pip install onnxruntime-ep-openvino)",
            {"distribution": "onnxruntime-ep-openvino"},
        ),
        "cuda": (
            "mmcompress.runtime.providers:CUDA",
            "GPUs of Nvidia (onnxruntime-gpu in place of onnxruntime); not tried",
            {"distribution": "onnxruntime-gpu"},
        ),
        "tensorrt_rtx": (
            "mmcompress.runtime.providers:TENSORRT_RTX",
            "GPUs of Nvidia (pip install onnxruntime-ep-nv-tensorrt-rtx); not tried",
            {"distribution": "onnxruntime-ep-nv-tensorrt-rtx"},
        ),
        "coreml": (
            "mmcompress.runtime.providers:COREML",
            "Apple's processors, in ONNX Runtime on macOS; not tried",
            {"distribution": "onnxruntime"},
        ),
        "qnn": (
            "mmcompress.runtime.providers:QNN",
            "Qualcomm's processors (pip install onnxruntime-qnn); not tried",
            {"distribution": "onnxruntime-qnn"},
        ),
    },
)
"""Execution providers of ONNX Runtime that bundles run on (`mmcompress.runtime.providers`)."""
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
            "mmcompress.search.cma_sampler:make_cmaes",
            "CMA-ES over the ranges, choices at random",
        ),
        "random": ("mmcompress.search.samplers:make_random", "the control"),
    },
)
"""Samplers that propose the candidates of a search."""
TRACKERS = Registry(
    "tracker",
    {
        "mlflow": (
            "mmcompress.report.trackers.mlflow:open_mlflow",
            "an MLflow server: settings, figures, report and bundle",
        ),
    },
)
"""Servers that keep results (`mmcompress.report.trackers.base.OpenTracker`)."""
PIPELINE_TEMPLATES = Registry(
    "pipeline",
    {
        "clip_captioner": (
            "mmcompress.spec.pipeline_templates:CLIP_CAPTIONER",
            "image encoder, captioner and text encoder that come with the package",
        ),
        "retrieval": (
            "mmcompress.spec.pipeline_templates:RETRIEVAL",
            "image encoder and text encoder of an image search, that come with the package",
        ),
        "blip": (
            "mmcompress.spec.pipeline_templates:BLIP",
            "CLIP ViT-B/32 beside BLIP base, on your own photographs",
        ),
        "speech_search": (
            "mmcompress.spec.pipeline_templates:SPEECH_SEARCH",
            "Whisper, MiniLM and the nearest sentence of a list, on your own recordings",
        ),
    },
)
"""Pipelines that are shipped (`mmcompress.spec.pipeline_templates.PipelineTemplate`)."""

PLUG_POINTS = {
    "models": FAMILIES,
    "kinds": NODE_KINDS,
    "inputs": INPUT_TYPES,
    "importance": IMPORTANCE,
    "allocation": ALLOCATIONS,
    "data": DATA_KINDS,
    "metrics": METRICS,
    "executors": EXECUTORS,
    "samplers": SAMPLERS,
    "precisions": PRECISIONS,
    "providers": PROVIDERS,
    "pipelines": PIPELINE_TEMPLATES,
    "trackers": TRACKERS,
}
"""Every plug point, as `mmcompress list` names it."""
