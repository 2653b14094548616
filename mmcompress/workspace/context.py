"""A run folder with everything loaded: what the stages work on."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmcompress.data.open_dataset import open_dataset, read_lookup_texts
from mmcompress.errors import DataError, ModelError, suggest_nearest
from mmcompress.export.bundle import write_bundle
from mmcompress.graph.blocks import Block
from mmcompress.graph.load_spec import load_spec
from mmcompress.graph.modality import find_cross_modal_blocks
from mmcompress.graph.structure import KeptUnits
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.cost_model.footprint import Footprint, measure_footprint
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.devices.readings import Readings
from mmcompress.models.counts import count_params
from mmcompress.models.sources import load_models, load_rewind_models
from mmcompress.pipeline.forward import TorchPipeline
from mmcompress.results.records import Proof
from mmcompress.runtime.machine import device_fingerprint
from mmcompress.runtime.timing import Clock, SystemClock
from mmcompress.spec.loader import list_given_keys
from mmcompress.spec.schema import Spec
from mmcompress.spec.space import Space, load_space
from mmcompress.spec.target import Goal, parse_target
from mmcompress.storage import read_record, to_plain, write_record
from mmcompress.version import CHECKOUT_FOLDER

OnProgress = Callable[[str, str, float | None], None]
"""(stage, what, share done or None): progress for a person."""


ignore_progress: OnProgress = lambda stage, what, share: None


STATIC_RANGE_INPUTS = 32
"""Training inputs that static ranges are taken from."""


@dataclass(kw_only=True)
class RunContext:
    """A run folder with everything loaded. Heavy parts are made by `open_run`."""

    spec: Spec
    space: Space
    folder: Path
    on_progress: OnProgress
    models: dict[str, Any]
    pipeline: Any
    data: Any
    cross_modal: dict[str, dict[str, str]]
    timings: dict[str, float]
    lookup_texts: dict[str, tuple[str, ...]]
    """The texts of every lookup."""
    shared: Path
    """The folder of what does not depend on the target; `folder` itself where there is one target."""
    bench: Benchmarker
    clock: Clock

    @property
    def goal(self) -> Goal:
        return parse_target(self.spec.target)

    def aimed_at(self, target: str) -> RunContext:
        """The same run for one of its targets, in a folder of its own."""
        spec = replace(self.spec, target=target)
        folder = self.folder / target.replace(" ", "-")
        record = folder / "timings.json"
        timings = json.loads(record.read_text()) if record.exists() else {}
        return replace(self, spec=spec, folder=folder, timings=timings)

    def requests(self, count: int) -> list[dict[str, Any]]:
        """Inputs to measure latency with, from the choosing split."""
        return [
            {next(iter(self.spec.inputs)): x} for x in self.data.load("val", count, seed=1).inputs
        ]

    def write_bundle(
        self,
        models: dict[str, Any],
        precision: dict[str, str],
        *,
        kept: dict[str, KeptUnits],
        folder: Path,
        prove: bool = True,
        spared: Mapping[str, Collection[str]] = MappingProxyType({}),
        aside: Path | None = None,
    ) -> list[Proof]:
        """Write a bundle of given models; returns its proofs. `spared`, `aside`: see `write_bundle`."""

        static = any(p == "int8_static" for p in precision.values())
        given = (
            self.data.load("train", min(self.spec.data.calibration, STATIC_RANGE_INPUTS)).inputs
            if static
            else ()
        )
        return write_bundle(
            self.spec,
            models,
            precision=precision,
            kept=kept,
            folder=folder,
            prove=prove,
            listed=self.lookup_texts,
            calibration=given,
            spared=spared,
            aside=aside,
        )

    @cached_property
    def device_readings(self) -> Readings | None:
        """What another device measured, where the spec names its readings; latencies are then that device's."""

        m = self.spec.measure
        if not m.readings:
            return None
        found = read_record(Readings, Path(m.readings))
        if found.table.device != found.device:
            raise DataError(
                f"measure.readings: {m.readings} has the pipelines of {found.device} and the table of {found.table.device}"
            )
        if found.pipeline != self.spec.name or found.threads != m.threads:
            raise DataError(
                f"measure.readings: {m.readings} is of '{found.pipeline}' with {found.threads} threads, "
                f"this is '{self.spec.name}' with {m.threads}"
            )
        return found

    @cached_property
    def device(self) -> str:
        """Fingerprint of the device the target is for. Figures of two devices are never put side by side."""

        return (
            str(self.device_readings.device)
            if self.device_readings
            else device_fingerprint(self.spec.measure.threads)
        )

    @property
    def blocks(self) -> dict[str, tuple[Block, ...]]:
        return {n: m.blocks for n, m in self.models.items()}

    @cached_property
    def footprint(self) -> Footprint:
        """What structures weigh. Measured once per run folder, when a limit asks for it."""

        record = self.shared / "footprint.json"
        if not record.exists():
            sizes = read_record(Predictor, self.shared / "predictor.json").size_fits
            dense = {n: count_params(m) for n, m in self.models.items()}
            write_record(
                record,
                measure_footprint(
                    self.models,
                    sizes,
                    dense,
                    self.shared / "baseline",
                    memory=self.bench.measure_memory_mb,
                ),
            )
        return replace(read_record(Footprint, record), fp32_blocks=self.fp32_blocks)

    @property
    def fp32_blocks(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Blocks that stay in fp32, by node and precision; none as long as there is no evidence."""
        evidence = self.shared / "evidence.json"
        found = json.loads(evidence.read_text())["spared"] if evidence.exists() else {}
        return {n: {p: tuple(blocks) for p, blocks in by.items()} for n, by in found.items()}

    def time_stage(self, stage: str) -> _Clock:
        return _Clock(self, stage)


class _Clock:
    def __init__(self, run: RunContext, stage: str):
        self.run, self.stage = run, stage

    def __enter__(self) -> None:
        self.start = self.run.clock.now()

    def __exit__(self, *exc: object) -> None:
        spent = self.run.clock.now() - self.start
        self.run.timings[self.stage] = self.run.timings.get(self.stage, 0.0) + spent
        write_record(self.run.folder / "timings.json", self.run.timings)


def default_space() -> Path:
    """In a checkout it lies beside the package, in an installed copy among the data of its environment."""
    beside = CHECKOUT_FOLDER / "search_spaces" / "joint.yaml"
    return (
        beside
        if beside.exists()
        else Path(sysconfig.get_path("data"), "share", "mmcompress", *beside.parts[-2:])
    )


def open_run(
    spec_path: str | Path,
    out: str | Path,
    *,
    space: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    resume: bool = False,
    on_progress: OnProgress = ignore_progress,
    bench: Benchmarker | None = None,
    clock: Clock | None = None,
) -> RunContext:
    """Load and check everything a run needs. Without `resume` the folder must be new or empty.

    Raises `SpecError`, `DataError` or `ModelError`; nothing is written before all of it is checked. `bench` and `clock`: what
    latency is measured with and time is read from; by default those of this machine.
    """
    spec = load_spec(spec_path, overrides)
    searched = load_space(
        space or default_space(), spec, fixed=list_given_keys(spec_path, overrides)
    )
    folder = Path(out)
    on_progress("load", f"{spec.name}: {len(spec.model_nodes())} models", None)

    data = open_data(spec)
    if few := describe_shortage(spec, data):
        on_progress("load", few, None)
    listed = {
        n: read_lookup_texts(data, node.texts)
        for n, node in spec.nodes.items()
        if node.kind == "lookup"
    }
    models = load_models(spec)
    load_rewind_models(spec, models)  # what can't be rewound to is told before hours of work
    _check_asked(spec, models)
    searched = _possible(searched, models)
    cross = find_cross_modal_blocks(spec, {n: m.blocks for n, m in models.items()})
    bench, clock = bench or Benchmarker(), clock or SystemClock()
    run = RunContext(
        spec=spec,
        space=searched,
        folder=folder,
        on_progress=on_progress,
        models=models,
        pipeline=TorchPipeline(spec, models),
        data=data,
        cross_modal=cross,
        timings={},
        lookup_texts=listed,
        shared=folder,
        bench=bench,
        clock=clock,
    )
    _ = run.device_readings  # readings that don't fit are refused before anything is written
    _claim(folder, spec, space=searched, resume=resume)
    _keep_readings(run)
    if (folder / "timings.json").exists():
        run.timings |= json.loads((folder / "timings.json").read_text())
    return run


def open_data(spec: Spec) -> Any:
    """The data of a spec, a pair of every split looked at. Raises `DataError`."""

    data = open_dataset(spec.data)
    for split in ("train", "val", "test", *spec.data.report):
        if split not in data.splits:
            raise DataError(
                f"data.report: '{spec.data.kind}' has no split '{split}' (known: {', '.join(data.splits)})"
            )
        data.load(split, 1)
    kind = getattr(data, "gives", "image")
    if kind != next(iter(spec.inputs.values())):
        raise DataError(
            f"data: '{spec.data.kind}' gives {kind}, the pipeline takes {next(iter(spec.inputs.values()))}"
        )
    if spec.data.labels == "teacher":
        if (writers := sum(node.kind == "text_decoder" for node in spec.nodes.values())) != 1:
            raise DataError(
                f"data.labels: 'teacher' takes one node of kind text_decoder, here are {writers}"
            )
        if not data.load("val", 1).names:
            raise DataError(
                f"data.labels: 'teacher' needs a data kind of files, not '{spec.data.kind}'"
            )
    return data


def describe_shortage(spec: Spec, data: Any) -> str:
    """What there is less of than the spec asks for, in words; empty: nothing, or data without an end."""
    if not hasattr(data, "counts"):
        return ""
    have, d = data.counts(), spec.data
    asked = {"train": d.calibration, "val": d.validation_pairs}
    short = [f"{have[split]} of {n} in {split}" for split, n in asked.items() if have[split] < n]
    return (
        f"fewer pairs than asked for: {', '.join(short)}; {have['test']} in test" if short else ""
    )


def _check_asked(spec: Spec, models: dict[str, Any]) -> None:
    """Raise `ModelError` when a spec cuts what a model does not have."""
    for n, node in spec.model_nodes().items():
        blocks, at = models[n].blocks, f"nodes.{n}.prune"
        has = sorted({b.group for b in blocks})
        for group in ("heads", "ffn", "tokens"):
            if getattr(node.prune, group) > 0 and group not in has:
                raise ModelError(
                    f"{at}.{group}: this model has no {group} to cut (it has: {', '.join(has)})"
                )
        if node.prune.drop > sum(bool(b.drop) for b in blocks):
            raise ModelError(
                f"{at}.drop: only {sum(bool(b.drop) for b in blocks)} of its blocks can be removed whole"
            )
        names = [b.name for b in blocks]
        if unknown := [name for name in node.prune.blocks if name not in names]:
            raise ModelError(
                f"{at}.blocks: no block is named '{unknown[0]}'; {suggest_nearest(unknown[0], names)}"
            )


def _possible(space: Space, models: dict[str, Any]) -> Space:
    """The space without ratios of unit kinds that a model does not have."""
    has = {f"nodes.{n}.prune.{b.group}" for n, m in models.items() for b in m.blocks}
    kinds = ("heads", "ffn", "tokens")
    keep = {
        p: d for p, d in space.dimensions.items() if p.rpartition(".")[2] not in kinds or p in has
    }
    return replace(space, dimensions=keep)


def _claim(folder: Path, spec: Spec, *, space: Space, resume: bool) -> None:
    record = folder / "spec.json"
    if record.exists() and resume:
        if _decisive(read_record(Spec, record)) != _decisive(spec):
            raise DataError(
                f"{folder}: begun with another spec (or other overrides); use a new --out"
            )
        if read_record(Space, folder / "space.json") != space:
            raise DataError(f"{folder}: begun with another search space; use a new --out")
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"{folder}: not empty; add --resume to go on with the run in it, or choose another --out"
        )
    write_record(folder / "space.json", space)
    write_record(record, spec)


def _keep_readings(run: RunContext) -> None:
    """A copy in the run folder: what is measured anew under the same name would be mixed with what was.

    Raises `DataError` where it differs.
    """
    if run.device_readings:
        record = run.folder / "readings.json"
        if record.exists() and read_record(Readings, record) != run.device_readings:
            raise DataError(
                f"measure.readings: {run.spec.measure.readings} has changed since this run; use a new --out"
            )
        write_record(record, run.device_readings, indent=None)


def _decisive(spec: Spec) -> Any:
    """The part of a spec that must not change between a run and its resumption: not where or how long it searches, nor
    where the readings of a device lie (what is in them is compared)."""
    search = replace(
        spec.search, workers=1, trials=0, level_switches=0, ray_address=None, executor="ray"
    )
    return to_plain(
        replace(
            spec,
            search=search,
            measure=replace(spec.measure, readings=spec.measure.readings and "given"),
        )
    )


def list_precisions(run: RunContext) -> dict[str, tuple[str, ...]]:
    """The precisions each node may have."""
    found = {}
    for n, node in run.spec.model_nodes().items():
        d = run.space.dimensions.get(f"nodes.{n}.precision")
        found[n] = (
            tuple(d.choices) if d else ("fp32" if node.precision == "auto" else node.precision,)
        )
    return found
