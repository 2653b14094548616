"""A run folder with everything loaded: the stages work on it.

`open_run` loads and checks all of it first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Unpack

from mmcompress.data.base import Dataset
from mmcompress.data.check_data import describe_shortage, open_data
from mmcompress.data.open_dataset import read_all_lookup_texts
from mmcompress.data.remote_files import trim_remote_cache
from mmcompress.data.sealed_splits import SealedData, SplitSeal
from mmcompress.errors import DataError, DiskFull, ModelError, suggest_nearest
from mmcompress.export.bundle import BundleContents, write_bundle
from mmcompress.graph.blocks import Block
from mmcompress.graph.inputs import make_request
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.modality import find_cross_modal_blocks
from mmcompress.graph.structure import KeptUnits
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.footprint import Footprint, measure_footprint
from mmcompress.measure.cost_model.predictor import LinearFit
from mmcompress.measure.devices.readings import Readings
from mmcompress.models.base import Model
from mmcompress.models.counts import count_params, count_params_per_unit
from mmcompress.models.device import CPU, choose_device, place_models
from mmcompress.models.foreign_encoders import describe_foreign_encoders
from mmcompress.models.sources import load_models, load_rewind_models, pin_sources
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.registry import PRECISIONS
from mmcompress.results.records import Proof
from mmcompress.runtime.progress import ProgressListener, StageProgress, ignore_progress
from mmcompress.runtime.timing import Clock, SystemClock
from mmcompress.spec.deterministic import leave_out_clocks
from mmcompress.spec.loader import list_given_keys
from mmcompress.spec.name_lines import name_spec_lines
from mmcompress.spec.schema import WHOLE_REQUEST, Node, Resources, Spec
from mmcompress.spec.space import Space, find_default_space, load_space
from mmcompress.spec.target import Goal, parse_target
from mmcompress.storage import read_record, to_plain, write_record
from mmcompress.workspace.folder import NEW_FOLDER_CURE, RunFolder
from mmcompress.workspace.heed_cpu_quota import heed_cpu_quota
from mmcompress.workspace.run_options import RunOptions, require_known_options

UNIT_KINDS = ("heads", "ffn", "tokens")
"""Groups of blocks that a spec or a search space gives a prune ratio for."""

MAX_STATIC_RANGE_INPUTS = 32
"""Training inputs at most that static activation ranges are taken from: each runs through the whole
pipeline."""


@dataclass(kw_only=True)
class RunContext:
    """A run folder with everything loaded. `open_run` makes it."""

    spec: Spec
    """What was asked for, with all overrides applied."""
    space: Space
    """What the search may change, without dimensions that no model has."""
    folder: RunFolder
    """The folder of this target."""
    shared: RunFolder
    """The folder of what does not depend on the target; `folder` itself for a single target."""
    on_progress: ProgressListener
    """Receives messages for a person."""
    models: dict[str, Model]
    """The dense models by node, on the device that torch computes on. They are never changed."""
    pipeline: TorchPipeline
    """The graph of the spec in torch; it takes the models of either side."""
    data: Dataset
    """Pairs of every split. With `data.labels: teacher` they carry the dense pipeline's texts after
    `prepare_run`. Splits that judge are sealed."""
    seal: SplitSeal
    """Keeps the test split and those of `data.report` closed until a finished artifact is judged
    on them."""
    cross_modal: dict[str, dict[str, str]]
    """The reason why a block is cross-modal, by node and block; other blocks are missing."""
    timings: dict[str, float]
    """Seconds by stage, those of interrupted runs included."""
    lookup_texts: dict[str, tuple[str, ...]]
    """The texts that every lookup node searches."""
    bench: Benchmarker
    """Measures latency and memory."""
    clock: Clock
    """Tells the time that stages and trainings take."""
    reused_folder: RunFolder | None = None
    """The folder of an earlier run whose shared records are taken over where they fit."""
    storage_url: str = ""
    """The storage that the folder is kept at; empty where it is at none."""
    search_ends_at: float = math.inf
    """Seconds on the clock after which no further trial, round or short training begins."""

    @property
    def goal(self) -> Goal:
        """The target of the spec."""
        return parse_target(self.spec.target)

    @property
    def blocks(self) -> dict[str, tuple[Block, ...]]:
        """The prunable blocks of the dense models, by node."""
        return {node_name: model.blocks for node_name, model in self.models.items()}

    @cached_property
    def device_readings(self) -> Readings | None:
        """What another device measured, if the spec names its readings.

        Latencies are then those of that device.

        Raises:
            DataError: The readings contradict themselves, or belong to another pipeline or
                thread count.
        """
        return load_readings(self.spec)

    @cached_property
    def device(self) -> str:
        """Fingerprint of the device the target is for.

        Figures of two devices are never compared.
        """
        if self.device_readings:
            return str(self.device_readings.device)
        measure = self.spec.measure
        fingerprint = self.bench.fingerprint_device(measure.threads, measure.provider)
        # Milliseconds of a batch are never compared with those of a request.
        return fingerprint if measure.batch == 1 else f"{fingerprint}-batch{measure.batch}"

    def measure_footprint(self, size_fits: Mapping[str, Mapping[str, LinearFit]]) -> Footprint:
        """Measure file sizes and memory by structure, or read the record of the run folder.

        Args:
            size_fits: Megabytes of a node against its parameters in millions, by node and
                precision; the predictor has them.

        Returns:
            The footprint of structures that are all in their precision.
        """
        record = self.shared.footprint
        if record.exists():
            return read_record(Footprint, record)
        params_per_unit = {}
        for node_name, model in self.models.items():
            params_per_unit[node_name] = {
                block.name: count_params_per_unit(model, block) for block in model.blocks
            }
        footprint = measure_footprint(
            self.blocks,
            size_fits,
            dense_params={name: count_params(model) for name, model in self.models.items()},
            params_per_unit=params_per_unit,
            bundle=self.shared.baseline,
            measure_memory=self.bench.measure_memory_mb,
        )
        write_record(record, footprint)
        return footprint

    def is_search_over(self) -> bool:
        """Return whether the time of the search is over: what is under way is finished."""
        return self.clock.read_seconds() >= self.search_ends_at

    def aim_at(self, target: str) -> RunContext:
        """Return the same run for one of its targets, in a folder of its own."""
        folder = self.folder.get_target_folder(target)
        spec = replace(self.spec, target=target)
        timings = folder.read_timings(self.tell_damage)
        return replace(self, spec=spec, folder=folder, timings=timings)

    def tell_damage(self, message: str) -> None:
        """Tell a person of a damaged file of the run folder."""
        self.on_progress("resume", message, None)

    def load_requests(self, count: int) -> list[dict[str, object]]:
        """Return inputs to measure latency with, from the validation split.

        Args:
            count: The number of requests.

        Returns:
            One dictionary for each request, from the input port to its array or text.
        """
        requests = self.load_whole_requests("val", count, seed=1)
        timed_input = self.spec.measure.request
        if timed_input == WHOLE_REQUEST:
            return requests
        return [{timed_input: request[timed_input]} for request in requests]

    def load_whole_requests(self, split: str, count: int, *, seed: int) -> list[dict[str, object]]:
        """Return requests with every input of the pipeline: they run all of its nodes.

        Args:
            split: The split that the pairs come from.
            count: The number of requests.
            seed: Which pairs are drawn.
        """
        pairs = self.data.load(split, count, seed=seed)
        return [
            make_request(self.spec.inputs, value, text=text)
            for value, text in zip(pairs.inputs, pairs.texts, strict=True)
        ]

    def write_bundle(
        self,
        models: Mapping[str, Model],
        precision: Mapping[str, str],
        *,
        kept: Mapping[str, KeptUnits],
        folder: Path,
        prove: bool = True,
        fp32_blocks: Mapping[str, Collection[str]] = MappingProxyType({}),
        fp32_folder: Path | None = None,
        progress: StageProgress = ignore_progress,
    ) -> list[Proof]:
        """Write a bundle of some models.

        Args:
            models: The models by node.
            precision: The precision of every node.
            kept: Units kept by node and block; it goes into the manifest.
            folder: Where the bundle goes.
            prove: Whether every export is compared with its model.
            fp32_blocks: Blocks by node that stay in fp32.
            fp32_folder: Where the fp32 files of generators go that are quantized in the bundle.
            progress: Hears which node is exported, and the share of the nodes that is done.

        Returns:
            The proofs, failed ones included.
        """
        contents = BundleContents(
            models=models,
            precisions=precision,
            kept_units=kept,
            fp32_blocks=fp32_blocks,
            lookup_texts=self.lookup_texts,
            calibration_requests=self._load_range_requests(precision),
        )
        return write_bundle(
            self.spec,
            contents,
            folder=folder,
            prove=prove,
            fp32_folder=fp32_folder,
            progress=progress,
        )

    def _load_range_requests(self, precision: Mapping[str, str]) -> list[dict[str, object]]:
        """Return the requests that static precisions take their ranges from, if there are any."""
        if not any(has_static_ranges(name) for name in precision.values()):
            return []
        count = min(self.spec.data.calibration, MAX_STATIC_RANGE_INPUTS)
        return self.load_whole_requests("train", count, seed=0)

    @contextmanager
    def time_stage(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to the timings of a stage, and write them down."""
        start = self.clock.read_seconds()
        try:
            yield
        finally:
            seconds = self.clock.read_seconds() - start
            self.timings[stage] = self.timings.get(stage, 0.0) + seconds
            try:
                write_record(self.folder.timings, self.timings)
            except DiskFull as error:
                # What the stage has made is worth more, and is written next.
                self.on_progress(stage, f"{error}; the run goes on without its timings", None)


