"""The cluster files of the docs are what Ray and Kubernetes read."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmcompress.cli.run import run_command

FOLDER = Path(__file__).parents[1] / "docs/how_to/clusters"


class Strict(BaseModel):
    """A part of a manifest: what it does not list is a mistake."""

    model_config = ConfigDict(extra="forbid")


class AuthOptions(Strict):
    """How the nodes of a cluster know each other (KubeRay 1.6)."""

    mode: Literal["token", "disabled"]


class HeadGroup(Strict):
    """The head node."""

    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(HeadGroup):
    """Some worker nodes that are alike."""

    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)


class ClusterSpec(Strict):
    """The cluster of a job."""

    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Strict):
    """What a RayJob asks for; the fields of KubeRay's reference that are used here."""

    entrypoint: str
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    backoffLimit: int = Field(ge=0)
    rayClusterSpec: ClusterSpec


class RayJob(Strict):
    """A job of KubeRay."""

    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: dict[str, str]
    spec: JobSpec


@pytest.fixture()
def ray_job():
    """The manifest of the docs as plain data."""
    return yaml.safe_load((FOLDER / "rayjob.yaml").read_text())


def test_ray_takes_the_file_for_machines_behind_ssh(monkeypatch, tmp_path):
    from ray.autoscaler._private import util

    monkeypatch.setenv("HOME", str(tmp_path))
    config = yaml.safe_load((FOLDER / "ray_up.yaml").read_text())
    util.validate_config(util.prepare_config(copy.deepcopy(config)))
    started = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    for line in started:
        assert line == "ray stop" or "RAY_AUTH_MODE=token" in line
    config["provider"]["type"] = "no such"
    with pytest.raises(Exception, match="no such"):
        util.validate_config(util.prepare_config(config))


def test_a_ray_job_has_known_fields_alone(ray_job):
    job = RayJob.model_validate(ray_job)
    assert job.spec.rayClusterSpec.authOptions.mode == "token"
    for group in job.spec.rayClusterSpec.workerGroupSpecs:
        assert group.minReplicas <= group.replicas <= group.maxReplicas
    ray_job["spec"]["entrypiont"] = "typo"
    with pytest.raises(ValidationError):
        RayJob.model_validate(ray_job)


def test_kubernetes_takes_every_pod_of_the_job(ray_job):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    spec = RayJob.model_validate(ray_job).spec.rayClusterSpec
    for group in (spec.headGroupSpec, *spec.workerGroupSpecs):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, **group.template}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        pod["spec"]["containers"][0]["imgae"] = "typo"
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod, "1.31", strict=True)


def test_the_command_of_the_job_is_one_of_ours(ray_job):
    program, command, *arguments = shlex.split(ray_job["spec"]["entrypoint"])
    assert (program, command) == ("mmcompress", "run")
    context = run_command.make_context("run", arguments)
    assert context.params["resume"] and context.params["ray_address"] == "auto"
