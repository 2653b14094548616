"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcompress.errors import DataError
from mmcompress.export.bundle import quantize_bundle
from mmcompress.measure.cost_model.calibrate import calibrate_predictor, plan_measurements
from mmcompress.measure.cost_model.drift import append_reference_run
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement, compute_node_ratios
from mmcompress.measure.cost_model.plan import (
    QUANTIZED_FOLDER,
    MeasurementPlan,
    list_reference_bundles,
    name_small_pipeline,
)
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.devices.readings import Readings
from mmcompress.measure.latency.bench import has_time_budget
from mmcompress.measure.latency.bench_with_replay import bench_with_replay
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.surgery import copy_resized
from mmcompress.registry import PRECISIONS
from mmcompress.run.profile import BENCH_REQUESTS, Profile
from mmcompress.runtime.machine import describe_cpu
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext, find_largest_position_cut, list_precisions


def build_predictor(run: RunContext, dense: Profile) -> Predictor:
    """The latency predictor: device table, calibrated node by node on whole exports. Cached in the run folder.

    Of another device it is made from that one's readings.
    """

    record = run.shared.predictor
    if record.exists():
        return read_record(Predictor, record)
    plan = plan_run_measurements(run, dense)
    with run.time_stage("device table"):
        if run.device_readings:
            found = _read_away(run.device_readings, plan)
        else:
            say = lambda what, share: run.on_progress("device table", what, share)
            whole = PipelineMeasurement(
                latency=dense.latency_ms,
                nodes=dense.nodes,
                model_share=dense.model_share,
                calls=dense.calls,
                in_session_ms=dense.in_session_ms,
            )
            beside = _rounded_shares(run, plan, dense=dense)
            found = calibrate_predictor(
                run.spec,
                run.models,
                plan=plan,
                calls=dense.calls,
                dense=whole,
                node_ratios=beside,
                folder=run.shared.path,
                benchmarker=run.bench,
                progress=say,
            )
    write_record(record, found)
    return found


def _rounded_shares(run: RunContext, plan: MeasurementPlan, *, dense: Profile) -> Any:
    """What the whole pipeline takes in every other precision that is searched, beside the dense one."""

    m = run.spec.measure
    run.on_progress("device table", "the whole pipeline in other precisions", 0.0)
    _write_aside(run, plan, folder=run.shared.path)
    if not plan.reference_names:
        return {}
    how = (dense.traces, dense.latency_ms.p50, m.threads, m.warmup, m.requests)
    bundles = list_reference_bundles(run.shared.path, plan.reference_names)
    found = bench_with_replay(
        bundles, run.load_requests(BENCH_REQUESTS), *how, benchmark=run.bench.benchmark_bundles
    )
    append_reference_run(run.shared.reference_runs, {p: found[p] for p in plan.every_precision})
    return compute_node_ratios(found)


def _write_aside(run: RunContext, plan: MeasurementPlan, *, folder: Path) -> None:
    """The dense pipeline with every node that may be of a precision in it, and smaller ones in each."""

    of = lambda p: {n: p if p in known else "fp32" for n, known in plan.precisions.items()}
    others = [p for p in plan.every_precision if p != "fp32"]
    for p in others:
        quantize_bundle(
            run.shared.baseline,
            run.models,
            precision=of(p),
            folder=folder / QUANTIZED_FOLDER / p,
        )
    for name, kept in plan.small_structures.items():
        models = {n: copy_resized(m, kept[n]) for n, m in run.models.items()}
        set_context_lengths(run.spec, models)
        source = folder / QUANTIZED_FOLDER / name_small_pipeline(name, "fp32")
        run.write_bundle(
            models, dict.fromkeys(models, "fp32"), kept=kept, folder=source, prove=False
        )
        for p in others:
            quantize_bundle(
                source,
                models,
                precision=of(p),
                folder=folder / QUANTIZED_FOLDER / name_small_pipeline(name, p),
            )


def plan_run_measurements(run: RunContext, dense: Profile) -> MeasurementPlan:
    """What has to be known of a device to search on it."""

    shortest = {n: find_largest_position_cut(run, n) for n in run.models}
    room = has_time_budget(dense.latency_ms.p50)
    return plan_measurements(
        run.spec,
        run.models,
        calls=dense.calls,
        largest_cut_shares=shortest,
        precisions=list_precisions(run),
        measure_small_pipelines=room,
    )


def _read_away(readings: Readings, plan: MeasurementPlan) -> Predictor:
    """The predictor of another device. Raises `DataError` when its readings lack what this run searches."""
    if (
        readings.plan.describe_blocks() != plan.describe_blocks()
        or readings.plan.reads != plan.reads
    ):
        raise DataError(
            "measure.readings: these readings are of a pipeline with other models or blocks, or wired otherwise"
        )
    for n, wanted in plan.precisions.items():
        for p in wanted:
            flags = set(getattr(PRECISIONS.get(p), "flags", ()))
            for whose, have in (
                ("that device", readings.cpu["flags"]),
                ("this machine, which judges,", describe_cpu()["flags"]),
            ):
                if flags and not flags & set(have):
                    raise DataError(
                        f"measure.readings: '{n}' may be {p}, for which {whose} lacks {' or '.join(sorted(flags))}"
                    )
        if lacking := [p for p in wanted if p not in readings.plan.precisions[n]]:
            raise DataError(
                f"measure.readings: '{n}' may be {lacking[0]}, which was not measured there"
            )
    measured = {n: max(w.cuts) for n, w in readings.plan.windows.items()}
    if short := [n for n, w in plan.windows.items() if max(w.cuts) > measured.get(n, 0)]:
        raise DataError(
            f"measure.readings: the space cuts more positions of '{short[0]}' than were measured there"
        )
    return readings.fit_predictor()