def load_readings(spec: Spec) -> Readings | None:
    """Load what another device measured; None where the spec names no readings.

    Raises:
        DataError: There are none, they contradict themselves, or they belong to another pipeline or
            thread count.
    """
    measure = spec.measure
    if not measure.readings:
        return None
    readings = read_record(Readings, Path(measure.readings))
    if readings.table.device != readings.device:
        raise DataError(
            f"measure.readings: {measure.readings} has the pipelines of {readings.device} "
            f"and the table of {readings.table.device}"
        )
    if readings.pipeline != spec.name or readings.threads != measure.threads:
        raise DataError(
            f"measure.readings: {measure.readings} is of '{readings.pipeline}' with "
            f"{readings.threads} threads, this is '{spec.name}' with {measure.threads}"
        )
    if readings.provider != measure.provider:
        raise DataError(
            f"measure.readings: {measure.readings} is of the provider {readings.provider}, "
            f"measure.provider is {measure.provider}"
        )
    if readings.batch != measure.batch:
        raise DataError(
            f"measure.readings: {measure.readings} is of batches of {readings.batch}, "
            f"measure.batch is {measure.batch}"
        )
    return readings


def has_static_ranges(precision: str) -> bool:
    """Return whether a precision takes the ranges of its activations from calibration inputs."""
    if precision == "fp32":
        return False
    return bool(PRECISIONS.get(precision).needs_calibration)


