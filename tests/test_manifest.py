"""A manifest is read like a spec: with bounds, by file and key; whatever it says, a bundle never hangs."""

from __future__ import annotations

import copy
import functools
import json
import random
import shutil
import time

import numpy as np
import pytest

from mmcompress.errors import BundleError, DataError
from mmcompress.runtime import graph
from mmcompress.runtime.bundle import hash_file, read_manifest
from mmcompress.runtime.graph import load_bundle

MUTATIONS = 400
"""Manifests that the fuzz test tries."""

MAX_SECONDS = 2.0
"""Seconds of the slowest of them."""

STRANGE = (
    None, True, False, 0, 1, -1, 2, 7, 64, 1000, 10**4, 10**6, 2**31, 2**63, 10**30, 0.5, 1e-9, -1.5,
    1e308, float("inf"), float("nan"), "", "x", "image", "vision", "vision.tokens", "text.embedding",
    "captioner.texts", "../x", "/etc/passwd", "\0", "\ud800", "ü" * 300, [], [0], [1, 2], [[]], {}, {"a": 1}, {"": {}},
)  # fmt: skip
"""Values that mutations put in place of others."""

PICTURE = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(run_folder, tmp_path_factory):
    """A bundle of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("manifest") / "b"
    shutil.copytree(run_folder / "baseline", folder)
    return folder


@pytest.fixture()
def manifest(bundle):
    """Its manifest; the bundle has its own back after the test."""
    text = (bundle / "manifest.json").read_text()
    yield json.loads(text)
    (bundle / "manifest.json").write_text(text)


def write(bundle, manifest):
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def put(manifest, key, value):
    """Put a value at a path of keys; `DELETE` removes it."""
    *path, last = key.split("/")
    for name in path:
        manifest = manifest[int(name)] if isinstance(manifest, list) else manifest[name]
    if value is DELETE:
        del manifest[last]
    else:
        manifest[last] = value


DELETE = object()
"""In place of a value: the key goes."""

VISION, CAPTIONER, TEXT = ("graph/nodes/vision", "graph/nodes/captioner", "graph/nodes/text")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threads", 1000, r"threads: expected a whole number in 1 \.\. 256, got 1000"),
        ("threads", "2", "threads: expected a whole number"),
        ("threads", True, "threads: expected a whole number"),
        ("parallel", 1, "parallel: expected true or false"),
        ("format", True, "format: expected a whole number"),
        ("format", DELETE, "'format' is missing"),
        ("graph/outputs", DELETE, "graph: 'outputs' is missing"),
        ("graph/inputs", {}, "graph.inputs: there are none"),
        ("graph/inputs", {"image": "video"}, "graph.inputs: 'image' is of the unknown type 'video'"),
        ("graph/outputs/caption", "choose.worst", "graph.outputs.caption: nothing gives 'choose.wor"),
        (f"{VISION}/kind", "telescope", "graph.nodes.vision.kind: this runtime doesn't know 'telesc"),
        (f"{VISION}/kind", DELETE, "graph.nodes.vision.kind: this runtime doesn't know None"),
        (f"{VISION}/inputs", {}, "graph.nodes.vision.inputs: the port 'image' is missing"),
        (f"{TEXT}/inputs/text", "vision.tokens", "graph.nodes.text.inputs.text: vision.tokens is of ty"),
        (f"{TEXT}/inputs/text", "nobody.texts", "graph.nodes.text.inputs.text: nothing gives 'nobody.t"),
        (f"{TEXT}/inputs/image", "image", "graph.nodes.text.inputs: 'text_encoder' has no port 'image'"),
        (f"{VISION}/config/preprocess/size", 10**4, r"config.preprocess.size: expected a whole number in 1"),
        (f"{VISION}/config/preprocess/std", [0.5, 0, 0.5], "config.preprocess.std: expected a number"),
        (f"{VISION}/config/preprocess", 3, "config.preprocess: expected a mapping, got 3"),
        (f"{VISION}/config/strange", float("nan"), "config.strange: expected a finite number"),
        (f"{VISION}/files/model", "../x.onnx", r"vision.files.model: the graph uses '../x.onnx', which is not"),
        (f"{VISION}/files", DELETE, "graph.nodes.vision: a image_encoder can't be made of it: KeyError: 'mo"),
        (f"{CAPTIONER}/config/generation/beams", 10**6, r"config.generation.beams: expected .* 1 \.\. 64"),
        (f"{CAPTIONER}/config/generation/max_tokens", 10**6, r"config.generation.max_tokens: expected"),
        (f"{CAPTIONER}/config/generation/prompt", [-5], r"config.generation.prompt: expected"),
        (f"{CAPTIONER}/config/past", [[1, 2]] * 5000, "config.past: expected a list of at most 4096"),
        (f"{TEXT}/config/context_length", 0, "config.context_length: expected a whole number in 1"),
        (f"{TEXT}/config/tokenizer", 4, "graph.nodes.text.config.tokenizer: expected a text, got 4"),
        ("files/text~tokenizer.json", {"sha256": "00"}, "sha256: expected a SHA-256 of 64 hexadecimal"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_file_and_key(bundle, manifest, key, value, message):
    if key.startswith("files/"):
        manifest["files"][key[6:].replace("~", "/")] = value
    else:
        put(manifest, key, value)
    write(bundle, manifest)
    with pytest.raises(BundleError, match=message) as error:
        load_bundle(bundle)
    assert str(error.value).startswith(f"{bundle}/manifest.json: ")


@pytest.mark.parametrize("parallel", [False, True])
def test_a_cycle_is_refused_and_hangs_nothing(bundle, manifest, parallel):
    nodes = manifest["graph"]["nodes"]
    other = copy.deepcopy(nodes["choose"])
    other["inputs"]["values"] = "choose.best"
    nodes["other"] = other
    nodes["choose"]["inputs"]["values"] = "other.best"
    write(bundle, {**manifest, "parallel": parallel})
    with pytest.raises(
        BundleError, match=r"graph.nodes.(other|choose).inputs: the node waits for it"
    ):
        load_bundle(bundle)


def test_nodes_may_be_listed_in_any_order(bundle, manifest):
    expected = load_bundle(bundle)(image=PICTURE)["caption"]
    nodes = manifest["graph"]["nodes"]
    manifest["graph"]["nodes"] = dict(reversed(nodes.items()))
    write(bundle, manifest)
    assert load_bundle(bundle)(image=PICTURE)["caption"] == expected


def test_threads_of_the_caller_have_bounds(bundle):
    with pytest.raises(DataError, match=r"expected a whole number in 1 \.\. 256, got 1000"):
        load_bundle(bundle, threads=1000)


def test_models_that_do_not_fit_their_configuration_are_told_by_the_node(bundle, manifest):
    put(manifest, f"{VISION}/config/preprocess/size", 48)
    write(bundle, manifest)
    with pytest.raises(BundleError, match="node 'vision' can't answer"):
        load_bundle(bundle)(image=PICTURE)


def list_places(value, path=()):
    """List the paths of all keys and entries of plain data."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from list_places(inner, (*path, key))


