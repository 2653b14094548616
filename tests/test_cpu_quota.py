"""A container that bounds the processors: cores, threads and the fingerprint know of it."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from mmcompress.graph.load_spec import load_spec
from mmcompress.runtime import machine
from mmcompress.runtime.machine import (
    count_cores,
    describe_cpu,
    fingerprint_device,
    read_cpu_quota,
)
from mmcompress.workspace.heed_cpu_quota import heed_cpu_quota


def write_groups(folder, **files):
    """Write files of control groups; `__` stands for a folder."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "nonsense\n"}, None),
        ({"cpu__cpu.cfs_quota_us": "-1\n", "cpu__cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu__cpu.cfs_quota_us": "50000\n", "cpu__cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_both_forms_of_a_bound_are_read(tmp_path, files, quota):
    assert read_cpu_quota(write_groups(tmp_path, **files)) == quota


@pytest.fixture()
def half_a_core(tmp_path, monkeypatch):
    """A container that may use half a core."""
    free = fingerprint_device(1)
    folder = write_groups(tmp_path, **{"cpu.max": "50000 100000"})
    monkeypatch.setattr(machine, "CONTROL_GROUPS", folder)
    threads = torch.get_num_threads()
    yield free
    torch.set_num_threads(threads)


def test_cores_and_fingerprint_are_those_of_the_container(half_a_core):
    assert count_cores() == 1
    assert describe_cpu()["quota"] == 0.5
    assert fingerprint_device(1) != half_a_core


def test_a_bound_above_the_machine_changes_no_count(tmp_path, monkeypatch):
    cores = os.cpu_count() or 1
    folder = write_groups(tmp_path, **{"cpu.max": f"{100 * cores}00000 100000"})
    before = count_cores()
    monkeypatch.setattr(machine, "CONTROL_GROUPS", folder)
    assert count_cores() == before


def test_torch_takes_no_more_threads_and_the_spec_is_warned_of(half_a_core, tiny):
    spec = load_spec(tiny / "spec.yaml")
    spec = replace(spec, measure=replace(spec.measure, threads=2))
    told = []
    heed_cpu_quota(spec, lambda stage, message, share: told.append(message))
    assert torch.get_num_threads() == 1
    assert "measure.threads: 2, and this container may use 0.5 cores" in told[0]


def test_without_a_container_nothing_is_told(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    threads = torch.get_num_threads()
    told = []
    heed_cpu_quota(load_spec(tiny / "spec.yaml"), lambda *message: told.append(message))
    assert told == [] and torch.get_num_threads() == threads
