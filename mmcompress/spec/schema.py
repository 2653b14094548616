"""The spec as frozen records. Each section's options are the fields below, with their defaults and bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from mmcompress.registry import (
    ALLOCATIONS,
    DATA_KINDS,
    EXECUTORS,
    IMPORTANCE,
    METRICS,
    NODE_KINDS,
    PRECISIONS,
    SAMPLERS,
)


def _within(low: float, high: float) -> dict[str, Callable[[float], str | None]]:
    return {"check": lambda v: None if low <= v <= high else f"must lie in {low:g} .. {high:g}"}


def _precision(name: str) -> str | None:
    return None if name == "auto" else PRECISIONS.problem(name)


@dataclass(frozen=True, kw_only=True)
class NodePrune:
    """Pruning ratios of one node: the share of its units removed. What is not given is searched."""

    heads: float = field(default=0.0, metadata=_within(0, 1))
    ffn: float = field(default=0.0, metadata=_within(0, 1))
    tokens: float = field(default=0.0, metadata=_within(0, 1))
    """Positions left out for every input: image patches, or the end of an audio encoder's window."""
    drop: int = field(default=0, metadata=_within(0, 1000))
    """Whole sub-layers removed, the least damaging first."""
    blocks: dict[str, float] = field(default_factory=dict)
    """Ratios of single blocks by name; they override the rest."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One model (or one joining step) of the pipeline. `inputs` maps ports to `node.port` or a pipeline input."""

    kind: str = field(metadata={"registry": NODE_KINDS})
    """A kind of node: see `mmcompress list kinds`."""
    inputs: dict[str, str]
    source: str = ""
    candidates: int = field(default=1, metadata=_within(1, 64))
    """Of a generator: the texts it writes for an input, and the beams it finds them with."""
    max_tokens: int = field(default=0, metadata=_within(0, 4096))
    """The longest text in tokens, written or read; 0: 20 for a generator, the tower's own length for a text tower."""
    prompt: str = ""
    """What a generator reads before it writes; of one with an image among its words, `USER: <image> ASSISTANT:`."""
    prior: float = field(default=0.0, metadata=_within(0, 1000))
    """Of a `nearest` node with `scores`: how much the generator's own score counts beside the similarity."""
    texts: str = ""
    """Of a `lookup`: a file with one text a line; without it, all reference texts of the data."""
    precision: str = field(default="auto", metadata={"check": _precision})
    """`auto` leaves it to the search."""
    rewind: str = ""
    """Where `prune.schedule: rewind` finds the weights of an earlier time of this model's training, as a `source`;
    without it, survivors start again from those of `source` itself."""
    prune: NodePrune = field(default_factory=NodePrune)


@dataclass(frozen=True, kw_only=True)
class Data:
    kind: str = field(metadata={"registry": DATA_KINDS})
    options: dict[str, Any] = field(default_factory=dict)
    calibration: int = field(default=256, metadata=_within(8, 1_000_000))
    """Training pairs for importance, damage, refit and device calibration."""
    sensitivity_pairs: int = field(default=128, metadata=_within(8, 1_000_000))
    """The first of the calibration pairs, that the damage of every single cut is measured on; at most all of them."""
    validation_pairs: int = field(default=256, metadata=_within(8, 1_000_000))
    """Pairs of the choosing split (`val`) each trial is judged on. The test split is never used to choose."""
    final_pairs_factor: int = field(default=3, metadata=_within(1, 1000))
    """How many times as many the best few trials are judged on, where there are so many (1: no more than the rest)."""
    labels: Literal["reference", "teacher"] = "reference"
    """What generators learn and are chosen by: the texts of the data, or what the dense pipeline itself writes. A text
    of another style than the model's own tells little of what a cut does."""
    batch: int = field(default=64, metadata=_within(1, 65_536))
    """Pairs run through the models at once; large models on large images need few."""
    report: tuple[str, ...] = ()
    """Further splits, measured and reported apart."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    importance: str = field(default="reconstruction", metadata={"registry": IMPORTANCE})
    allocation: str = field(default="knapsack", metadata={"registry": ALLOCATIONS})
    protection: float = field(default=2.0, metadata=_within(1, 100))
    """Cross-modal units are pruned this many times less."""
    schedule: Literal["one_shot", "gradual", "rewind", "late"] = "one_shot"
    """All cuts at once; over `rounds` of pruning and training, units scored anew in each; or so, and then the survivors
    trained once more from the weights they had at first, or earlier still (`nodes.*.rewind`). The training budget is
    shared among the rounds. `late`: the dense models are trained, then cut and refitted: the wrong way round, to
    compare with."""
    rounds: int = field(default=3, metadata=_within(2, 100))
    sparsity: float = field(default=0.0, metadata=_within(0, 0.99))
    """Share of single weights set to zero in what is left, smallest first; brings no speed on ONNX Runtime."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """Where those lie; 2:4 sets half of them to zero, whatever positive `sparsity` says."""
    sensitivity: Literal["measured", "estimated"] = "measured"
    """Of cutting a block: by running the pipeline with it cut, or as half the importance lost (fisher alone)."""
    refit: bool = True
    ridge: float = field(default=0.01, metadata=_within(1e-6, 10))
    """Of the refit, relative to the mean of the Gram diagonal."""


@dataclass(frozen=True)
class Quantize:
    max_loss_increase: float = field(default=0.0, metadata=_within(0, 1000))
    """A block whose rounding alone raises the pipeline's loss by more than this stays in fp32 (0: none is asked)."""


