"""What the nodes of a Ray cluster must have in common with the process that sends them work.

A trial on a node with another torch gives other losses, and one with another Python can't read what
is sent to it. So versions are compared on every node before the work. No torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mmcompress.errors import ClusterError
from mmcompress.spec.schema import Cluster, RuntimeEnv

COMPARED_PACKAGES = ("ray", "torch", "transformers", "onnxruntime")
"""Packages whose versions must be the same on every node."""

EXPECTED_VARIABLE = "MMCOMPRESS_EXPECTED_VERSIONS"
"""Environment variable of a job: the versions of the machine that sent it, as JSON."""

ANSWER_SECONDS = 120.0
"""Seconds that a node may take to answer: it may have to install packages first."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node says of itself."""

    versions: dict[str, str]
    """Version by package, of those that are installed, and of `python`."""
    missing_secrets: tuple[str, ...]
    """Environment variables that are not set there."""


def list_versions() -> dict[str, str]:
    """Return the versions of this process that nodes must have: `3.11` of Python, whole ones of
    packages. What follows a `+`, such as the CUDA that torch is built for, may differ."""
    major, minor, _ = platform.python_version_tuple()
    versions = {"python": f"{major}.{minor}"}
    for package in COMPARED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def list_runtime_env(
    runtime_env: RuntimeEnv, *, expected: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what Ray is asked to prepare for a run, as its `runtime_env` takes it.

    Args:
        runtime_env: What the spec asks for.
        expected: The versions that the job compares its nodes with; None: those of its own
            process.
    """
    asked: dict[str, Any] = {}
    variables = dict(runtime_env.env_vars)
    if expected is not None:
        variables[EXPECTED_VARIABLE] = json.dumps(dict(expected))
    if variables:
        asked["env_vars"] = variables
    if runtime_env.pip:
        asked["pip"] = list(runtime_env.pip)
    return asked


def list_missing_in_job(asked: Mapping[str, Any], job_config: str) -> dict[str, Any]:
    """Return what a run asks for and the job that it runs in does not bring along.

    `mmcompress submit` gives a job all of it. A job that was sent otherwise may lack it, and Ray
    refuses what is asked for twice.

    Args:
        asked: What Ray is asked for, as its `runtime_env` takes it.
        job_config: The JSON that Ray leaves in the environment of a job.
    """
    brought: dict[str, Any] = json.loads(job_config).get("runtime_env") or {}
    missing = {key: value for key, value in asked.items() if key not in brought}
    known_variables = brought.get("env_vars") or {}
    variables: dict[str, str] = {}
    for name, value in (asked.get("env_vars") or {}).items():
        if name not in known_variables:
            variables[name] = value
    missing.pop("env_vars", None)
    if variables:
        missing["env_vars"] = variables
    return missing


def read_expected_versions() -> dict[str, str]:
    """Return the versions that nodes must have: those of the machine that sent this job."""
    text = os.environ.get(EXPECTED_VARIABLE)
    if text is None:
        return list_versions()
    expected: dict[str, str] = json.loads(text)
    return expected


def look_at_node(secrets: tuple[str, ...]) -> NodeFacts:
    """Return what this node says of itself. It runs as a task there."""
    missing = tuple(name for name in secrets if not os.environ.get(name))
    return NodeFacts(versions=list_versions(), missing_secrets=missing)


def check_nodes(cluster: Cluster) -> None:
    """Ask every node of the cluster for its versions, and for the secrets that a run needs.

    Args:
        cluster: What the nodes need.

    Raises:
        ClusterError: A node does not answer, has another version, or lacks a secret. Each such node
            is named.
    """
    ask = ray.remote(look_at_node)
    asked: dict[str, Any] = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            name = f"node {node['NodeID'][:8]} ({node['NodeManagerAddress']})"
            placement = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            asked[name] = ask.options(
                num_cpus=0, max_retries=0, scheduling_strategy=placement
            ).remote(cluster.secrets)
    expected = read_expected_versions()
    problems: list[str] = []
    for name, answer in asked.items():
        try:
            facts: NodeFacts = ray.get(answer, timeout=ANSWER_SECONDS)
        except GetTimeoutError:
            problems.append(f"{name} does not answer within {ANSWER_SECONDS:.0f} s")
        except OutOfMemoryError:
            problems.append(f"{name} has no memory left for a task")
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            problems.append(f"{name} can't run a task: {reason}")
        else:
            problems += describe_differences(name, facts, expected=expected)
    if problems:
        raise ClusterError("\n".join(problems))


def describe_differences(name: str, facts: NodeFacts, *, expected: Mapping[str, str]) -> list[str]:
    """Return in words what a node has otherwise than is expected; nothing where all is the same.

    Args:
        name: The node, for a person.
        facts: What it says of itself.
        expected: Version by package. What this side lacks is not compared.
    """
    problems: list[str] = []
    for package, version in expected.items():
        found = facts.versions.get(package)
        if found is None:
            problems.append(f"{name} lacks {package}, which is {version} here")
        elif found != version:
            problems.append(f"{name} has {package} {found}, here it is {version}")
    for secret in facts.missing_secrets:
        problems.append(f"{name} lacks the environment variable {secret} (cluster.secrets)")
    return problems
