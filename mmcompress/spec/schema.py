"""The schema of a spec: every section as a frozen record, every key with its unit, meaning, default
and bounds.

`mmcompress schema` prints it as JSON Schema. The string under a field is what an editor shows of
it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema

from mmcompress.registry import (
    ALLOCATIONS,
    DATA_KINDS,
    EXECUTORS,
    IMPORTANCE,
    INPUT_TYPES,
    METRICS,
    NODE_KINDS,
    PRECISIONS,
    PROVIDERS,
    SAMPLERS,
    Registry,
)
from mmcompress.spec.node_options import OptionValue, list_all_options, list_options, sort_keys
from mmcompress.storage import HOLDS_OTHER_KEYS, add_error_details, make_error_details

Value = TypeVar("Value", int, float, str)
"""The type of an option."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A share, 0 to 1."""
PairCount = Annotated[int, Field(ge=8, le=1_000_000)]
"""A number of pairs of input and text."""
LossWeight = Annotated[float, Field(ge=0, le=1e6)]
"""The weight of a loss; 0 turns it off."""


def make_name_check(registry: Registry) -> Callable[[str], str]:
    """Return a check that a name stands in a registry."""

    def check(name: str) -> str:
        problem = registry.find_problem(name)
        if problem:
            raise ValueError(problem)
        return name

    return check


def _check_precision(name: str) -> str:
    """Check the precision of a node: a known one, or `auto`."""
    return name if name == "auto" else make_name_check(PRECISIONS)(name)


@dataclass(frozen=True, kw_only=True)
class NodePrune:
    """How much of one node is removed. What is not given is left to the search."""

    heads: Share = 0.0
    """Share of the attention heads that is removed."""
    ffn: Share = 0.0
    """Share of the FFN channels that is removed; of a CNN, of the inner channels of its
    convolutions."""
    tokens: Share = 0.0
    """Share of the positions that is left out for every input: image patches, or the end of an
    audio window."""
    drop: Annotated[int, Field(ge=0, le=1000)] = 0
    """Whole sub-layers that are removed, the least sensitive first."""
    blocks: dict[str, float] = field(default_factory=dict)
    """Share removed of single blocks, by name (`0.ffn`); it overrides the other keys for these
    blocks."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One model of the pipeline, or one node that joins the outputs of models."""

    kind: Annotated[str, AfterValidator(make_name_check(NODE_KINDS))]
    """The kind of node: see `mmcompress list kinds`."""
    inputs: dict[str, str]
    """What each input port reads: `node.port`, or the name of a pipeline input."""
    source: str = ""
    """Where the weights come from: a folder, `embedded:NAME`, `pip:NAME`, `python:MODULE:FUNCTION`,
    `open_clip:NAME@TAG@REVISION`, or a model of the hub: `transformers:NAME@REVISION` and
    `hf-hub:NAME@REVISION` (open_clip's). A revision is a branch, a tag or a commit of the hub;
    without it, the main branch counts. A run keeps the commit."""
    precision: Annotated[str, AfterValidator(_check_precision)] = "auto"
    """Precision of the weights and products: see `mmcompress list precisions`. `auto` leaves it to
    the search."""
    rewind: str = ""
    """Where `prune.schedule: rewind` finds the weights of an earlier time of this model's training,
    as a `source`. Without it, survivors start again from the weights of `source`."""
    prune: NodePrune = field(default_factory=NodePrune)
    """How much of this node is removed."""
    options: dict[str, OptionValue] = field(default_factory=dict, metadata={HOLDS_OTHER_KEYS: True})
    """Values of the options that its kind has, by name. In a spec, they stand beside the keys
    above."""

    def get_option(self, name: str, default: Value) -> Value:
        """Return the value of an option of its kind.

        Args:
            name: The option.
            default: The value for kinds that have no such option.
        """
        value: object = self.options.get(name)
        if value is None:
            known = list_options(self.kind)
            value = known[name].default if name in known else default
        return cast(Value, value)

    @model_validator(mode="wrap")
    @classmethod
    def _take_options(cls, data: object, make_node: ModelWrapValidatorHandler[Node]) -> Node:
        """Make a node of plain data, whose keys are those of every node and those of its kind."""
        if not isinstance(data, dict):
            return make_node(data)
        keys = sort_keys(data, COMMON_NODE_KEYS)
        details = [make_error_details(key, message) for key, message in keys.problems.items()]
        try:
            node = make_node({**keys.common, "options": keys.options})
        except ValidationError as error:
            raise add_error_details(error, details) from None
        if details:
            raise ValidationError.from_exception_data(cls.__name__, details)
        return node

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON Schema of a node, with the options of every kind."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        del schema["properties"]["options"]
        for name, option in list_all_options().items():
            schema["properties"][name] = option.describe()
        return schema


