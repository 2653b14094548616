"""What stages leave for each other and for the report: frozen records that survive a JSON round
trip."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mmcompress.graph.blocks import Block
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.stats import Latency, Quality


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One check of an artifact."""

    name: str
    """What is proved: `masked == sliced`, `torch == onnx`."""
    node: str
    """The node that it is about."""
    difference: float
    """The largest difference that was seen, relative to the scale of the values."""
    bound: float
    """The largest difference that is allowed."""
    passed: bool
    """Whether the difference stayed within the bound."""
    detail: str = ""
    """Which graph or which input it was, when there are several."""
    artifact: str = ""
    """What is proved: the dense pipeline, the compressed one, or a random cut."""


SHOWN_CHARACTERS = 40
"""Characters of an answer that a message shows."""


def shorten_text(text: str) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


BoundKind = Literal["p50", "p95", "parameters", "size", "memory"]
"""What a bound limits: a statistic of the latency, or a size."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A limit, and what is measured or predicted of the thing that it limits."""

    kind: BoundKind
    """What is limited."""
    node: str = ""
    """The node that is limited; empty: the whole pipeline."""
    value: float
    """In `unit`: what is measured, or predicted."""
    limit: float
    """In `unit`: the most that is allowed."""
    unit: Literal["ms", "M", "MB"]
    """Unit of both figures: milliseconds, millions, or megabytes."""

    @property
    def is_exceeded(self) -> bool:
        """Whether the value lies above the limit."""
        return self.value > self.limit

    @property
    def is_latency(self) -> bool:
        """Whether a latency is limited: it changes with the speed of the machine."""
        return self.kind in ("p50", "p95")

    @property
    def name(self) -> str:
        """What is limited, in words: `p50 end to end`, `p50 of 'vision'`, `size`."""
        if self.node:
            return f"{self.kind} of '{self.node}'"
        return f"{self.kind} end to end" if self.is_latency else self.kind

    def limits_same_thing(self, other: Bound) -> bool:
        """Return whether both bounds are of one kind and one node."""
        return self.kind == other.kind and self.node == other.node

    def describe_miss(self) -> str:
        """Return what there is and what was asked for, in words."""
        return f"{self.name}: {self.value:.2f} {self.unit}, asked for {self.limit:.2f}"


LEVEL_SWITCH_ORIGIN = "mutation"
"""`Trial.origin` of a candidate that switches one level of the best; journals hold this word."""