def mutate(manifest, rng):
    """Change one to three places of a manifest: replaced, removed, renamed, or swapped with another."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(list_places(manifest))
        if not places:
            return
        *path, last = rng.choice(places)
        holder = functools.reduce(lambda inner, key: inner[key], path, manifest)
        other = functools.reduce(lambda inner, key: inner[key], rng.choice(places), manifest)
        change = rng.random()
        if change < 0.15:
            del holder[last]
        elif change < 0.25 and isinstance(holder, dict):
            holder[str(rng.choice(STRANGE))] = holder.pop(last)
        elif change < 0.45:
            holder[last] = copy.deepcopy(other)
        elif isinstance(holder[last], int | float) and change < 0.7:
            holder[last] = holder[last] * rng.choice((0, -1, 2, 10, 10**3, 10**6, 0.5))
        else:
            holder[last] = copy.deepcopy(rng.choice(STRANGE))


def test_a_mutated_manifest_gives_a_working_bundle_or_a_bundle_error(bundle, manifest, monkeypatch):
    """What costs time and does not change is kept between loads: sessions and hashes of files."""
    for key in ("proofs", "versions", "cpu"):
        del manifest[key]
    for node in manifest["graph"]["nodes"].values():
        node.pop("structure", None)
    load_session = functools.lru_cache(lambda path: session_class(path, 1))
    session_class = graph.TimedSession
    monkeypatch.setattr(graph, "TimedSession", lambda path, threads, provider: load_session(path))
    monkeypatch.setattr("mmcompress.runtime.bundle.hash_file", functools.lru_cache(hash_file))
    rng = random.Random(21)
    outcomes = {"answer": 0, "refused": 0, "can't answer": 0}
    slowest = 0.0
    for _ in range(MUTATIONS):
        mutated = copy.deepcopy(manifest)
        mutate(mutated, rng)
        write(bundle, mutated)
        start = time.process_time()
        deployed = None
        try:
            deployed = load_bundle(bundle)
            deployed(**dict.fromkeys(deployed.inputs, PICTURE))
            outcomes["answer"] += 1
        except BundleError as error:
            outcomes["can't answer" if deployed else "refused"] += 1
            assert str(bundle) in str(error)
        except DataError as error:
            # Another type of input, the picture is no sound; or a processor that resizes no more.
            is_other_size = "resizes to no fixed size" in str(error)
            assert is_other_size or set(deployed.inputs.values()) != {"image"}
        slowest = max(slowest, time.process_time() - start)
    assert slowest < MAX_SECONDS
    assert outcomes["answer"] > 20 and outcomes["refused"] > 100, outcomes


def test_a_folder_that_is_no_bundle_names_the_one_that_may_be_meant(tmp_path):
    with pytest.raises(BundleError, match=r"there is no such folder$"):
        read_manifest(tmp_path / "none")
    (tmp_path / "run").mkdir()
    with pytest.raises(BundleError, match=r"it holds no manifest\.json$"):
        read_manifest(tmp_path / "run")
    finished = tmp_path / "run/bundle"
    finished.mkdir()
    (finished / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match=f"did you mean {finished}"):
        read_manifest(tmp_path / "run")