@dataclass(frozen=True, kw_only=True)
class Distill:
    steps: int = field(default=220, metadata=_within(0, 1_000_000))
    minutes: float = field(default=4.0, metadata=_within(0, 100_000))
    """A budget of wall time; the schedule ends with whichever comes first."""
    batch: int = field(default=24, metadata=_within(2, 65_536))
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of products and what they give while training, weights and losses being fp32; auto: bf16 where a product is
    measured to be quicker in it, which may double the steps a minute."""
    learning_rate: float = field(default=7e-4, metadata=_within(0, 1))
    """The highest of the schedule."""
    find_learning_rate: bool = True
    """Halve the rate while a few steps of it would make matters worse: structures that lost little are easily lost."""
    embedding: float = 1.0
    """This and what follows: weights of the losses of `distill/losses.py`, 0 turns one off; `contrast` and `caption`
    are the task's own, the others need the dense models."""
    tokens: float = 1.0
    affinity: float = 1.0
    contrast: float = 0.2
    caption: float = 1.0
    logits: float = 4.0
    hidden: float = 0.0
    """What every block adds to its stream, against the teacher's, relative to its variance; `cross`: of
    cross-attention alone."""
    cross: float = 0.0
    validations: int = field(default=4, metadata=_within(0, 1000))
    """How often the loss on choosing pairs is looked at; where the last weights are clearly worse than others seen,
    those are kept (0: always the last)."""
    patience: int = field(default=0, metadata=_within(0, 1000))
    """Checks in a row without a lower loss after which training ends early (0: it never does)."""
    distinct_pairs: int = 0
    """Distinct training pairs (0: fresh ones for every step, where the data has them)."""


@dataclass(frozen=True, kw_only=True)
class Search:
    trials: int = field(default=40, metadata=_within(0, 100_000))
    """Proposals of the sampler; splits of the budget, and what is judged for them, come on top."""
    level_switches: int = field(default=16, metadata=_within(0, 100_000))
    """Exchanges of units between blocks of the best structures, tried after that."""
    linearization_rounds: int = field(default=4, metadata=_within(0, 100))
    """Rounds before that in which the damage of every cut is measured anew among the others, and the budget split again
    (0: damage is taken to add up). They end early where they would take longer than twice the search."""
    sampler: str = field(default="tpe", metadata={"registry": SAMPLERS})
    executor: str = field(default="ray", metadata={"registry": EXECUTORS})
    workers: int = field(default=2, metadata=_within(1, 4096))
    """Trials at a time."""
    ray_address: str | None = None
    evaluator: Literal["measured", "estimated"] = "measured"
    """A trial's loss: by running the cut pipeline, or the sum of its blocks' damage: no model is run."""
    finalists: int = field(default=3, metadata=_within(1, 1000))
    """Trials within the budget that are judged on more pairs (`data.final_pairs_factor`) before one is chosen."""
    short_finetunings: int = field(default=5, metadata=_within(0, 100))
    """Structures trained for a tenth of the training budget each, where the best loss before training is so high that
    it says little (0: none)."""
    retries: int = field(default=1, metadata=_within(0, 10))
    """How often a trial that failed is tried again."""
    max_artifacts: int = field(default=2, metadata=_within(1, 10))
    """How often at most a structure is made: again when the finished artifact lies 5 % under the target, or misses it;
    a miss is tried again once even where this is 1."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds beside the latency target; what is not given is not bound."""

    params_m: float | None = field(default=None, metadata=_within(0, 1e6))
    """Parameters of all models, in millions."""
    size_mb: float | None = field(default=None, metadata=_within(0, 1e9))
    """Of the bundle."""
    memory_mb: float | None = field(default=None, metadata=_within(0, 1e9))
    """Peak resident memory of a process that loads the bundle and answers once."""
    node_ms: dict[str, float] = field(default_factory=dict)
    """p50 of single nodes."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    threads: int = field(default=2, metadata=_within(1, 1024))
    """Of every session, as the bundle is to be deployed."""
    parallel: bool = False
    """Whether nodes that don't read each other run at the same time, each on its own threads."""
    memory: bool = True
    """Whether the peak memory of both bundles is measured, each in a process of its own."""
    readings: str = ""
    """Readings of another device (a JSON of `mmcompress device measure`): the target is then for that one."""
    warmup: int = field(default=10, metadata=_within(0, 10_000))
    """Requests after loading that are not counted."""
    requests: int = field(default=200, metadata=_within(2, 100_000))
    """Requests to each side at least."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric that the result is judged by."""

    kind: str = field(metadata={"registry": METRICS})
    """A metric: see `mmcompress list metrics`."""
    of: str = ""
    """The node that it judges. Without it, the metric judges every node that it can."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A pipeline and how to compress it."""

    name: str
    inputs: dict[str, Literal["image", "audio", "text"]]
    nodes: dict[str, Node]
    outputs: dict[str, str]
    data: Data
    metrics: tuple[Metric, ...] = (Metric(kind="retrieval"), Metric(kind="caption"))
    target: str = "2x"
    """End to end: `2x`, `12ms`, `12ms p95`; several with commas between them share all but search and training."""
    limits: Limits = field(default_factory=Limits)
    prune: Prune = field(default_factory=Prune)
    quantize: Quantize = field(default_factory=Quantize)
    distill: Distill = field(default_factory=Distill)
    search: Search = field(default_factory=Search)
    measure: Measure = field(default_factory=Measure)
    plugins: tuple[str, ...] = ()
    seed: int = field(default=0, metadata=_within(0, 2**31))

    def model_nodes(self) -> dict[str, Node]:
        return {
            name: node for name, node in self.nodes.items() if NODE_KINDS.get(node.kind).is_model
        }