WHOLE_REQUEST = "pair"
"""`measure.request` of requests that hold every input of the pipeline."""

COMMON_NODE_KEYS = tuple(key.name for key in fields(Node) if key.name != "options")
"""Keys that every node of a spec may have."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pairs of input and text that the pipeline is compressed and judged with."""

    kind: Annotated[str, AfterValidator(make_name_check(DATA_KINDS))]
    """The kind of data: see `mmcompress list data`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the kind of data, such as `path`."""
    calibration: PairCount = 256
    """Training pairs for importance, sensitivity, refit and calibration."""
    sensitivity_pairs: PairCount = 128
    """Calibration pairs, the first ones, that the loss increase of every single cut is measured
    on."""
    validation_pairs: PairCount = 256
    """Pairs of the split `val` that each trial is evaluated on. The test split is never used to
    choose."""
    final_pairs_factor: Annotated[int, Field(ge=1, le=1000)] = 3
    """Factor from `validation_pairs` to the pairs that the best few trials are evaluated on, as far
    as the data goes."""
    labels: Literal["reference", "teacher"] = "reference"
    """What generators learn and are chosen by: the texts of the data, or what the dense pipeline
    itself writes. A text in another style than the model's own tells little of what a cut does."""
    batch: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Pairs that run through the models at once. Large models on large images need few."""
    report: tuple[str, ...] = ()
    """Further splits that the result is measured on and reported for, apart from the test split."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """How units are scored, chosen and removed."""

    importance: Annotated[str, AfterValidator(make_name_check(IMPORTANCE))] = "reconstruction"
    """The criterion that scores units, or a mixture (`fisher + 0.5 * magnitude`): see `mmcompress
    list importance`."""
    allocation: Annotated[str, AfterValidator(make_name_check(ALLOCATIONS))] = "knapsack"
    """How the cuts of a group are dealt to its blocks: see `mmcompress list allocation`."""
    protection: Annotated[float, Field(ge=1, le=100)] = 2.0
    """Factor by which cross-modal units are pruned less than the others."""
    schedule: Literal["one_shot", "gradual", "rewind", "late"] = "one_shot"
    """`one_shot` makes all cuts at once. `gradual` prunes and trains in `rounds`, and scores units
    anew in each. `rewind` does so, then trains the survivors again from their first weights (or
    `nodes.*.rewind`). `late` trains the dense models first and cuts then, to compare with. All
    share one training budget."""
    rounds: Annotated[int, Field(ge=2, le=100)] = 3
    """Rounds of pruning and training of the schedules `gradual` and `rewind`."""
    sparsity: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    """Share of single weights that is set to zero in what is left, the smallest first. ONNX Runtime
    gains no speed."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """Where the zeros lie. `2:4` sets half of the weights to zero, whatever positive `sparsity`
    says."""
    sensitivity: Literal["measured", "estimated"] = "measured"
    """How the loss increase of a cut is found: by running the pipeline with it, or as half the
    importance that is lost (for `importance: fisher`)."""
    refit: bool = True
    """Whether the output projection of a cut block is fitted to what the dense block put out."""
    ridge: Annotated[float, Field(ge=1e-6, le=10)] = 0.01
    """Ridge of the refit, as a share of the mean diagonal of the second moments."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """What stays in fp32 within a node of another precision."""

    max_loss_increase: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Loss increase by rounding a single block above which the block stays in fp32. 0: no block is
    measured."""


