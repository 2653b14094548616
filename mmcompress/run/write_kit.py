"""TODO."""

from __future__ import annotations

import shutil
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.calibrate import write_exports
from mmcompress.measure.devices.kit import Kit
from mmcompress.measure.latency.benchmark_in_subprocess import save_requests
from mmcompress.run.predictor import _write_aside, plan_run_measurements
from mmcompress.run.profile import BENCH_REQUESTS, profile_pipeline
from mmcompress.storage import write_record
from mmcompress.workspace.context import RunContext


def write_kit(run: RunContext, folder: Path) -> Path:
    """A folder that another device measures: dense bundle, requests, whole exports, and what the table must hold."""

    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; choose another --out")
    dense, m = profile_pipeline(run), run.spec.measure
    plan = plan_run_measurements(run, dense)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run.shared.baseline, folder / "baseline")
    save_requests(folder, run.load_requests(BENCH_REQUESTS))
    _write_aside(run, plan, folder=folder)
    found = []
    for e in write_exports(run.spec, run.models, plan=plan, calls=dense.calls, folder=folder):
        run.on_progress("kit", f"{e.node}, {e.precision}, {e.params_m:.2f} M parameters", None)
        found.append(e)
    write_record(
        folder / "kit.json",
        Kit(
            pipeline=run.spec.name,
            threads=m.threads,
            warmup=m.warmup,
            requests=m.requests,
            plan=plan,
            exports=tuple(found),
        ),
    )
    return folder