ORIGIN_NAMES = {
    "sampler": "proposed by the sampler",
    "knapsack": "split of the budget",
    LEVEL_SWITCH_ORIGIN: "level switch of the best structure",
    "filled": "grown up to the budget",
    "adjusted": "adjusted to the budget",
}
"""Origins of trials, for a person."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluated candidate."""

    number: int
    """Number of the trial in the study."""
    origin: str
    """Where the candidate comes from: `sampler`, `knapsack`, `mutation`, `filled`, ..."""
    overrides: dict[str, Any]
    """The keys of the spec that give back exactly this candidate."""
    candidate: Candidate
    """The structure, and the precision of each node."""
    latency_ms: float
    """Predicted milliseconds of a request."""
    loss: float
    """The pipeline's own loss on validation pairs; lower is better."""
    quality: dict[str, float]
    """Figures of quality on the same pairs."""
    evaluation_seconds: float
    """Seconds that a worker took."""
    worker: str = ""
    """The worker, as host and process."""

    @property
    def origin_name(self) -> str:
        """Where the candidate comes from, for a person."""
        return ORIGIN_NAMES.get(self.origin, self.origin)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Random structures of a pipeline, predicted and measured whole."""

    pipeline: str
    """Name of the pipeline."""
    mean_absolute_error: float
    """Mean of |predicted / measured - 1|."""
    spearman: float
    """Rank correlation of predicted and measured latencies."""
    predicted_ms: tuple[float, ...]
    """Predicted milliseconds of a request, by structure."""
    measured_ms: tuple[float, ...]
    """Measured milliseconds of a request, by structure."""
    cpu: dict[str, Any]
    """The processor that they were measured on."""
    commit: str = ""
    """The commit of mmcompress."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that matter."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A structure that was exported and measured before anything was trained."""

    predicted_ms: float
    """Predicted milliseconds of a request."""
    measured_ms: float
    """Measured milliseconds of a request."""
    target_ms: float
    """Milliseconds that a request may take."""
    margin: float = 0.0
    """Relative error that the measurement may have."""
    node_ratios: dict[str, float] = field(default_factory=dict)
    """p50 of each node over the p50 of the same dense node, measured in turn with it."""


@dataclass(frozen=True, kw_only=True)
class NodeResult:
    """One model of the pipeline as deployed."""

    latency_ms_p50: float
    """Median milliseconds of a request in this node."""
    params: int
    """Parameters."""
    macs: int
    """Multiply-accumulates of a request."""
    size_mb: float
    """MB of its files."""
    precision: str
    """Precision of its weights and products."""
    unimodal_ratio: float | None
    """Share removed of its unimodal units; None when it has none."""
    cross_modal_ratio: float | None
    """Share removed of its cross-modal units; None when it has none."""
    sparsity: float = 0.0
    """Share of zeros among the weights of its blocks."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of the comparison: the dense pipeline, or what was made of it."""

    latency_ms: Latency
    """Milliseconds of a request, end to end."""
    quality: dict[str, Quality]
    """Figures of quality on the test split."""
    size_mb: float
    """MB of the bundle."""
    params: int
    """Parameters of all models."""
    nodes: dict[str, NodeResult]
    """Each model by name."""
    model_share: float
    """Share of the time of a request that is spent inside model sessions."""
    memory_mb: float = 0.0
    """Peak resident MB of a process that loads the bundle and answers once; 0 when it was not
    measured."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What was asked for, whether it is met, and what could be reached."""

    latency_ms: float
    """Milliseconds that a request may take."""
    speedup: float
    """Latency of the dense pipeline over that."""
    met: bool
    """Whether the result keeps the target and every limit."""
    text: str = ""
    """The target as the spec says it."""
    statistic: str = "p50"
    """The statistic that counts: p50 or p95."""
    floor_ms: float = 0.0
    """Lowest latency that is predicted of anything in the search space."""
    fixed_ms: float = 0.0
    """The part of `floor_ms` that no prunable block accounts for."""
    latency_ms_p50: float | None = None
    """The same as `latency_ms` when the target is a median, else None."""
    exceeded_bounds: tuple[Bound, ...] = ()
    """Every bound that the result exceeds, with what was measured."""
    fixed_ms_by_node: dict[str, float] = field(default_factory=dict)
    """What each node has of `fixed_ms`."""
    lowest_reachable: tuple[Bound, ...] = ()
    """Every limit beside the target; its value is the least that is predicted of anything in the
    search space."""

    undetermined_limits: tuple[BoundKind, ...] = ()
    """Limits whose measurement failed: nobody knows whether the result keeps them. `met` is about
    all others."""

    def describe_undetermined(self) -> tuple[str, ...]:
        """Return every limit that could not be judged, in words."""
        return tuple(
            f"the limit of {kind} is undetermined: its measurement failed"
            for kind in self.undetermined_limits
        )

    def describe_misses(self) -> tuple[str, ...]:
        """Return every bound that the result exceeds, in words."""
        return tuple(bound.describe_miss() for bound in self.exceeded_bounds)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """How much was searched."""

    trials: int
    """Distinct candidates that were evaluated."""
    feasible: int
    """Those of them that are predicted to meet the target."""
    failed: int
    """Trials that raised an error."""
    seconds: float
    """Seconds of searching."""
    workers: dict[str, int] = field(default_factory=dict)
    """Trials by worker."""
    split_losses: tuple[float, ...] = ()
    """Least loss of a split of the budget, round by round; loss increases were measured again in
    between."""
    linearization_evaluations: int = 0
    """Structures that were evaluated for these rounds."""


LONG_INPUTS = "test inputs longer than the window"
"""Name in `Summary.extra_splits` of what the dense encoder hears in several windows."""