@dataclass(frozen=True, kw_only=True)
class Distill:
    """How the pruned pipeline learns from the dense one."""

    steps: Literal["auto"] | Annotated[int, Field(ge=0, le=1_000_000)] = "auto"
    """Training steps. 0: no training. `auto`: by the loss before training over that of the dense
    pipeline. Under 1.02 they are 100, under 1.1 they are 250, under 1.5 they are 500, under 8 they
    are 1,000, else 3,000."""
    auto_steps_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Factor on the steps that `auto` chooses."""
    minutes: Annotated[float, Field(ge=0, le=100_000)] = 4.0
    """Minutes of training. Where the pace of the first steps says that all `steps` would take
    longer, the training has as many as these minutes afford."""
    schedule: Literal["cosine", "until_converged"] = "cosine"
    """How long a training lasts. `cosine`: all steps, while the rate falls. `until_converged`: at a
    constant rate that is run down at the end. The steps are doubled as long as that lowers the loss
    by a tenth, and the minutes last."""
    batch: Annotated[int, Field(ge=2, le=65_536)] = 24
    """Pairs per step."""
    learning_rate: Share = 7e-4
    """Highest learning rate of the schedule, behind the warm-up."""
    find_learning_rate: bool = True
    """Whether the rate is halved while a few steps of it make matters worse: structures that lost
    little need less. A short training has no steps for that; there such structures get an
    eighth."""
    losses: dict[str, LossWeight] = field(default_factory=dict)
    """Weights of losses by name; those that are not named keep their defaults.

    Losses against the dense pipeline:

    - `embedding` 1: squared distance of embeddings (CLIP-KD)
    - `tokens` 1 and `scores` 1: squared errors relative to the variance
    - `affinity` 1: divergence of similarities at every join (TinyCLIP)
    - `logits` 4: divergence of next-token distributions
    - `hidden` 0 and `cross` 0: error of what blocks, or cross-attention alone, add to their streams

    Losses of the task:

    - `contrast` 0.2: of joins
    - `caption` 1: cross-entropy of generators
    - those of other kinds of node
    """
    validations: Annotated[int, Field(ge=0, le=1000)] = 4
    """Times that the loss on validation pairs is taken on the way. When the last weights are
    clearly worse than others seen, those are kept. 0: always the last."""
    patience: Annotated[int, Field(ge=0, le=1000)] = 0
    """Validations in a row without a lower loss after which training ends early. 0: it never
    does."""
    max_passes: Annotated[int, Field(ge=1, le=1_000_000)] = 3
    """Most times that a drawn pair comes within one training, each time among other ones. The dense
    pipeline is asked once for a pair, as far as `store_gb` reaches. Pairs of files come by
    chance."""
    distinct_pairs: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """Distinct training pairs. 0: fresh ones for every step, as far as the data has them."""
    store_gb: Annotated[float, Field(ge=0, le=100_000)] = 2.0
    """Gigabytes of the dense pipeline's outputs that a run folder keeps at most, in half precision.
    Further targets and trainings that draw the same pairs take them from there. 0: none."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What is kept on every machine between runs."""

    max_gb: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    """Gigabytes of weights and data that were fetched from storage URLs (`s3://...`). Those that
    were not used for longest go first; what was used within a day stays."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where torch computes: importance, sensitivity, refit, trials and training.

    Exports, proofs and measurements run on the processor, whatever it is.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The device. `auto` takes a GPU where torch finds one: Nvidia's or AMD's (`cuda`), or Apple's
    (`mps`). Where its memory runs out, batches are halved."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of products while training; weights and losses are fp32. `auto` takes bf16 where
    the device has it and is quicker with it. With `fp32`, a GPU does not round to TF32 either."""


@dataclass(frozen=True, kw_only=True)
class TaskResources:
    """What one task on a Ray cluster reserves. Ray sends it to a node that has as much left."""

    cpu: Annotated[float, Field(gt=0, le=4096)] = 1.0
    """CPUs. The task runs on as many threads, one at least."""
    gpu: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs, or a share of one: with 0.5, two tasks share one. 0: GPUs of a node are used and not
    counted."""
    memory_gb: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Gigabytes of memory. 0: it is not counted."""
    custom: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = field(default_factory=dict)
    """Resources that a cluster names itself, such as `{a100: 1}`."""


