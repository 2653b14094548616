"""A search for a device that is not this machine: kit, readings, run, check."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from one_node import write_one_node

from mmcompress.cli import main
from mmcompress.errors import DataError
from mmcompress.graph.structure import Candidate
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.devices.bundle_check import BundleCheck
from mmcompress.measure.devices.kit import Kit, open_kit
from mmcompress.measure.devices.measure_kit import measure_kit
from mmcompress.measure.devices.readings import Readings
from mmcompress.results.records import Summary
from mmcompress.run import run_targets as workflow
from mmcompress.run.assemble import replace_measurements
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.write_kit import write_kit
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import open_run

LIGHT = """\
import sys
for m in ("torch", "transformers", "open_clip", "ray", "optuna", "safetensors", "scipy"): sys.modules[m] = None
from mmcompress.cli import main
main(sys.argv[1:])
"""
QUICK = {"search.trials": 2, "search.level_switches": 0, "distill.steps": 1}


def on_device(*arguments):
    """The command where none of the training packages can be imported."""
    command = [sys.executable, "-c", LIGHT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def kit(tiny, machine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("device") / "kit"
    r = open_run(tiny / "spec.yaml", folder.with_name("host"), **machine)
    return write_kit(r, folder)


@pytest.fixture(scope="module")
def readings(kit, machine):
    """What a simulated device measures."""
    measured = measure_kit(kit, bench=machine["bench"])
    return write_record(kit.parent / "readings.json", measured)


@pytest.fixture(scope="module")
def real_kit(tiny, machine, tmp_path_factory):
    """A kit of a text encoder alone, in both precisions: every further node takes seconds."""
    folder = tmp_path_factory.mktemp("real")
    run = open_run(write_one_node(folder, tiny), folder / "host", **machine)
    return write_kit(run, folder / "kit")


@pytest.fixture(scope="module")
def real_readings(real_kit):
    """What this machine measures, by the command and where no training package can be imported."""
    readings = real_kit.with_name("real.json")
    done = on_device("device", "measure", real_kit, "--out", readings)
    assert done.returncode == 0, done.stderr
    return readings


@pytest.fixture(scope="module")
def elsewhere(readings):
    """The readings as if they came from another machine, three times as slow, that spends next to nothing between its
    models: where this one was interrupted at it, no target might be within reach."""
    data = json.loads(readings.read_text())
    data["device"] = data["table"]["device"] = "another"
    data["cpu"]["name"] = "Slow One"
    whole, nodes = data["baseline"]["latency"], data["baseline"]["nodes"].values()
    ms = {"p50": 1.05 * sum(x["p50"] for x in nodes)}
    whole |= ms | {"p95": ms["p50"] * max(1.0, whole["p95"] / whole["p50"])}
    for latency in (whole, *nodes):
        for k in ("p50", "p95"):
            latency[k] *= 3
    path = readings.with_name("elsewhere.json")
    path.write_text(json.dumps(data))
    return path


def check_predictor(readings):
    """Readings make the predictor that their machine would make."""
    found = read_record(Readings, readings)
    p = found.fit_predictor()
    whole = {n: {} for n in found.plan.deployed}
    assert p(Candidate(kept_units=whole, precision=dict.fromkeys(whole, "fp32"))) == pytest.approx(
        found.baseline.latency.p50, rel=1e-3
    )
    assert read_record(Predictor, write_record(readings.with_name("predictor.json"), p)) == p
    assert {e.precision for e in found.exports} == {"fp32", "int8"} and min(found.export_ms) > 0


def test_the_readings_make_the_predictor_that_their_machine_would_make(readings):
    check_predictor(readings)


@pytest.mark.slow
def test_the_readings_make_the_predictor_that_this_machine_would_make(real_readings):
    check_predictor(real_readings)


@pytest.mark.slow
def test_a_second_kit_of_a_device_finds_its_table_measured(real_kit, real_readings, monkeypatch):
    from mmcompress.measure.cost_model import device_table as table
    from mmcompress.measure.cost_model.microbenchmarks import build_stack

    stacked = []
    monkeypatch.setattr(
        "mmcompress.measure.cost_model.device_table.build_stack",
        lambda *a: stacked.append(a) or build_stack(*a),
    )
    assert (
        measure_kit(real_kit).table.index_rows().keys()
        >= read_record(Readings, real_readings).table.index_rows().keys()
    )
    device = read_record(Readings, real_readings).device
    assert not stacked and table.complete_table([], 1).device == device


def test_readings_put_together_from_two_devices_are_refused(tiny, readings, tmp_path):
    data = json.loads(readings.read_text())
    data["device"] = "another"
    (tmp_path / "mixed.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="the pipelines of another and the table of"):
        workflow.run(
            tiny / "spec.yaml",
            tmp_path / "r",
            overrides={"measure.readings": str(tmp_path / "mixed.json")},
        )


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_run_for_another_device_is_predicted_then_checked_there(
    tiny, kit, elsewhere, tmp_path, machine
):
    elsewhere = Path(shutil.copy(elsewhere, tmp_path / "elsewhere.json"))
    changes = {**QUICK, "measure.readings": str(elsewhere), "target": "1.1x p95"}
    s = workflow.run(tiny / "spec.yaml", tmp_path / "r", overrides=changes, **machine)
    theirs = read_record(Readings, elsewhere)
    assert s.device == "another" and s.cpu["name"] == "Slow One"
    assert s.baseline.latency_ms == theirs.baseline.latency
    latency, dense = s.compressed.latency_ms, s.baseline.latency_ms
    # The target is of a percentile, so that is what is predicted.
    assert latency.n == 0 and latency.p95 == pytest.approx(s.predicted_latency_ms_p50)
    assert s.target.statistic == "p95" and s.target.met == (latency.p95 <= s.target.latency_ms)
    assert latency.p95 / latency.p50 == pytest.approx(dense.p95 / dense.p50)
    assert any("device check" in w for w in s.warnings)
    assert "predicted" in (tmp_path / "r" / "report.html").read_text()

    done = on_device(
        "device", "check", kit, tmp_path / "r" / "bundle", "--out", tmp_path / "check.json"
    )
    assert done.returncode == 0, done.stderr
    here = read_record(BundleCheck, tmp_path / "check.json")
    with pytest.raises(DataError, match="another device"):
        replace_measurements(s, here, dense_identity=here.dense, bundle_identity=here.bundle)
    dense = here.baseline.latency
    quick = dataclasses.replace(here.compressed.latency, p50=dense.p50 / 2, p95=dense.p95 / 2)
    there = dataclasses.replace(
        here, device="another", compressed=dataclasses.replace(here.compressed, latency=quick)
    )
    for dense, bundle in ((here.dense, "0"), ("0", here.bundle)):
        with pytest.raises(DataError, match="other bundles"):
            replace_measurements(s, there, dense_identity=dense, bundle_identity=bundle)
    write_record(tmp_path / "check.json", there)
    told = CliRunner().invoke(
        main, ["report", str(tmp_path / "r"), "--measured", str(tmp_path / "check.json")]
    )
    assert told.exit_code == 0, told.output
    new = read_record(Summary, tmp_path / "r" / "summary.json")
    assert (
        new.compressed.latency_ms == there.compressed.latency and new.compressed.latency_ms.n >= 8
    )
    assert new.target.met
    assert not any("device check" in w for w in new.warnings)
    go_on = {"overrides": changes, "resume": True, **machine}
    again = workflow.run(tiny / "spec.yaml", tmp_path / "r", **go_on)
    assert again.compressed.latency_ms == there.compressed.latency  # going on with it keeps them
    slow = dataclasses.replace(there.compressed, latency=there.baseline.latency)
    write_record(tmp_path / "check.json", dataclasses.replace(there, compressed=slow))
    told = CliRunner().invoke(
        main, ["report", str(tmp_path / "r"), "--measured", str(tmp_path / "check.json")]
    )
    assert told.exit_code == 3 and "--resume" in told.output
    before = read_record(FittedStructure, tmp_path / "r" / "fitted.json")
    more = workflow.run(tiny / "spec.yaml", tmp_path / "r", **go_on)
    after = read_record(
        FittedStructure, tmp_path / "r" / "fitted.json"
    )  # what was measured there corrects the prediction here
    assert (
        before.final_to_fitted == 1
        and after.final_to_fitted > 1
        and more.compressed.latency_ms.n == 0
    )
    data = json.loads(elsewhere.read_text())
    anew = write_record(
        tmp_path / "anew.json", {**data, "export_ms": [2 * x for x in data["export_ms"]]}
    )
    shutil.copy(anew, elsewhere)
    with pytest.raises(DataError, match="has changed since this run"):
        workflow.run(tiny / "spec.yaml", tmp_path / "r", **go_on)


def test_a_run_profiled_on_another_device_is_not_gone_on_with(run_folder, tiny, tmp_path):
    shutil.copytree(run_folder, tmp_path / "r")
    data = json.loads((tmp_path / "r" / "profile.json").read_text())
    (tmp_path / "r" / "profile.json").write_text(json.dumps({**data, "device": "another"}))
    with pytest.raises(DataError, match="profiled on another device"):
        workflow.run(tiny / "spec.yaml", tmp_path / "r", resume=True)


@pytest.mark.slow
def test_a_precision_that_the_device_gets_wrong_is_refused(
    tiny, readings, tmp_path, machine, monkeypatch
):
    from mmcompress.quantize.schemes import dynamic as precision

    monkeypatch.setattr(
        precision, "INT8", dataclasses.replace(precision.INT8, cpu_flags=("no_such_flag",))
    )
    with pytest.raises(DataError, match="that device lacks no_such_flag"):
        workflow.run(
            tiny / "spec.yaml",
            tmp_path / "r",
            overrides={**QUICK, "measure.readings": str(readings)},
            **machine,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measure.threads": 2}, "with 1 threads, this is 'tiny' with 2"),
        ({"name": "other"}, "is of 'tiny'"),
        ({"nodes.text.precision": "w8"}, "'text' may be w8, which was not measured there"),
        ({"measure.parallel": True}, "or wired otherwise"),
    ],
)
@pytest.mark.examples(2)
def test_readings_of_something_else_are_refused(tiny, readings, tmp_path, machine, change, message):
    with pytest.raises(DataError, match=message):
        workflow.run(
            tiny / "spec.yaml",
            tmp_path / "r",
            overrides={**QUICK, "measure.readings": str(readings), **change},
            **machine,
        )


def test_what_is_no_kit_or_no_readings_is_told(tmp_path, tiny, kit):
    with pytest.raises(DataError, match="not a kit"):
        open_kit(tmp_path)
    (tmp_path / "kit.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        open_kit(tmp_path)
    assert read_record(Kit, kit / "kit.json").pipeline == "tiny"
    with pytest.raises(DataError, match="can't be read"):
        workflow.run(
            tiny / "spec.yaml",
            tmp_path / "r",
            overrides={"measure.readings": str(tmp_path / "none.json")},
        )
    assert not (tmp_path / "r").exists()
