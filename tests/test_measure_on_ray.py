"""Latencies are measured on the node of a cluster that is the target device, and alone there."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from small_cluster import by_value

from mmcompress.errors import BundleError, ClusterError, SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.measure.benchmarker import Benchmarker
from mmcompress.measure.latency.bench import BenchmarkOptions
from mmcompress.measure.latency.benchmark_in_subprocess import BenchmarkJob, bench_repeated
from mmcompress.run.begin_run import open_benchmarker
from mmcompress.run.measure_on_ray import (
    NodeBenchmarker,
    choose_node,
    open_node_benchmarker,
    pack_request_files,
)
from mmcompress.run.profile import Profile
from mmcompress.search.executors import ExecutorSettings
from mmcompress.search.ray_executor import use_ray
from mmcompress.storage import read_record

BUNDLE = Path(__file__).parent / "earlier_bundles/format_2"
EDGE = {"edge_box": 1.0}


def make_node(node_id, *, is_alive=True, **resources):
    return {
        "NodeID": node_id,
        "NodeManagerAddress": f"10.0.0.{node_id}",
        "Alive": is_alive,
        "Resources": {"CPU": 4.0, "memory": 1e9, **resources},
    }


def test_a_measurement_reserves_everything_of_the_node_that_carries_the_resource():
    nodes = [make_node("3"), make_node("2", edge_box=2.0, GPU=1.0), make_node("1", is_alive=False)]
    node = choose_node(nodes, EDGE)
    assert node.node_id == "2"
    assert node.reserved == {"CPU": 4.0, "GPU": 1.0, "edge_box": 1.0}


@pytest.mark.parametrize("nodes", [[], [make_node("1")], [make_node("1", edge_box=0.5)]])
def test_a_cluster_without_the_node_is_refused_with_what_to_do(nodes):
    with pytest.raises(
        ClusterError, match=r"carries 1 edge_box\. .*--resources '\{\"edge_box\": 1"
    ):
        choose_node(nodes, EDGE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"search.executor": "inline"}, "needs search.executor: ray; it is inline"),
        ({"search.executor": "ray", "measure.readings": "a.json"}, "leave one of them"),
    ],
)
def test_a_spec_that_says_two_places_is_refused(tiny, overrides, message):
    with pytest.raises(SpecError, match=message):
        load_spec(tiny / "spec.yaml", {"resources.measure.custom": EDGE, **overrides})


@pytest.mark.parametrize("name", ["CPU", "GPU", "memory"])
def test_a_resource_of_every_node_is_no_device(tiny, name):
    with pytest.raises(SpecError, match=f"{name} is a resource of every node"):
        load_spec(tiny / "spec.yaml", {"resources.measure.custom": {name: 1}})


def test_without_a_resource_this_machine_measures(tiny):
    with open_benchmarker(load_spec(tiny / "spec.yaml")) as bench:
        assert type(bench) is Benchmarker


def test_files_that_requests_name_travel_with_them(tmp_path):
    """A text is no file, even one that is called like a file."""
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(picture)
    bundle = shutil.copytree(BUNDLE, tmp_path / "bundle")
    requests = (
        {"image": str(picture), "text": str(picture)},
        {"image": str(picture)},
        {"text": "a"},
    )
    job = BenchmarkJob(
        bundles={"b": str(bundle)},
        requests=requests,
        options=BenchmarkOptions(warmup=1, max_requests=1),
    )
    manifest = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(
        manifest.replace('"image": "image"', '"image": "image", "text": "text"')
    )
    packed, files = pack_request_files(job)
    assert files == {"0.png": picture.read_bytes()}
    assert packed == ({"image": "0.png", "text": str(picture)}, {"image": "0.png"}, {"text": "a"})


def note_times(seconds):
    """Take a while on a node; returns its name and when that was."""
    import time

    import ray

    start = time.time()
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id(), start, time.time()


@pytest.mark.very_slow
def test_nothing_else_runs_on_the_node_while_it_measures(start_cluster):
    """Tasks before, during and after: by the times that they noted themselves."""
    one = start_cluster({"num_cpus": 2}, {"num_cpus": 2, "resources": {"edge_box": 1}})
    with use_ray(ExecutorSettings(address=one.cluster.address), cpus=2):
        bench = NodeBenchmarker(choose_node(ray.nodes(), EDGE))
        task = ray.remote(by_value(note_times)).options(num_cpus=1, scheduling_strategy="SPREAD")
        before = [task.remote(0.5) for _ in range(6)]
        time.sleep(0.2)
        measured = [bench.call_alone(partial(by_value(note_times), 0.7)) for _ in range(2)]
        after = [task.remote(0.5) for _ in range(6)]
        measured.append(bench.call_alone(partial(by_value(note_times), 0.7)))
        others = ray.get([*before, *after])
    assert {node for node, _, _ in measured} == {bench.node.node_id}
    assert len({node for node, _, _ in others}) == 2
    for node, start, end in others:
        for measuring_node, measuring_start, measuring_end in measured:
            is_apart = end <= measuring_start or measuring_end <= start
            assert node != measuring_node or is_apart


@pytest.mark.very_slow
def test_a_profile_is_measured_on_the_node(start_cluster, tiny, tmp_path):
    """Bundles, requests, exports and table go there; what fails there is raised here."""
    from mmcompress.cli.profile_tables import profile_spec

    one = start_cluster({"num_cpus": 2, "resources": {"edge_box": 1}})
    overrides = {
        "search.executor": "ray",
        "search.ray_address": one.cluster.address,
        "resources.measure.custom": EDGE,
        "measure.requests": 8,
    }
    profile_spec(str(tiny / "spec.yaml"), str(tmp_path / "r"), overrides=overrides, resume=False)
    profile = read_record(Profile, tmp_path / "r/profile.json")
    assert profile.latency_ms.p50 > 0 and set(profile.nodes) >= {"vision", "captioner", "text"}
    assert (tmp_path / "r/predictor.json").exists()

    spec = load_spec(tiny / "spec.yaml", overrides)
    with open_node_benchmarker(spec) as bench:
        assert bench.describe_cpu() == Benchmarker().describe_cpu()
        assert bench.measure_memory_mb(BUNDLE) > bench.measure_memory_mb() > 0
        torn = shutil.copytree(BUNDLE, tmp_path / "torn")
        next(torn.rglob("*.onnx")).write_bytes(b"")
        # A bundle of the same manifest is known there already.
        manifest = torn / "manifest.json"
        manifest.write_text(manifest.read_text() + "\n")
        with pytest.raises(BundleError):
            bench_repeated(
                {"torn": torn},
                [{"image": np.zeros((40, 32, 3), dtype=np.uint8)}],
                options=BenchmarkOptions(warmup=1, max_requests=1, loads=1),
                benchmark=bench.benchmark_bundles,
            )