@dataclass(frozen=True, kw_only=True)
class TrainingResources(TaskResources):
    """What each worker of the training on a Ray cluster reserves, and how many there are."""

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Workers that share every step of the training. 1: the process of the run trains alone. With
    more, Ray Train starts them where `search.executor` is `ray`; each takes its share of
    `distill.batch`. A worker or node that is lost is replaced, and the training goes on from its
    last checkpoint. The run folder must be at the same path on all nodes."""
    cpu: Annotated[float, Field(gt=0, le=4096)] = 1.0
    """CPUs of each worker. It computes on as many threads, one at least."""
    gpu: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs of each worker. With GPUs, gradients travel by NCCL, without by Gloo."""
    memory_gb: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Gigabytes of memory of each worker. 0: it is not counted."""
    custom: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = field(default_factory=dict)
    """Resources that a cluster names itself, of each worker."""


def check_own_resource(name: str) -> str:
    """Return the name of a resource that a cluster names itself, or raise `ValueError`."""
    if name in ("CPU", "GPU", "memory", "object_store_memory"):
        raise ValueError(
            f"{name} is a resource of every node: give the target device one of its own"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class MeasuringResources:
    """Where latencies are measured on a Ray cluster."""

    custom: dict[
        Annotated[str, AfterValidator(check_own_resource)], Annotated[float, Field(gt=0, le=1e6)]
    ] = field(default_factory=dict)
    """Resources of the target device, such as `{edge_box: 1}`: latencies are measured on the node
    that carries them. A measurement reserves every CPU and GPU of that node, so nothing else of
    the cluster runs there meanwhile. Empty: the machine of the run measures. It needs
    `search.executor: ray`."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What tasks on a Ray cluster reserve. Other executors take no notice."""

    trial: TaskResources = field(default_factory=TaskResources)
    """A trial of the search."""
    distill: TrainingResources = field(default_factory=TrainingResources)
    """The training. Short trainings of the search are not shared."""
    measure: MeasuringResources = field(default_factory=MeasuringResources)
    """The measurements of blocks, exports and bundles."""


VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""The name of an environment variable."""

SECRET_NAME = re.compile(
    r"(.*_)?(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|SECRET)_KEY)", re.IGNORECASE
)
"""The name of an environment variable whose value nobody should read."""

SWITCHES = ("HF_HUB_DISABLE_IMPLICIT_TOKEN",)
"""Environment variables that are named like a secret and hold none."""


def check_variable_name(name: str) -> str:
    """Return the name of an environment variable, or raise `ValueError`."""
    if not VARIABLE_NAME.fullmatch(name):
        raise ValueError(f"'{name}' is no name of an environment variable")
    return name


def check_is_no_secret(name: str) -> str:
    """Return the name of an environment variable whose value may be read, or raise `ValueError`."""
    if SECRET_NAME.fullmatch(name) and name not in SWITCHES:
        raise ValueError(
            f"the value of {name} would stand in the records of the cluster: set it on the nodes, "
            "and name it in cluster.secrets"
        )
    return check_variable_name(name)


@dataclass(frozen=True, kw_only=True)
class RuntimeEnv:
    """What Ray prepares on the nodes for the tasks of a run, beside this package."""

    pip: tuple[str, ...] = ()
    """Packages that Ray installs for the run, as pip takes them: `[sentencepiece==0.2.1]`."""
    env_vars: dict[Annotated[str, AfterValidator(check_is_no_secret)], str] = field(
        default_factory=dict
    )
    """Environment variables of all tasks. They stand in the records of the cluster."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a run needs of the nodes of a Ray cluster. Without a cluster it has no effect."""

    runtime_env: RuntimeEnv = field(default_factory=RuntimeEnv)
    """What Ray prepares on the nodes."""
    secrets: tuple[Annotated[str, AfterValidator(check_variable_name)], ...] = ()
    """Environment variables that must be set on every node, such as `HF_TOKEN`. Their names alone
    travel: a node that lacks one is refused by its name."""


def check_storage_url(url: str) -> str:
    """Return the URL of a database, or raise `ValueError`."""
    if not url:
        return url
    parts = urlsplit(url)
    if parts.password or "password" in parse_qs(parts.query):
        raise ValueError(
            "the password would stand in the run folder: leave it out of the URL, and set "
            "PGPASSWORD or write ~/.pgpass"
        )
    if parts.scheme not in ("postgresql", "postgres") or not parts.path.strip("/"):
        raise ValueError(f"expected postgresql://USER@HOST:PORT/DATABASE, got '{url}'")
    return url


def check_target_has_unit(target: object) -> object:
    """Return a target that is a text. A number alone could mean two things.

    Raises:
        ValueError: It is a number.
    """
    if isinstance(target, int | float):
        raise ValueError(f"{target}: say {target}x for a speed-up, or {target}ms for a latency")
    return target


