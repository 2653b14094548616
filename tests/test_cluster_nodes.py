"""What nodes of a cluster must have in common; a cluster of real nodes: test_cluster_faults.py."""

from __future__ import annotations

import json

import pytest
import ray.runtime_env

from mmcompress.errors import SpecError
from mmcompress.graph.load_spec import load_spec
from mmcompress.search import cluster_nodes
from mmcompress.search.cluster_nodes import (
    EXPECTED_VARIABLE,
    NodeFacts,
    describe_differences,
    list_missing_in_job,
    list_runtime_env,
    list_versions,
    look_at_node,
    read_expected_versions,
)
from mmcompress.spec.schema import RuntimeEnv

HERE = {"python": "3.11", "ray": "2.56.0", "torch": "2.9.1"}


@pytest.mark.parametrize(
    ("versions", "missing_secrets", "problems"),
    [
        (HERE, (), []),
        ({**HERE, "onnxruntime": "1.0"}, (), []),  # this side lacks it: nothing to compare with
        ({**HERE, "torch": "2.8.0"}, (), ["n has torch 2.8.0, here it is 2.9.1"]),
        ({"python": "3.11", "ray": "2.56.0"}, (), ["n lacks torch, which is 2.9.1 here"]),
        (HERE, ("HF_TOKEN",), ["n lacks the environment variable HF_TOKEN (cluster.secrets)"]),
    ],
)
def test_what_a_node_has_otherwise_is_named(versions, missing_secrets, problems):
    facts = NodeFacts(versions=versions, missing_secrets=missing_secrets)
    assert describe_differences("n", facts, expected=HERE) == problems


def test_builds_for_other_accelerators_are_the_same_version(monkeypatch):
    """A client without a GPU has torch 2.9.1+cpu, the nodes have 2.9.1+cu128."""
    monkeypatch.setattr(cluster_nodes.importlib.metadata, "version", lambda name: "2.9.1+cpu")
    versions = list_versions()
    assert versions["torch"] == "2.9.1" and set(versions) == {
        "python",
        "ray",
        "torch",
        "transformers",
        "onnxruntime",
    }


def test_a_job_expects_the_versions_of_the_machine_that_sent_it(monkeypatch):
    assert read_expected_versions() == list_versions()
    sent = list_runtime_env(RuntimeEnv(), expected=HERE)["env_vars"]
    monkeypatch.setenv(EXPECTED_VARIABLE, sent[EXPECTED_VARIABLE])
    assert read_expected_versions() == HERE


def test_ray_is_asked_for_what_the_spec_says_and_nothing_else():
    assert list_runtime_env(RuntimeEnv()) == {}
    asked = RuntimeEnv(pip=("sentencepiece==0.2.1",), env_vars={"A": "1"})
    prepared = list_runtime_env(asked, expected=HERE)
    assert prepared == {
        "pip": ["sentencepiece==0.2.1"],
        "env_vars": {"A": "1", EXPECTED_VARIABLE: json.dumps(HERE)},
    }
    # Ray itself takes it, beside what a job uploads.
    assert ray.runtime_env.RuntimeEnv(**prepared, working_dir="s3://any/work.zip")


@pytest.mark.parametrize(
    ("brought", "missing"),
    [
        ({}, {"pip": ["a"], "env_vars": {"A": "1", "B": "2"}}),
        ({"env_vars": {"A": "1"}}, {"pip": ["a"], "env_vars": {"B": "2"}}),
        ({"pip": ["a"], "env_vars": {"A": "1", "B": "2"}, "working_dir": "x"}, {}),
    ],
)
def test_a_job_that_was_sent_otherwise_still_gets_what_the_spec_asks_for(brought, missing):
    """Such as `ray job submit -- mmcompress run`, or the manifest of a RayJob."""
    asked = {"pip": ["a"], "env_vars": {"A": "1", "B": "2"}}
    assert list_missing_in_job(asked, json.dumps({"runtime_env": brought})) == missing
    assert list_missing_in_job(asked, json.dumps({})) == asked


def test_a_secret_is_looked_for_by_its_name(monkeypatch):
    monkeypatch.setenv("IS_SET", "the value")
    monkeypatch.delenv("IS_NOT", raising=False)
    facts = look_at_node(("IS_SET", "IS_NOT"))
    assert facts.missing_secrets == ("IS_NOT",) and facts.versions == list_versions()
    assert "the value" not in json.dumps(facts.versions)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cluster.runtime_env.env_vars", {"HF_TOKEN": "hf_abc"}, "name it in cluster.secrets"),
        ("cluster.runtime_env.env_vars", {"aws_secret_access_key": "hf_abc"}, "cluster.secrets"),
        ("cluster.runtime_env.env_vars", {"A B": "1"}, "no name of an environment variable"),
        ("cluster.secrets", ["HF TOKEN"], "no name of an environment variable"),
        ("cluster.runtime_env.conda", "x", "conda"),
        ("search.ray_address", "ray://me:secret@head:10001", "it holds a user or a password"),
    ],
)
def test_a_secret_in_a_spec_and_other_mistakes_are_refused(tiny, key, value, message):
    with pytest.raises(SpecError, match=message) as refused:
        load_spec(tiny / "spec.yaml", {key: value})
    assert "hf_abc" not in str(refused.value)


def test_switches_with_the_name_of_a_secret_are_none(tiny):
    names = ("TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "RAY_AUTH_TOKEN_PATH")
    variables = dict.fromkeys(names, "1")
    spec = load_spec(tiny / "spec.yaml", {"cluster.runtime_env.env_vars": variables})
    assert spec.cluster.runtime_env.env_vars == variables


def test_what_nodes_need_is_read_from_a_spec(tiny):
    changes = {"cluster.secrets": ["HF_TOKEN"], "cluster.runtime_env.pip": ["sentencepiece"]}
    spec = load_spec(tiny / "spec.yaml", changes)
    assert spec.cluster.secrets == ("HF_TOKEN",)
    assert spec.cluster.runtime_env.pip == ("sentencepiece",)