@dataclass(frozen=True, kw_only=True)
class ShownInput:
    """An input as a report shows it."""

    media: str = ""
    """The picture or the sound, as a URL that holds its content; empty: it is not shown."""
    peaks: tuple[float, ...] = ()
    """Loudest samples of the pieces of a sound, in order, 0..1."""
    seconds: float = 0.0
    """Seconds of the whole sound."""
    shown_seconds: float = 0.0
    """Seconds of it that can be played."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An input of the test split with what both sides wrote."""

    reference: str
    """The reference text."""
    baseline: str
    """The text of the dense pipeline."""
    compressed: str
    """The text of the compressed one."""
    shown: ShownInput = field(default_factory=ShownInput)
    """The input itself."""

    @property
    def is_changed(self) -> bool:
        """Whether both sides wrote different texts."""
        return self.baseline != self.compressed

    @property
    def rank(self) -> int:
        """Place among samples: 0 for a right answer that was lost, 1 for another change, 2 for
        none."""
        if not self.is_changed:
            return 2
        return 0 if self.baseline == self.reference else 1


RECALL_SUFFIX = re.compile(r"_r(\d+)$")
"""End of the name of a share of queries whose right key is among the first few."""


def is_at_chance(metric: str, quality: Quality) -> bool:
    """Return whether a figure may be that of guessing.

    Nothing right is no better. Of a recall among the first k of n keys, guessing gives k / n: it
    may be that when the interval holds it.
    """
    recall = RECALL_SUFFIX.search(metric)
    if recall is None or not quality.n:
        return quality.share_right <= 0
    return quality.low <= int(recall[1]) / quality.n


MAX_UNINFORMATIVE_SHARE = 0.9
"""Share of the dense answers of a node that are empty or one and the same text. From this share on,
no metric of its texts tells what was lost: nearly any change leaves such answers as they are."""

MENTIONED_ALIKE_SHARE = 0.01
"""Share of equal answers up to which a report does not mention them: a few inputs are alike."""


@dataclass(frozen=True, kw_only=True)
class AnswerCounts:
    """What the answers of one node look like over the test split: texts, or embeddings."""

    inputs: int
    """Inputs that were answered."""
    empty: int
    """Answers that are empty."""
    alike: int
    """Answers that are the most frequent text, or embeddings of one direction; 0 when all differ.
    """
    example: str
    """That text; empty for embeddings."""
    judged: bool
    """Whether a metric judges the answers of this node."""

    @property
    def uninformative_share(self) -> float:
        """The share of the answers that is empty or the most frequent text, 0..1."""
        return (self.empty + self.alike) / max(self.inputs, 1)

    @property
    def is_uninformative(self) -> bool:
        """Whether the answers are judged though they tell nothing."""
        return self.judged and self.uninformative_share >= MAX_UNINFORMATIVE_SHARE

    @property
    def is_worth_mention(self) -> bool:
        """Whether some answers are empty, or more of them are equal than a few alike inputs ask
        for."""
        return bool(self.empty) or self.uninformative_share > MENTIONED_ALIKE_SHARE

    def describe(self) -> str:
        """Return the counts in words."""
        text = f"{self.empty} of {self.inputs} answers are empty"
        if self.alike:
            text += f", {self.alike} are equal to one another"
        if self.example:
            text += f" ({shorten_text(self.example)!r})"
        return text


RETAINED_LIMIT = "limits.retained"
"""The key of a spec that asks for a share of the dense quality; its name in `Summary.skipped`."""


@dataclass(frozen=True, kw_only=True)
class SlowerTarget:
    """A slower target that a run went on with, since too little quality was kept."""

    target: str
    """The target, as a spec says it."""
    folder: str
    """Name of its run folder, in the folder that the targets share."""
    speedup: float
    """Median latency of the dense pipeline over that of the compressed one."""
    met: bool
    """Whether its own target and every upper limit are kept."""
    choosing: Quality
    """Share of the dense quality that it keeps, on the validation split."""


@dataclass(frozen=True, kw_only=True)
class RetainedCheck:
    """Whether a finished artifact keeps the share of the dense quality that was asked for."""

    limit: float
    """`limits.retained`: the share that must be kept, 0..1."""
    choosing: Quality
    """Share that is kept on the validation split, of the worst metric. It decides."""
    test: Quality
    """The same on the test split. It decides nothing."""
    slower: tuple[SlowerTarget, ...] = ()
    """The slower targets that the run went on with."""

    @property
    def is_kept(self) -> bool:
        """Whether as much is kept on the validation split as was asked for."""
        return self.choosing.value >= self.limit

    def describe_test(self) -> str:
        """Return whether the limit held on the test split, in words."""
        if self.test.n == 0:
            return "no metric has a figure there"
        if self.test.low >= self.limit:
            return "it held"
        if self.test.high < self.limit:
            return "it did not hold"
        return f"whether it held can't be told at n = {self.test.n}"