def check_ray_address(address: str) -> str:
    """Return the address of a Ray cluster, or raise `ValueError`."""
    if "@" in address:
        raise ValueError(
            "it holds a user or a password, which would stand in the run folder: Ray takes none; "
            "see RAY_AUTH_MODE"
        )
    return address


@dataclass(frozen=True, kw_only=True)
class Search:
    """How structures are searched for."""

    trials: Annotated[int, Field(ge=0, le=100_000)] = 40
    """Proposals of the sampler. Splits of the budget, and what is evaluated for them, come on
    top."""
    max_trials: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Trials of all rounds together, splits and exchanges included; 0: no bound. A budget that
    measuring has corrected still gets one. With a bound, an artifact that is faster than asked is
    not made again. `--trials N` sets it with `trials`."""
    level_switches: Annotated[int, Field(ge=0, le=100_000)] = 16
    """Exchanges of units between blocks of the best structures, after the proposals (EvoPress)."""
    linearization_rounds: Annotated[int, Field(ge=0, le=100)] = 4
    """Rounds before the proposals in which the loss increase of every cut is measured among the
    other cuts, and the budget is split again. 0: loss increases are taken to add up. They end early
    when they take twice the search."""
    sampler: Annotated[str, AfterValidator(make_name_check(SAMPLERS))] = "tpe"
    """Optuna's sampler: see `mmcompress list samplers`."""
    executor: Annotated[str, AfterValidator(make_name_check(EXECUTORS))] = "ray"
    """Where trials run: see `mmcompress list executors`."""
    workers: Annotated[int, Field(ge=1, le=4096)] = 2
    """Trials at a time."""
    ray_address: Annotated[str, AfterValidator(check_ray_address)] | None = None
    """Address of a running Ray cluster: `auto` or HOST:PORT. Without it, a local Ray is started."""
    storage: Annotated[str, AfterValidator(check_storage_url)] = ""
    """Where trials are kept: a PostgreSQL database, `postgresql://USER@HOST:PORT/DATABASE`. Its
    password comes from `PGPASSWORD` or `~/.pgpass`. Empty: a journal in the run folder."""
    deterministic: bool = False
    """Whether the search comes out the same for any number of workers, and after an interruption.
    Proposals are made `batch` at a time, and trials run on one thread. Trainings have all of their
    steps whatever `distill.minutes` says, and `compute.precision: auto` is fp32. Latencies that are
    measured anew differ a little, so compare runs of one `measure.readings`."""
    batch: Annotated[int, Field(ge=1, le=4096)] = 4
    """Proposals that a deterministic search makes before it looks at a result of them."""
    evaluator: Literal["measured", "estimated"] = "measured"
    """How the loss of a trial is found: by running the cut pipeline, or as the sum of the loss
    increases of its cuts."""
    finalists: Annotated[int, Field(ge=1, le=1000)] = 3
    """Trials within the budget that are evaluated on more pairs (`data.final_pairs_factor`) before
    one is chosen."""
    short_finetunings: Annotated[int, Field(ge=0, le=100)] = 5
    """Structures that are trained for a tenth of the budget each, when the best loss before
    training is so high that it says little. 0: none."""
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    """Times that a failed trial is tried again."""
    trial_seconds: Annotated[float, Field(ge=0, le=1e6)] = 3600.0
    """Seconds that a trial may take on a worker. Then it counts as failed, and is not tried again.
    An `inline` trial can't be interrupted. 0: any time."""
    max_artifacts: Annotated[int, Field(ge=1, le=10)] = 2
    """Artifacts that are made at most: another one when the finished one misses the target, or lies
    5 % under it. A miss is tried again once even with 1."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds beside the latency target. A missing limit is not checked."""

    params_m: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Parameters of all models, in millions."""
    size_mb: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Size of the bundle in MB."""
    memory_mb: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Peak resident memory in MB of a process that loads the bundle and answers once."""
    node_ms: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = field(default_factory=dict)
    """p50 of single nodes in milliseconds, by node."""
    retained: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the dense quality that must be kept, a lower bound: of the worst metric, on the
    split `val`. After a miss the run goes on with a slower target, with a third less gain, twice
    at most. The test split only says whether it held."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How latency is measured."""

    threads: Annotated[int, Field(ge=1, le=256)] = 2
    """Threads of every session, as the bundle is to be deployed."""
    provider: Annotated[str, AfterValidator(make_name_check(PROVIDERS))] = "cpu"
    """What sessions run on, as the bundle is to be deployed: an execution provider of ONNX Runtime,
    see `mmcompress list providers`. It must be installed here. Trials are still evaluated in torch,
    and proofs still run on the processor."""
    parallel: bool = False
    """Whether nodes that don't read each other run at the same time, each on its own threads."""
    batch: Annotated[int, Field(ge=1, le=4096)] = 1
    """Requests that the bundle answers together, as it is to be deployed. With more than one, every
    latency is that of a whole batch. So is the target: `12ms` is what a batch may take."""
    memory: bool = True
    """Whether the peak memory of both bundles is measured, each in a process of its own."""
    readings: str = ""
    """Readings of another device (a JSON of `mmcompress device measure`). The target is then for
    that device."""
    warmup: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Requests after loading that are not counted; with `batch`, batches."""
    requests: Annotated[int, Field(ge=2, le=100_000)] = 200
    """Requests to each side at least; with `batch`, batches."""
    request: str = WHOLE_REQUEST
    """What a request holds, and so what the target counts: `pair`, everything that the pipeline
    takes, or the name of one of its inputs. Nodes that need another input are then not timed."""
    max_parts: Annotated[int, Field(ge=2, le=100)] = 6
    """Parts that a finished artifact is measured in at most. They end earlier when the ratio of the
    two latencies is known to 1.5 %."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the report shows."""

    samples: Literal["none"] | Annotated[int, Field(ge=0, le=100)] = 8
    """Inputs of the test split that it shows, with what both sides wrote. Changed ones come first.
    `none` keeps pictures, sounds and texts of the data out of it."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric that the result is judged by. Its name alone stands for it: `wer` for `{kind:
    wer}`."""

    kind: Annotated[str, AfterValidator(make_name_check(METRICS))]
    """The metric: see `mmcompress list metrics`."""
    of: str = ""
    """The node that it judges. Without it, the metric judges every node that it can."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A pipeline, and how to compress it."""

    name: str
    """Name of the pipeline, for reports and run folders."""
    inputs: dict[str, Annotated[str, AfterValidator(make_name_check(INPUT_TYPES))]]
    """Inputs of the pipeline by name, each with its type: see `mmcompress list inputs`."""
    nodes: dict[str, Node]
    """The models and joins of the pipeline, by name."""
    outputs: dict[str, str]
    """Outputs of the pipeline by name, each as `node.port`."""
    data: Data
    """The pairs that it is compressed and judged with."""
    metrics: tuple[Metric, ...] = (Metric(kind="retrieval"), Metric(kind="caption"))
    """What the result is judged by."""
    target: Annotated[str, BeforeValidator(check_target_has_unit)] = "2x"
    """Latency end to end: `2x`, `12ms` or `12ms p95`. Several, with commas, share all but search
    and training."""
    limits: Limits = field(default_factory=Limits)
    """Bounds beside the target."""
    prune: Prune = field(default_factory=Prune)
    """How units are scored, chosen and removed."""
    quantize: Quantize = field(default_factory=Quantize)
    """What stays in fp32."""
    distill: Distill = field(default_factory=Distill)
    """How the pruned pipeline learns."""
    compute: Compute = field(default_factory=Compute)
    """Where torch computes."""
    cache: Cache = field(default_factory=Cache)
    """What is kept on every machine between runs."""
    search: Search = field(default_factory=Search)
    """How structures are searched for."""
    resources: Resources = field(default_factory=Resources)
    """What tasks on a Ray cluster reserve."""
    cluster: Cluster = field(default_factory=Cluster)
    """What the nodes of a Ray cluster need."""
    measure: Measure = field(default_factory=Measure)
    """How latency is measured."""
    report: Report = field(default_factory=Report)
    """What the report shows."""
    effort: Literal["quick", "normal", "best"] = "normal"
    """How much is searched, trained and measured. `normal` is what the other keys say. `quick` and
    `best` change those that are not set beside it: trials, pairs, steps, minutes and parts."""
    plugins: tuple[str, ...] = ()
    """Modules to import first: they add entries of your own (`mmcompress list`)."""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Seed of data, search and training."""

    def list_model_nodes(self) -> dict[str, Node]:
        """Return the nodes that are models, by name."""
        return {
            name: node for name, node in self.nodes.items() if NODE_KINDS.get(node.kind).is_model
        }