def open_run(
    spec_path: str | Path,
    out: str | Path,
    **options: Unpack[RunOptions],
) -> RunContext:
    """Load and check everything a run needs. Nothing is written before all checks have passed.

    Args:
        spec_path: The spec file.
        out: The run folder. It must be new or empty, unless `resume` is given.
        options: `space`, `overrides`, `resume`, `on_progress`, `bench` and `clock`; see
            `RunOptions`.

    Returns:
        Spec, search space, models, pipeline and data, with the run folder.

    Raises:
        TypeError: An option has another name.
        SpecError: The spec or the search space is wrong.
        DataError: The data, the readings or the folder do not fit.
        ModelError: A model can't be loaded, or can't be cut as asked.
    """
    require_known_options(options)
    folder = RunFolder(path=Path(out))
    reused_folder = find_reused_folder(options.get("from_run"), folder)
    overrides = options.get("overrides")
    on_progress = options.get("on_progress", ignore_progress)
    asked_spec = leave_out_clocks(load_spec(spec_path, overrides))
    spec, pinned_sources = pin_sources(asked_spec, folder.read_sources())
    given_keys = list_given_keys(spec_path, overrides)
    whole_space = load_space(options.get("space") or find_default_space(), spec, fixed=given_keys)
    on_progress("load", f"{spec.name}: {len(spec.list_model_nodes())} models", None)

    with name_spec_lines(spec_path, overrides):
        data = open_data(spec)
    shortage = describe_shortage(spec, data)
    if shortage:
        on_progress("load", shortage, None)
    lookup_texts = read_all_lookup_texts(spec, data)

    heed_cpu_quota(spec, on_progress)
    # A device that is not there is told before weights are loaded.
    choose_device(spec.compute.device)
    with name_spec_lines(spec_path, overrides):
        models = load_models(spec)
        # A checkpoint that can't be rewound to is reported now, not after hours of work.
        load_rewind_models(spec, models)
        check_prune_options(spec, models)
    for sentence in describe_foreign_encoders(spec, models):
        on_progress("load", sentence, None)

    trim_remote_cache(spec.cache.max_gb)
    models = place_models(models, spec.compute)
    pipeline = TorchPipeline(spec, models)
    if pipeline.device != CPU:
        on_progress("load", f"torch computes on {pipeline.device.type}", None)
    pipeline.tell_memory = partial(_tell_memory, on_progress)
    blocks = {node_name: model.blocks for node_name, model in models.items()}
    seal = SplitSeal()
    run = RunContext(
        spec=spec,
        space=_drop_missing_dimensions(whole_space, blocks),
        folder=folder,
        shared=folder,
        on_progress=on_progress,
        models=models,
        pipeline=pipeline,
        data=SealedData(data, seal),
        seal=seal,
        cross_modal=find_cross_modal_blocks(spec, blocks),
        timings={},
        lookup_texts=lookup_texts,
        bench=options.get("bench") or Benchmarker(),
        clock=options.get("clock") or SystemClock(),
        reused_folder=reused_folder,
    )
    readings = run.device_readings
    _claim_folder(run, resume=options.get("resume", False))
    if pinned_sources:
        write_record(folder.sources, pinned_sources)
    if readings:
        _keep_readings(run, readings)
    run.timings |= folder.read_timings(run.tell_damage)
    return run


