"""Write what another device needs to measure a pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.calibrate import write_exports
from mmcompress.measure.cost_model.plan import BASELINE_FOLDER, QUANTIZED_FOLDER
from mmcompress.measure.devices.kit import KIT_FILE, Kit
from mmcompress.measure.latency.benchmark_in_subprocess import save_requests
from mmcompress.run.predictor import plan_run_measurements, write_reference_bundles
from mmcompress.run.profile import load_bench_requests, profile_pipeline
from mmcompress.storage import write_record
from mmcompress.workspace.context import RunContext


def write_kit(run: RunContext, folder: Path) -> Path:
    """Write a kit: dense bundle, requests, whole exports, and the plan of the device table.

    Args:
        run: The run; its dense pipeline is profiled where that was not done.
        folder: Where the kit goes; it must be new or empty.

    Returns:
        The folder.

    Raises:
        DataError: The folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; choose another --out")
    dense = profile_pipeline(run)
    plan = plan_run_measurements(run, dense)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run.shared.baseline, folder / BASELINE_FOLDER)
    texts = save_requests(folder, load_bench_requests(run))
    write_reference_bundles(run, plan, folder=folder / QUANTIZED_FOLDER)
    exports = []
    for export in write_exports(run.spec, run.models, plan=plan, calls=dense.calls, folder=folder):
        run.on_progress(
            "kit",
            f"{export.node}, {export.precision}, {export.params_m:.2f} M parameters",
            None,
        )
        exports.append(export)
    measure = run.spec.measure
    kit = Kit(
        pipeline=run.spec.name,
        threads=measure.threads,
        provider=measure.provider,
        batch=measure.batch,
        warmup=measure.warmup,
        requests=measure.requests,
        plan=plan,
        exports=tuple(exports),
        texts=texts,
    )
    write_record(folder / KIT_FILE, kit)
    return folder
