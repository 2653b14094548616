"""A bundle where it is deployed: several threads, a fork, and the requests that it carries."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mmcompress import load_modules
from mmcompress.cli import main
from mmcompress.errors import BundleError, DataError
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.sample_requests import (
    describe_difference,
    read_requests,
    verify_bundle,
    write_requests,
)


def draw_picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)


def test_eight_threads_give_the_answers_of_one(run_folder):
    pipeline = load_bundle(run_folder / "bundle")
    pictures = [draw_picture(seed) for seed in range(24)]
    expected = [pipeline(image=picture) for picture in pictures]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda picture: pipeline(image=picture), pictures))
    for one, other in zip(expected, answers, strict=True):
        assert one["caption"] == other["caption"]
        assert np.array_equal(one["embedding"], other["embedding"])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_is_told_to_load_its_own(run_folder):
    pipeline = load_bundle(run_folder / "bundle")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        message = b"no error"
        try:
            pipeline(image=draw_picture(0))
        except BundleError as error:
            message = str(error).encode()
        os.write(write_end, message)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write_end)
    assert b"forked after the bundle was loaded; load it again" in os.read(read_end, 10_000)


@pytest.fixture()
def bundle(run_folder, tmp_path):
    """A copy of the bundle of the finished run."""
    return shutil.copytree(run_folder / "bundle", tmp_path / "bundle")


def test_a_finished_bundle_carries_requests_that_hold_here(bundle):
    stored = read_requests(bundle)
    assert len(stored.requests) == 8 and stored.latency_ms > 0
    assert set(stored.requests[0].answer) == {"caption", "embedding"}
    done = CliRunner().invoke(main, ["verify", str(bundle)])
    assert done.exit_code == 0, done.output
    assert (
        "8 of 8 answers are as they were on" in done.output
        and "ms when the bundle was" in done.output
    )
    facts = json.loads(CliRunner().invoke(main, ["verify", str(bundle), "--json"]).output)
    page = (Path(__file__).parents[1] / "docs/reference/json_output.md").read_text("utf-8")
    rows = page.split("## `verify`")[1].split("\n## ")[0]
    assert set(facts) == set(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE))
    assert facts["holds"] and facts["differences"] == [""] * 8


def test_another_answer_is_told_with_its_request(bundle):
    pipeline = load_bundle(bundle)
    write_requests(pipeline, [{"image": draw_picture(0)}], machine="There")
    file = bundle / "requests" / "requests.json"
    record = json.loads(file.read_text())
    record["requests"][0]["answer"]["caption"]["value"] = "a text of another machine"
    file.write_text(json.dumps(record))
    done = CliRunner().invoke(main, ["verify", str(bundle)])
    text = " ".join(done.output.split())
    assert done.exit_code == 3
    assert "request 1: caption:" in text and "0 of 1 answers are as they were on There" in text


@pytest.mark.parametrize(
    ("stored", "answer", "difference"),
    [
        ({"a": "x"}, {"a": "x"}, ""),
        ({"a": "x"}, {"b": "x"}, "gives b for a"),
        ({"a": 1.0}, {"a": 1.005}, ""),
        ({"a": 1.0}, {"a": 1.5}, "a: 1.5 for 1"),
        ({"a": ["x", 2.0]}, {"a": ["x", 2.001]}, ""),
        ({"a": ["x", "y"]}, {"a": ["x"]}, "a: ['x'] for ['x', 'y']"),
        ({"a": np.ones(4)}, {"a": np.ones(4) * 1.0001}, ""),
        ({"a": np.ones(4)}, {"a": np.ones(3)}, "a: shape (3,) for (4,)"),
        ({"a": np.ones(2)}, {"a": np.array([1.0, -1.0])}, "a: cosine 0.0000 to the stored vector"),
        ({"a": np.zeros(2)}, {"a": np.zeros(2)}, ""),
        ({"a": np.ones(2)}, {"a": np.full(2, np.nan)}, "a: cosine nan to the stored vector"),
    ],
)
def test_what_counts_as_the_same_answer(stored, answer, difference):
    assert describe_difference(stored, answer) == difference


@pytest.mark.parametrize("damage", ["[]", "{", '{"requests": [{}]}'])
def test_damaged_requests_are_told(bundle, damage):
    (bundle / "requests" / "requests.json").write_text(damage)
    with pytest.raises(BundleError, match="requests: damaged"):
        verify_bundle(load_bundle(bundle))


def test_a_bundle_without_requests_is_told(bundle):
    shutil.rmtree(bundle / "requests")
    with pytest.raises(BundleError, match="carries no requests"):
        read_requests(bundle)


def test_requests_do_not_make_a_bundle_large(bundle):
    pictures = [np.zeros((2000, 2000, 3), np.uint8)] * 3
    write_requests(load_bundle(bundle), [{"image": picture} for picture in pictures], machine="")
    assert len(read_requests(bundle).requests) == 1


def test_the_models_of_a_run_come_back_in_torch(run_folder, tmp_path):
    """Pruned, trained, and ready to be trained further."""
    import torch

    modules = load_modules(run_folder)
    pipeline = load_bundle(run_folder / "bundle")
    nodes = pipeline.manifest["graph"]["nodes"]
    assert set(modules) == {name for name, node in nodes.items() if node.get("files")}
    for name, module in modules.items():
        weights = sum(p.numel() for p in module.parameters())
        assert weights == nodes[name]["params"]
        assert any(p.requires_grad for p in module.parameters())
    ids = pipeline.nodes["text"].prepare(["a red car"])
    with torch.no_grad():
        embedding = modules["text"](torch.from_numpy(ids)).numpy()
    deployed = pipeline.nodes["text"](["a red car"])["embedding"]
    assert float((embedding * deployed).sum()) > 0.99  # it may be rounded there
    with pytest.raises(DataError, match="holds no trained weights"):
        load_modules(tmp_path)


def test_the_card_says_what_the_bundle_is_and_whose_weights_it_holds(bundle):
    card = (bundle / "README.md").read_text()
    head, text = card.split("---\n", 2)[1:]
    assert "library_name: mmcompress" in head and "- onnxruntime" in head
    assert 'pipeline(image="photo.png")' in text and "gives caption, embedding" in text
    assert "| image_to_text_r1 |" in text and "Licence:" in text
    assert "{{" not in text and "{%" not in text