def _tell_memory(on_progress: ProgressListener, message: str) -> None:
    """Tell a person that memory ran out."""
    on_progress("memory", message, None)


def find_reused_folder(from_run: str | Path | None, folder: RunFolder) -> RunFolder | None:
    """Return the folder whose shared records are taken over; None where none is named.

    The folder of one of several targets stands for the one above, which holds what they share.

    Raises:
        DataError: There is no run in it, or it is the folder of this run.
    """
    if from_run is None:
        return None
    reused = RunFolder(path=Path(from_run))
    if not reused.profile.exists() and reused.shared_by_targets.profile.exists():
        reused = reused.shared_by_targets
    if not reused.profile.exists():
        raise DataError(f"--from {from_run}: no run has measured a dense pipeline in this folder")
    if reused.path.resolve() == folder.path.resolve():
        raise DataError(f"--from {from_run}: this is the folder of the run itself; use --resume")
    return reused


def check_prune_options(spec: Spec, models: Mapping[str, Model]) -> None:
    """Raise `ModelError` when a spec cuts what a model does not have."""
    for node_name, node in spec.list_model_nodes().items():
        _check_node_prune_options(f"nodes.{node_name}.prune", node, blocks=models[node_name].blocks)


def _check_node_prune_options(key: str, node: Node, *, blocks: tuple[Block, ...]) -> None:
    """Raise `ModelError` when one node cuts what its model does not have."""
    groups = sorted({block.group for block in blocks})
    for group in UNIT_KINDS:
        if getattr(node.prune, group) > 0 and group not in groups:
            raise ModelError(
                f"{key}.{group}: this model has no {group} to cut (it has: {', '.join(groups)})"
            )
    removable_count = sum(bool(block.drop) for block in blocks)
    if node.prune.drop > removable_count:
        raise ModelError(f"{key}.drop: only {removable_count} of its blocks can be removed whole")
    names = [block.name for block in blocks]
    for name in node.prune.blocks:
        if name not in names:
            raise ModelError(
                f"{key}.blocks: no block is named '{name}'; {suggest_nearest(name, names)}"
            )


def _drop_missing_dimensions(space: Space, blocks: Mapping[str, tuple[Block, ...]]) -> Space:
    """Return the space without prune ratios of unit kinds that a model does not have."""
    present_keys = set()
    for node_name, node_blocks in blocks.items():
        present_keys |= {f"nodes.{node_name}.prune.{block.group}" for block in node_blocks}
    dimensions = {}
    for key, dimension in space.dimensions.items():
        unit_kind = key.rpartition(".")[2]
        if unit_kind not in UNIT_KINDS or key in present_keys:
            dimensions[key] = dimension
    return replace(space, dimensions=dimensions)