@dataclass(frozen=True, kw_only=True)
class DecodeSteps:
    """How much one generator writes at the end of a run, and how quickly."""

    dense: float
    """Mean decode steps of a request to the dense pipeline."""
    compressed: float
    """The same of the compressed one."""
    ratio: float
    """p50 of the node for the steps of the dense pipeline / p50 of the dense node."""
    fitted_ratio: float | None = None
    """The same as measured before the training; None where this structure was not measured then."""

    @property
    def more_tokens(self) -> float:
        """Share of tokens that it writes more than the dense one; negative: fewer."""
        return self.compressed / self.dense - 1

    @property
    def slower_step(self) -> float | None:
        """Share of time that a step takes longer than before the training; negative: less."""
        return self.ratio / self.fitted_ratio - 1 if self.fitted_ratio else None

    def describe(self) -> str:
        """Return both shares in words, apart from each other."""
        amount = "more" if self.more_tokens >= 0 else "fewer"
        text = f"writes {abs(self.more_tokens):.1%} {amount} tokens than the dense one"
        if self.slower_step is not None:
            pace = "longer" if self.slower_step >= 0 else "less long"
            text += (
                f", and a step takes {abs(self.slower_step):.1%} {pace} than before the training"
            )
        return text


@dataclass(frozen=True, kw_only=True)
class FreeWriting:
    """What it costs that a finished pipeline writes freely.

    Structures are measured before the training while they write what the dense pipeline wrote.
    """

    latency_factor: float = 1.0
    """Measured latency / latency where the artifact takes the decode steps of the dense
    pipeline."""
    margin: float = 0.0
    """Share that the factor may be off by on other requests: the half-width of its interval of
    95 % over requests."""
    nodes: dict[str, DecodeSteps] = field(default_factory=dict)
    """Decode steps by generator."""


@dataclass(frozen=True, kw_only=True)
class ArtifactRecord:
    """One artifact that was made for a target, and what became of it."""

    identity: str
    """Digest of its weights. An artifact that is measured again keeps its record."""
    candidate: Candidate
    """Units kept, and the precision of each node."""
    loss: float | None
    """The pipeline's own loss on validation pairs at the end of its training; None where it was
    not taken."""
    trained_steps: int
    """Training steps, with those of the artifact that it went on from."""
    target_share: float | None = None
    """Measured latency / target; None where its proof failed and nothing was measured."""
    speedup: float | None = None
    """Median latency of the dense pipeline over its own; None where nothing was measured."""
    margin: float = 0.0
    """Share that the ratio of the two latencies may be off by."""
    met: bool = False
    """Whether it keeps the target and every limit."""
    writing: FreeWriting = field(default_factory=FreeWriting)
    """Decode steps of both sides."""
    is_kept: bool = False
    """Whether it is the artifact of the run folder."""
    reason: str = ""
    """Why it was kept or not."""


@dataclass(frozen=True, kw_only=True)
class ArtifactJournal:
    """`artifacts.json`: the finished artifacts of a target, in the order they were made."""

    artifacts: tuple[ArtifactRecord, ...]
    """One record for each."""


TrainingEnd = Literal["steps", "minutes", "patience", "convergence"]
"""What ended a training."""


@dataclass(frozen=True, kw_only=True)
class ValidationFigure:
    """A figure of quality on validation pairs, where texts are given token by token."""

    name: str
    """What it measures; higher is better."""
    dense: float
    """That of the dense pipeline."""
    before: float
    """That of the pruned one before its last training."""
    after: float | None = None
    """That of the pruned one after it; None until it has ended."""


