"""What can fail at the end of a run is tried at its beginning."""

from __future__ import annotations

from concurrent.futures import Executor

import pytest
from click.testing import CliRunner

from mmcompress.cli import main
from mmcompress.errors import ClusterError, DataError, ModelError
from mmcompress.registry import EXECUTORS, PRECISIONS
from mmcompress.run import preflight
from mmcompress.run.preflight import (
    check_everything,
    check_machine,
    estimate_needs,
    measure_activations_mb,
)
from mmcompress.workspace.context import open_run


class BrokenWorkers(Executor):
    """Workers that lack what a task imports."""

    def __init__(self, context, workers, settings):
        pass

    def submit(self, task, /, *args):
        raise ImportError("no module named 'own_criterion'")


@pytest.fixture()
def tiny_run(tiny, tmp_path):
    def open_tiny(**overrides):
        return open_run(tiny / "spec.yaml", tmp_path / "r", overrides=overrides)

    return open_tiny


def test_needs_grow_with_workers(tiny_run):
    alone = estimate_needs(tiny_run())
    assert alone.memory_mb > preflight.RUNTIME_MB and alone.disk_mb > 0
    assert "GB of memory" in alone.describe() and "MB of disk" in alone.describe()


def test_every_target_takes_its_share_of_the_disk(tiny, tmp_path):
    disk_mb = []
    for target in ("1.5x", "1.5x,2x", "1.5x,2x,3x"):
        run = open_run(tiny / "spec.yaml", tmp_path / target, overrides={"target": target})
        disk_mb.append(estimate_needs(run).disk_mb)
    assert disk_mb[2] - disk_mb[1] == pytest.approx(disk_mb[1] - disk_mb[0])
    assert disk_mb[1] - disk_mb[0] > 0.3 * (disk_mb[0] - preflight.RECORDS_MB)


def test_needs_follow_what_training_holds(tiny, tmp_path):
    """A larger batch keeps more for the gradients; without training, there are none."""

    def open_tiny(name, **overrides):
        return open_run(tiny / "spec.yaml", tmp_path / name, overrides=overrides)

    small = estimate_needs(open_tiny("small", **{"distill.batch": 4}))
    large = estimate_needs(open_tiny("large", **{"distill.batch": 64}))
    untrained = estimate_needs(open_tiny("untrained", **{"distill.steps": 0}))
    assert untrained.memory_mb < small.memory_mb < large.memory_mb
    run = open_tiny("any")
    pair = run.pipeline.collate(run.data.load("val", 1))
    pairs = run.pipeline.collate(run.data.load("val", 4))
    one = measure_activations_mb(run, pair)
    assert one > 0
    assert measure_activations_mb(run, pairs) == pytest.approx(4 * one, rel=0.5)
    expected = 60 * one
    assert large.memory_mb - small.memory_mb == pytest.approx(expected, rel=0.01)


def test_workers_that_cannot_run_a_task_are_told_before_anything_is_measured(tiny_run):
    EXECUTORS.add("broken", BrokenWorkers)
    try:
        run = tiny_run(**{"search.executor": "broken", "search.workers": 2})
        with pytest.raises(ClusterError, match=r"can.t run a task: ImportError.*own_criterion"):
            check_machine(run)
    finally:
        EXECUTORS._entries.pop("broken")
    assert not run.folder.profile.exists()


def test_a_disk_that_is_too_full_is_told(tiny_run, monkeypatch):
    monkeypatch.setattr(preflight, "SHARED_COPIES_ON_DISK", 1e15)
    with pytest.raises(DataError, match="are free on this disk, the run needs about"):
        check_machine(tiny_run())


@pytest.mark.slow
def test_a_precision_that_does_not_run_here_is_told(tiny_run, tmp_path):
    PRECISIONS.add("broken", "mmcompress.quantize.schemes.no_such:SCHEME", needs_calibration=False)
    try:
        run = tiny_run(**{"nodes.text.precision": "broken"})
        with pytest.raises(ModelError, match=r"nodes.text.precision: broken can't run"):
            check_everything(run, tmp_path / "bundles")
    finally:
        PRECISIONS._entries.pop("broken")


@pytest.mark.slow
def test_validate_goes_the_whole_way_on_the_dense_pipeline(tiny):
    done = CliRunner().invoke(main, ["validate", "--deep", str(tiny / "spec.yaml")])
    assert done.exit_code == 0, done.output
    assert "proofs of the dense pipeline hold" in done.output and "is valid" in done.output
    assert not list(tiny.glob("run-*"))
