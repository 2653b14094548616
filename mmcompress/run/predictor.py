"""Stage: the latency predictor, from the device table, whole exports and whole pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.export.bundle import quantize_bundle
from mmcompress.measure.cost_model.calibrate import calibrate_predictor, plan_measurements
from mmcompress.measure.cost_model.drift import append_reference_run
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement, compute_node_ratios
from mmcompress.measure.cost_model.plan import (
    MeasurementPlan,
    list_reference_bundles,
    name_small_pipeline,
)
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.devices.readings import Readings
from mmcompress.measure.latency.bench import has_time_budget
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.surgery import copy_resized
from mmcompress.registry import PRECISIONS
from mmcompress.run.profile import Profile, bench_beside_dense
from mmcompress.runtime.machine import describe_cpu
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext, find_largest_position_cut, list_precisions


def build_predictor(run: RunContext, dense: Profile) -> Predictor:
    """Return the latency predictor, from the run folder where it is there.

    For another device it is made of that device's readings, else of measurements on this machine.

    Raises:
        DataError: The readings lack something that this run searches.
    """
    record = run.shared.predictor
    if record.exists():
        return read_record(Predictor, record)
    plan = plan_run_measurements(run, dense)
    with run.time_stage("device table"):
        if run.device_readings:
            predictor = _predict_from_readings(run.device_readings, plan)
        else:
            predictor = _calibrate_on_this_machine(run, plan, dense=dense)
    write_record(record, predictor)
    return predictor


def plan_run_measurements(run: RunContext, dense: Profile) -> MeasurementPlan:
    """Return what has to be known of a device to search on it."""
    return plan_measurements(
        run.spec,
        run.models,
        calls=dense.calls,
        largest_cut_shares={name: find_largest_position_cut(run, name) for name in run.models},
        precisions=list_precisions(run),
        measure_small_pipelines=has_time_budget(dense.latency_ms.p50),
    )


def _calibrate_on_this_machine(
    run: RunContext, plan: MeasurementPlan, *, dense: Profile
) -> Predictor:
    """Measure what the plan asks for, and fit the predictor to it node by node."""
    measured = PipelineMeasurement(
        latency=dense.latency_ms,
        nodes=dense.nodes,
        model_share=dense.model_share,
        calls=dense.calls,
        in_session_ms=dense.in_session_ms,
    )
    return calibrate_predictor(
        run.spec,
        run.models,
        plan=plan,
        calls=dense.calls,
        dense=measured,
        node_ratios=_measure_node_ratios(run, plan, dense=dense),
        folder=run.shared.path,
        benchmarker=run.bench,
        progress=partial(run.on_progress, "device table"),
    )


def _measure_node_ratios(
    run: RunContext, plan: MeasurementPlan, *, dense: Profile
) -> dict[str, dict[str, float]]:
    """Measure the pipeline in other precisions, and smaller ones, beside the dense one.

    Returns:
        Latency of each node / latency of the same node of the dense pipeline, by pipeline and node.
    """
    write_reference_bundles(run, plan, folder=run.shared.quantized)
    if not plan.reference_names:
        return {}
    names = ", ".join(plan.reference_names)
    run.on_progress("device table", f"timing the whole pipeline as {names}", 0.0)
    samples = bench_beside_dense(
        run,
        list_reference_bundles(run.shared.path, plan.reference_names),
        dense=dense,
        max_requests=run.spec.measure.requests,
    )
    by_precision = {precision: samples[precision] for precision in plan.every_precision}
    append_reference_run(run.shared.reference_runs, by_precision)
    return compute_node_ratios(samples)


def write_reference_bundles(run: RunContext, plan: MeasurementPlan, *, folder: Path) -> None:
    """Write the dense pipeline in every other precision, and smaller pipelines in every precision.

    Args:
        run: The run; its dense bundle must have been written.
        plan: The precisions and the smaller structures.
        folder: Where the bundles go, one folder each.
    """
    other_precisions = [precision for precision in plan.every_precision if precision != "fp32"]

    def tell(pipeline: str) -> None:
        run.on_progress("device table", f"writing {pipeline}, to be timed", 0.0)

    for precision in other_precisions:
        tell(f"the whole pipeline in {precision}")
        quantize_bundle(
            run.shared.baseline,
            run.models,
            precision=_choose_node_precisions(plan, precision),
            folder=folder / precision,
        )
    for name, kept in plan.small_structures.items():
        tell(f"a smaller pipeline ({name})")
        models = {
            node_name: copy_resized(model, kept[node_name])
            for node_name, model in run.models.items()
        }
        set_context_lengths(run.spec, models)
        fp32_bundle = folder / name_small_pipeline(name, "fp32")
        run.write_bundle(
            models, dict.fromkeys(models, "fp32"), kept=kept, folder=fp32_bundle, prove=False
        )
        for precision in other_precisions:
            quantize_bundle(
                fp32_bundle,
                models,
                precision=_choose_node_precisions(plan, precision),
                folder=folder / name_small_pipeline(name, precision),
            )


def _choose_node_precisions(plan: MeasurementPlan, precision: str) -> dict[str, str]:
    """Return the given precision for every node that may have it, and fp32 for the others."""
    return {
        node_name: precision if precision in options else "fp32"
        for node_name, options in plan.precisions.items()
    }


def _predict_from_readings(readings: Readings, plan: MeasurementPlan) -> Predictor:
    """Return the predictor of another device.

    Raises:
        DataError: The readings lack something that this run searches.
    """
    same_blocks = readings.plan.describe_blocks() == plan.describe_blocks()
    if not same_blocks or readings.plan.reads != plan.reads:
        raise DataError(
            "measure.readings: these readings are of a pipeline with other models or blocks, "
            "or wired otherwise"
        )
    for node_name, wanted in plan.precisions.items():
        for precision in wanted:
            _check_precision_flags(readings, node_name, precision=precision)
        for precision in wanted:
            if precision not in readings.plan.precisions[node_name]:
                raise DataError(
                    f"measure.readings: '{node_name}' may be {precision}, "
                    "which was not measured there"
                )
    _check_measured_cuts(readings, plan)
    return readings.fit_predictor()


def _check_precision_flags(readings: Readings, node_name: str, *, precision: str) -> None:
    """Raise `DataError` when one of the machines lacks instructions that a precision needs."""
    required_flags = set(PRECISIONS.get(precision).cpu_flags)
    machines = {
        "that device": readings.cpu["flags"],
        "this machine, which evaluates the trials,": describe_cpu()["flags"],
    }
    for machine, flags in machines.items():
        if required_flags and not required_flags & set(flags):
            raise DataError(
                f"measure.readings: '{node_name}' may be {precision}, for which {machine} lacks "
                f"{' or '.join(sorted(required_flags))}"
            )


def _check_measured_cuts(readings: Readings, plan: MeasurementPlan) -> None:
    """Raise `DataError` when the space cuts more positions than were measured on the device."""
    measured = {name: max(window.cuts) for name, window in readings.plan.windows.items()}
    for node_name, window in plan.windows.items():
        if max(window.cuts) > measured.get(node_name, 0):
            raise DataError(
                f"measure.readings: the space cuts more positions of '{node_name}' "
                "than were measured there"
            )