@dataclass(frozen=True, kw_only=True)
class ValidationQuality:
    """`validation_quality.json`: what the metrics that people know say of a training."""

    figures: tuple[ValidationFigure, ...]
    """One for each metric of each node."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How long an artifact was trained, and what more training is expected to bring."""

    asked_steps: int
    """Steps that the spec asks for, over all rounds."""
    steps: int
    """Steps that were trained, over all rounds."""
    seconds: float
    """Seconds that they took, with validations."""
    learning_rate: float
    """The highest learning rate of the last round."""
    ended_by: TrainingEnd
    """What ended the last round. `patience`: the loss on validation pairs no longer fell.
    `convergence`: twice the steps lowered it by less than a tenth."""
    loss: float | None
    """Loss on validation pairs after training; None where it was not measured."""
    dense_loss: float | None
    """Loss of the dense pipeline on the same pairs."""
    loss_of_twice_the_steps: float | None
    """The loss that twice the steps are predicted to bring."""
    quality: tuple[ValidationFigure, ...] = ()
    """Quality on the same pairs before and after the last round."""

    def describe(self) -> str:
        """Return the result in words."""
        text = f"{self.steps:,} of {self.asked_steps:,} steps in {self.seconds / 60:.1f} minutes"
        reasons = {
            "steps": "the steps ended it",
            "minutes": "the minutes ended it (distill.minutes)",
            "patience": "it no longer helped (distill.patience)",
            "convergence": "more steps no longer help",
        }
        text += f", at a learning rate of {self.learning_rate:.2g}; {reasons[self.ended_by]}."
        if self.loss is not None and self.loss_of_twice_the_steps is not None:
            text += (
                f" Loss on validation pairs: {self.loss:.3f}, of the dense pipeline "
                f"{self.dense_loss:.3f}."
            )
            # Below the dense loss there is nothing to predict by.
            if self.loss_of_twice_the_steps < self.loss:
                text += (
                    f" Twice the steps are expected to bring {self.loss_of_twice_the_steps:.3f}."
                )
        return text


@dataclass(frozen=True, kw_only=True)
class PositionCut:
    """How much shorter the input of a node became."""

    kept: int
    """Positions that are kept."""
    of: int
    """Positions of the dense model."""


