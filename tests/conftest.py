"""Tiny real models (milliseconds) in the native folder formats of their libraries, and a spec over them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Two processes of tests share the cores. A pool of threads in each would only wait for the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]


WIDTH, CONTEXT = 32, 20


def write_tiny(folder: Path, seed: int = 0, *, layers: int = 1) -> None:
    """`clip/` and `captioner/` with random weights: width 32, four heads a layer."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from train_demo_models import build_tokenizer
    from transformers import MBartConfig, MBartForCausalLM

    torch.manual_seed(seed)
    tok = build_tokenizer()
    vocab = tok.get_vocab_size()
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": WIDTH,
            "layers": layers,
            "head_width": 8,
            "output_tokens": True,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocab,
            "width": WIDTH,
            "heads": 4,
            "layers": layers,
            "pad_id": 1,
            "eos_id": 2,
            "pool_type": "eos",
        },
    }
    clip = CLIP(**config)
    for p in (
        clip.parameters()
    ):  # random weights that do something: biases and projections away from zero
        p.data += 0.05 * torch.randn_like(p)
    captioner = MBartForCausalLM(
        MBartConfig(
            vocab_size=vocab,
            d_model=WIDTH,
            decoder_layers=layers,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            encoder_layers=0,
            max_position_embeddings=CONTEXT,
            is_decoder=True,
            is_encoder_decoder=False,
            scale_embedding=False,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            forced_eos_token_id=None,
            init_std=0.3,
        )
    )
    for name in ("clip", "captioner"):
        (folder / name).mkdir(parents=True)
        tok.save(str(folder / name / "tokenizer.json"))
    save_file(
        {k: v.contiguous() for k, v in clip.state_dict().items()},
        folder / "clip" / "open_clip_model.safetensors",
    )
    pre = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": pre})
    (folder / "clip" / "open_clip_config.json").write_text(text)
    captioner.save_pretrained(folder / "captioner")


# As in an environment that is activated: messages name the command alone.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

SPEC = """\
name: tiny
inputs: {image: image}
nodes:
  vision:
    kind: image_encoder
    source: ./clip
    inputs: {image: image}
  captioner:
    kind: text_decoder
    source: ./captioner
    inputs: {context: vision.tokens}
    candidates: 2
    max_tokens: 12
  text:
    kind: text_encoder
    source: ./clip
    inputs: {text: captioner.texts}
  choose:
    kind: nearest
    inputs: {query: vision.embedding, keys: text.embedding, values: captioner.texts, scores: captioner.scores}
    prior: 0.1
outputs: {caption: choose.best, embedding: vision.embedding}
data:
  kind: emoji_scenes
  options: {image_size: 32, test: 24, val: 16}
  calibration: 16
  validation_pairs: 16
target: 1.22x
distill: {steps: 4, minutes: 1, batch: 4}
compute: {precision: fp32}
search: {trials: 4, level_switches: 2, executor: inline, workers: 1, max_artifacts: 1}
measure: {threads: 1, warmup: 1, requests: 8, memory: false}
"""


def pytest_addoption(parser):
    help_text = (
        "a seed: every simulated measurement is off by some 15 %, by lot; "
        "a test that needs exact latencies then fails"
    )
    parser.addoption("--noise-seed", type=int, default=None, help=help_text)