def _claim_folder(run: RunContext, *, resume: bool) -> None:
    """Write spec and space into a new folder, or compare them with those of the resumed run.

    Raises:
        DataError: The folder is not empty, or was begun with another spec or search space, or by a
            version of mmcompress that wrote another format.
    """
    folder = run.folder
    if folder.spec.exists() and resume:
        folder.check_format()
        begun_spec = read_record(Spec, folder.spec, cure=NEW_FOLDER_CURE)
        changed_keys = _list_changed_keys(
            _select_decisive_options(begun_spec), _select_decisive_options(run.spec)
        )
        if changed_keys:
            raise DataError(
                f"{folder}: begun with another spec or other overrides (of "
                f"{', '.join(changed_keys)}); use a new --out. --from {folder} takes over what "
                "was measured"
            )
        if read_record(Space, folder.space, cure=NEW_FOLDER_CURE) != run.space:
            raise DataError(f"{folder}: begun with another search space; use a new --out")
        return
    folder.require_free(resume=resume)
    folder.write_format()
    write_record(folder.space, run.space)
    write_record(folder.spec, run.spec)


def _keep_readings(run: RunContext, readings: Readings) -> None:
    """Copy a device's readings into the run folder: old and new ones must not be mixed.

    Raises:
        DataError: The folder has other readings.
    """
    record = run.folder.readings
    if record.exists() and read_record(Readings, record, cure=NEW_FOLDER_CURE) != readings:
        raise DataError(
            f"measure.readings: {run.spec.measure.readings} has changed since this run; "
            "use a new --out"
        )
    write_record(record, readings, indent=None)


def _list_changed_keys(begun: object, now: object, *, prefix: str = "") -> list[str]:
    """List the dotted keys at which two specs as plain data differ."""
    if not isinstance(begun, dict) or not isinstance(now, dict):
        return [] if begun == now else [prefix.rstrip(".")]
    keys: list[str] = []
    for key in sorted({*begun, *now}):
        keys += _list_changed_keys(begun.get(key), now.get(key), prefix=f"{prefix}{key}.")
    return keys


def _select_decisive_options(spec: Spec) -> object:
    """Return the part of a spec that must not change between a run and its resumption.

    Where and how long it searches may change, and how much quality must be kept: no structure
    depends on that. So may the path of a device's readings: their content is compared.
    """
    search = replace(
        spec.search,
        workers=1,
        trials=0,
        max_trials=0,
        level_switches=0,
        trial_seconds=0.0,
        ray_address=None,
        executor="ray",
    )
    measure = replace(spec.measure, readings=spec.measure.readings and "given")
    limits = replace(spec.limits, retained=None)
    # A run may go on where there is another device.
    compute = replace(spec.compute, device="auto")
    decisive = replace(
        spec,
        search=search,
        measure=measure,
        limits=limits,
        compute=compute,
        resources=Resources(),
    )
    return to_plain(decisive)


def list_precisions(run: RunContext) -> dict[str, tuple[str, ...]]:
    """Return the precisions each node may have: of the search space, or the one of the spec."""
    precisions: dict[str, tuple[str, ...]] = {}
    for node_name, node in run.spec.list_model_nodes().items():
        dimension = run.space.dimensions.get(f"nodes.{node_name}.precision")
        if dimension:
            precisions[node_name] = tuple(dimension.choices)
        else:
            fixed_value = "fp32" if node.precision == "auto" else node.precision
            precisions[node_name] = (fixed_value,)
    return precisions


def find_largest_position_cut(run: RunContext, node_name: str) -> float:
    """Return the largest share of its positions that a node may lose, by spec or search space."""
    prune = run.spec.nodes[node_name].prune
    fixed_value = max(prune.tokens, prune.blocks.get("tokens", 0.0))
    dimension = run.space.dimensions.get(f"nodes.{node_name}.prune.tokens")
    if dimension is None:
        return fixed_value
    return max(fixed_value, dimension.high or 0.0)