SUMMARY_FORMAT = 1
"""The format of `summary.json`. It grows when a key changes its meaning, not when one is added."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """`summary.json`: everything that the report shows."""

    format: int = SUMMARY_FORMAT
    """The format of this record."""
    pipeline: str
    """Name of the pipeline."""
    target: Target
    """What was asked for, and whether it is met."""
    baseline: Side
    """The dense pipeline."""
    compressed: Side
    """What was made of it."""
    speedup: float
    """Median latency of the dense pipeline over that of the compressed one."""
    quality_retained: float
    """The smallest ratio of compressed to dense over all figures of quality."""
    predicted_latency_ms_p50: float
    """Median latency that was predicted of the structure."""
    unimodal_ratio: float
    """Share removed of all unimodal units, by the weights that they carry."""
    cross_modal_ratio: float | None
    """Share removed of all cross-modal units; None when there are none."""
    kept_units: dict[str, KeptUnits]
    """Units kept, by node and block."""
    blocks: dict[str, tuple[Block, ...]]
    """The prunable blocks of the dense models."""
    cross_modal_reasons: dict[str, dict[str, str]]
    """Why a block is cross-modal, by node and block."""
    proofs: tuple[Proof, ...]
    """Every proof of both bundles."""
    search: SearchResult
    """How much was searched."""
    trials: tuple[Trial, ...]
    """Every distinct candidate that was evaluated."""
    warnings: tuple[str, ...]
    """What a reader should know before trusting the result."""
    timings: dict[str, float]
    """Seconds of each stage."""
    settings: dict[str, Any]
    """The spec as plain data."""
    versions: dict[str, str]
    """Versions of the packages that matter."""
    cpu: dict[str, Any]
    """The processor that the latencies are of."""
    seed: int
    """Seed of data, search and training."""
    commit: str
    """The commit of mmcompress, marked when the checkout was changed."""
    command: str
    """The command that made this."""
    device: str = ""
    """Fingerprint of the device that the latencies are of. Those of no samples (n = 0) are
    predicted, not measured."""
    peak_memory_mb: float = 0.0
    """Peak resident MB of the process that drove the run; workers come on top."""
    touched_bounds: tuple[str, ...] = ()
    """Dimensions of the search space whose upper end the structure has reached."""
    training: TrainingResult | None = None
    """How long the artifact was trained; None where it was not."""
    validation_losses: tuple[float, ...] = ()
    """The pipeline's own loss on validation pairs: dense, before training, on the way, and at the
    end."""
    samples: tuple[Sample, ...] = ()
    """A few inputs of the test split with what both sides wrote, changed ones first."""
    extra_splits: dict[str, dict[str, dict[str, Quality]]] = field(default_factory=dict)
    """Quality on further splits: split, side, figure."""
    artifacts: tuple[ArtifactRecord, ...] = ()
    """Every artifact that was made for the target, also those that were not kept."""
    attempts: tuple[Attempt, ...] = ()
    """Structures that were measured whole on the way to this one, in order."""
    bench_repeats: int = 0
    """Parts in which the latency of both sides was measured."""
    latency_margin: float = 0.0
    """Share that the ratio of the two latencies may be off by: the half-width of its interval of
    95 % over the loads of both bundles."""
    machine_speed_factor: float = 1.0
    """Factor from the measured latency ratio to what it is on this machine in the long run. Whole
    pipelines of the same precisions, measured now and all through the run, show it. 1 when none was
    measured."""
    retained: RetainedCheck | None = None
    """Whether enough of the dense quality is kept; None where no limit was asked for."""
    writing: FreeWriting = field(default_factory=FreeWriting)
    """What it costs that generators write freely, and how much each writes."""
    aimed_share: float = 1.0
    """Share of the target that the structure was chosen for."""
    choice_reason: str = ""
    """Why the structure was chosen, also where another one has less loss."""
    dense_answers: dict[str, AnswerCounts] = field(default_factory=dict)
    """How many answers of the dense pipeline are empty or equal to one another, by node."""
    compressed_answers: dict[str, AnswerCounts] = field(default_factory=dict)
    """The same of the compressed pipeline."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What the spec asks for and went wrong after the training, with the reason: a metric that
    failed, a further split, the memory. A resumed run tries it again."""

    time_cuts: tuple[str, ...] = ()
    """What was done less of than the spec asks for, so that the run ended in time."""

    @property
    def is_target_within_margin(self) -> bool:
        """Whether the latency lies nearer to the target than it may be off by.

        Another measurement may then end on the other side of it. Other limits are not looked at.
        """
        measured_ms: float = getattr(self.compressed.latency_ms, self.target.statistic)
        return abs(measured_ms / self.target.latency_ms - 1) < self.latency_margin

    @property
    def undetermined_nodes(self) -> tuple[str, ...]:
        """The nodes whose dense answers tell too little for quality to be determined."""
        return tuple(name for name, counts in self.dense_answers.items() if counts.is_uninformative)

    @property
    def position_cuts(self) -> dict[str, PositionCut]:
        """The nodes whose inputs became shorter, such as a shorter window of sound.

        They carry no weights, so no share of removed units shows them.
        """
        cuts: dict[str, PositionCut] = {}
        for node_name, blocks in self.blocks.items():
            for block in blocks:
                kept = self.kept_units.get(node_name, {}).get(block.name, block.units)
                if block.group == "tokens" and kept < block.units:
                    cuts[node_name] = PositionCut(kept=kept, of=block.units)
        return cuts

    @property
    def has_answers_worth_mention(self) -> bool:
        """Whether some answers of either side are empty, or too many are equal to one another."""
        counts = [*self.dense_answers.values(), *self.compressed_answers.values()]
        return any(each.is_worth_mention for each in counts)

    @property
    def determined_quality(self) -> float | None:
        """`quality_retained`, or None where it is undetermined."""
        return None if self.describe_undetermined() else self.quality_retained

    @property
    def is_dense_at_chance(self) -> bool:
        """Whether the dense pipeline gets no more right than guessing would, by every metric."""
        figures = self.baseline.quality
        return bool(figures) and all(
            is_at_chance(metric, quality) for metric, quality in figures.items()
        )

    def describe_undetermined(self) -> tuple[str, ...]:
        """Return why quality is undetermined, in words; empty when it is determined."""
        reasons: list[str] = []
        if self.skipped and not self.compressed.quality:
            reasons.append("the quality is undetermined: no metric gave a figure")
        for name in self.undetermined_nodes:
            counts = self.dense_answers[name].describe()
            reasons.append(f"the quality of '{name}' is undetermined: {counts}")
        return tuple(reasons)