def pytest_configure(config):
    """Draw half of the examples of a property in the fast suite, the same ones every time."""
    is_fast = config.getoption("markexpr") == "not slow"
    options = {"deadline": None, "derandomize": True}
    settings.register_profile("whole", max_examples=64, **options)
    settings.register_profile("fast", max_examples=32, **options)
    settings.load_profile("fast" if is_fast else "whole")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark further examples and the very slow tests as slow, and put the tests of the finished run first.

    The first process of a session then makes that run while the second works through tests that
    do not need it. In the order of the files both would reach it at once, and one would wait.
    """
    examples: Counter[str] = Counter()
    for item in items:
        if item.get_closest_marker("very_slow") is not None:
            item.add_marker(pytest.mark.slow)
        marker = item.get_closest_marker("examples")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            examples[test] += 1
            if examples[test] > marker.args[0]:
                item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: "finished_run" not in getattr(item, "fixturenames", ()))


def pytest_xdist_auto_num_workers():
    """Run as many processes as there are logical cores. More of them pay their imports and wait."""
    return os.cpu_count() or 1


def pytest_collection_finish():
    """Leave what the imports made out of every later search for garbage, and look for it less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread: tests run beside each other, and sums round the same way every time.

    Warnings of torch come every time, too. It gives most of them once a process, so that the order of tests would
    decide which test fails.
    """
    import torch
    from accelerator import register_accelerator

    torch.set_num_threads(1)
    torch.set_warn_always(True)
    # Torch counts its devices at the first gradient that it computes.
    register_accelerator()


@pytest.fixture(scope="session")
def machine(request) -> dict[str, Any]:
    """What a run measures with and reads the time from: `run(spec, out, **machine)`.

    Latencies follow from sizes and time stands still. A test of measuring itself leaves it out.
    """
    from simulated import NoisyBenchmarker, SimulatedBenchmarker, StoppedClock

    seed = request.config.getoption("--noise-seed")
    bench = SimulatedBenchmarker() if seed is None else NoisyBenchmarker(seed)
    return {"bench": bench, "clock": StoppedClock()}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Device tables of tests are no one else's."""
    os.environ["MMCOMPRESS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture()
def start_cluster(monkeypatch):
    """`start_cluster(*nodes, **system)`: a cluster with nodes of these options, which ends with the test.

    `system` has settings of Ray itself, by their names.
    """
    from ray._private import ray_constants
    from small_cluster import SmallCluster

    # Else Ray looks for the cluster at the address of the network, where it is not.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    started = []

    def start(*nodes, **system):
        started.append(SmallCluster(nodes, **system))
        return started[-1]

    yield start
    for one in started:
        one.cluster.shutdown()


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """`make_once(name, make)`: a folder that the first process of a session makes by `make(folder)`.

    All processes get the same folder. A test that changes something works on a copy.
    """
    session_folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session_folder = session_folder.parent
    shared_folder = session_folder / "made-once"
    shared_folder.mkdir(exist_ok=True)

    def make_unless_made(name, make) -> Path:
        folder = shared_folder / name
        with FileLock(shared_folder / f"{name}.lock"):
            finished = shared_folder / f"{name}.finished"
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                finished.touch()
        return folder

    return make_unless_made


@pytest.fixture(scope="session")
def tiny(make_once) -> Path:
    """A folder with the tiny models, one layer each, and `spec.yaml`: whole runs take seconds."""

    def make(folder):
        write_tiny(folder)
        (folder / "spec.yaml").write_text(SPEC)

    return make_once("tiny", make)


@pytest.fixture(scope="session")
def two_layers(make_once) -> Path:
    """The same with two layers in each model, for what is asked of a deeper layer."""

    def make(folder):
        write_tiny(folder, layers=2)
        (folder / "spec.yaml").write_text(SPEC)

    return make_once("two_layers", make)


@pytest.fixture()
def loose(tiny, tmp_path):
    """(spec, overrides) of the tiny pipeline without its joining node: nothing reads the text tower."""
    head, _, tail = (tiny / "spec.yaml").read_text().partition("  choose:\n")
    (tmp_path / "loose.yaml").write_text(
        head.replace("./", f"{tiny}/") + "outputs:" + tail.partition("outputs:")[2]
    )
    outputs = {"caption": "captioner.text", "embedding": "text.embedding"}
    return tmp_path / "loose.yaml", {"metrics": ["agreement", "embedding"], "outputs": outputs}


@pytest.fixture(scope="session")
def one_artifact():
    """A policy by which the first structure is made and ends a run, wherever it lies."""
    from mmcompress.run.fitted_structure import FitTolerances
    from mmcompress.run.next_artifact import Done
    from mmcompress.run.run_policy import RunPolicy

    def stop_after_one(history, limits):
        return Done(reason="one artifact is enough for this test")

    return RunPolicy(next_step=stop_after_one, fit=FitTolerances(max_attempts=1))


@pytest.fixture(scope="session")
def spec(two_layers):
    from mmcompress.graph.load_spec import load_spec

    return load_spec(two_layers / "spec.yaml")


@pytest.fixture()
def models(spec):
    from mmcompress.models.families import open_clip
    from mmcompress.models.sources import load_models

    open_clip._load_clip.cache_clear()
    return load_models(spec)


@pytest.fixture()
def pipeline(spec, models):
    from mmcompress.pipeline.forward import TorchPipeline

    return TorchPipeline(spec, models)


@pytest.fixture()
def batch(spec, pipeline):
    from mmcompress.data.open_dataset import open_dataset

    return pipeline.collate(open_dataset(spec.data).load("train", 12))


@pytest.fixture(scope="session")
def finished_run(tiny, machine, make_once) -> Path:
    """A folder with a whole run of the tiny pipeline on a simulated machine, and `events.json`.

    The events are stages and reads of the data, in their order.
    """
    from recording_data import RecordingData

    from mmcompress.run import run_targets as workflow
    from mmcompress.run.stages import RunStages, prepare_run

    def make(folder):
        events = []

        def note_stage(stage, message, share):
            events.append(stage)

        def prepare_recorded(run):
            return prepare_run(replace(run, data=RecordingData(run.data, events)))

        workflow.run(
            tiny / "spec.yaml",
            folder / "run",
            stages=RunStages(prepare=prepare_recorded),
            on_progress=note_stage,
            **machine,
        )
        (folder / "events.json").write_text(json.dumps(events))

    return make_once("finished-run", make)


@pytest.fixture(scope="session")
def run_folder(finished_run, tmp_path_factory) -> Path:
    """The folder of that run. Every process has a copy of its own: some tests go on in it."""
    return Path(shutil.copytree(finished_run / "run", tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="session")
def run_events(finished_run) -> list:
    """What happened in that run: the name of a stage, or (split, count, seed) of what was read."""
    return json.loads((finished_run / "events.json").read_text())


SENSITIVITY = ("sensitivity.json", "sensitivity.safetensors")
"""What a run folder holds that follows from the importance of units."""

SHARED_BY_TARGETS = (
    "baseline",
    "dense-test.json",
    *SENSITIVITY,
    "predictor.json",
    "profile.json",
    "rounded",
    "reference_runs.json",
)
"""What a run folder holds that depends neither on the target nor on search, pruning and training."""


@pytest.fixture(scope="session")
def prepare_tiny(tiny, run_folder, machine):
    """`prepare_tiny(out, overrides)`: open a run of the tiny pipeline with what `run_folder` has measured.

    Profile, predictor and sensitivity take two thirds of a run. A test that changes data, measuring or models runs
    it whole; one that changes importance or sensitivity leaves `SENSITIVITY` out.
    """
    from mmcompress.workspace.context import open_run

    def prepare(out, overrides, *, leave_out=()):
        open_run(tiny / "spec.yaml", out, overrides=overrides, **machine)
        for name in SHARED_BY_TARGETS:
            if name in leave_out:
                continue
            source = run_folder / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, out / name)

    return prepare


@pytest.fixture(scope="session")
def run_tiny(tiny, prepare_tiny, machine, one_artifact):
    """`run_tiny(out, overrides)`: run the tiny pipeline from what `prepare_tiny` leaves.

    Its first artifact is its last one: `test_stages.py` holds what follows an artifact. No report is written: its
    charts take a second, and `test_report.py` holds them.
    """
    from mmcompress.run import run_targets as workflow
    from mmcompress.run.stages import RunStages

    stages = RunStages(report=lambda summary, folder: folder)

    def run_prepared(out, overrides, *, several_targets=False, leave_out=(), **options):
        options = {**machine, "policy": one_artifact, "stages": stages, **options}
        if not out.exists():
            prepare_tiny(out, overrides, leave_out=leave_out)
        run = workflow.run_targets if several_targets else workflow.run
        return run(tiny / "spec.yaml", out, overrides=overrides, resume=True, **options)

    return run_prepared


@pytest.fixture()
def run_fake(tiny, tmp_path):
    """`run_fake(fake, **options)`: run the tiny pipeline with fake stages in one folder."""

    from mmcompress.run import run_targets as workflow

    def run(fake, *, overrides=None, several_targets=False, **options):
        command = workflow.run_targets if several_targets else workflow.run
        folder = tmp_path / "r"
        options.setdefault("resume", folder.exists())
        return command(
            tiny / "spec.yaml",
            folder,
            overrides={"search.max_artifacts": 2, **(overrides or {})},
            stages=fake.stages,
            **options,
        )

    return run
