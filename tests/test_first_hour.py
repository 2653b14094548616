"""What a new user types first: `init`, `doctor`, `list pipelines`."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest
from click.testing import CliRunner
from PIL import Image

from mmcompress.cli import explain_tables, main
from mmcompress.cli.explain import find_profiled_folder
from mmcompress.cli.options import choose_default_folder, name_profile_folder
from mmcompress.errors import DataError
from mmcompress.graph.load_spec import load_spec
from mmcompress.registry import PIPELINE_TEMPLATES
from mmcompress.run.explain import explain_run
from mmcompress.run.profile import Profile
from mmcompress.runtime import environment
from mmcompress.spec.pipeline_templates import locate_shipped_file
from mmcompress.storage import read_record
from mmcompress.workspace.context import open_run


@pytest.fixture()
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPTIONS_DIR", "photos")
    monkeypatch.setenv("LJSPEECH_DIR", "clips")

    def call_command(*arguments, **options):
        done = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
        return done, " ".join(done.output.split())

    return call_command


@pytest.mark.parametrize("template", PIPELINE_TEMPLATES.list_names())
def test_every_template_becomes_a_spec_with_its_comments(call, tmp_path, template):
    done, text = call("init", "--template", template)
    assert done.exit_code == 0 and f"mmcompress validate {template}.yaml" in text
    shipped = locate_shipped_file("pipelines", PIPELINE_TEMPLATES.get(template).file)
    assert (tmp_path / f"{template}.yaml").read_text() == shipped.read_text()
    assert (tmp_path / "spec.schema.json").exists()
    load_spec(tmp_path / f"{template}.yaml")


def test_flags_take_the_place_of_what_the_pipeline_says(call, tmp_path):
    options = ["--target", "12ms p95", "--data", r"C:\my \1 photos", "--out", "sub/mine.yaml"]
    options += ["--source", "vision=./my clip", "--source", "captioner=transformers:me/it@main"]
    done, text = call("init", "--template", "blip", *options)
    assert done.exit_code == 2 and "sub/mine.yaml is written, but can't run yet:" in text
    assert "- source of vision: " in text and "my clip: no such folder" in text
    assert "- data: " in text and "then: mmcompress validate sub/mine.yaml" in text
    spec = load_spec(tmp_path / "sub/mine.yaml")
    assert spec.target == "12ms p95"
    assert spec.data.options["path"].endswith(r"my \1 photos")
    assert spec.nodes["vision"].source.endswith("my clip")
    assert spec.nodes["captioner"].source == "transformers:me/it@main"
    assert spec.nodes["text"].source == "open_clip:ViT-B-32@openai"
    written = (tmp_path / "sub/mine.yaml").read_text()
    # What a node does stays; what its model was goes with the model.
    assert "# writes three captions of those tokens" in written
    assert "BLIP's decoder" not in written and "# CLIP's text tower" in written


def test_a_folder_of_data_is_looked_at_and_the_spec_stays(call, tmp_path):
    done, text = call("init", "--template", "clip_captioner", "--data", "photos")
    assert done.exit_code == 2 and "data:" in text and "photos" in text
    assert (tmp_path / "clip_captioner.yaml").exists()
    photos = tmp_path / "photos"
    photos.mkdir()
    rows = []
    for number in range(30):
        picture = Image.new("RGB", (8, 8), (number, 0, 0))
        picture.save(photos / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "text": f"picture {number}"}))
    (photos / "captions.jsonl").write_text("\n".join(rows) + "\n")
    done, text = call("init", "--template", "blip", "--data", "photos", "--out", "two.yaml")
    assert done.exit_code == 0 and "fewer pairs than the spec would use" in text


def test_only_models_without_a_folder_come_from_a_hub(call, tmp_path):
    """A library may be named before a folder, too."""
    (tmp_path / "clip").mkdir()
    options = ["--source", "vision=transformers:./clip", "--source", "text=transformers:me/it"]
    options += ["--source", "captioner=./clip", "--source", "eyes=transformers:./clip"]
    done, text = call("init", "--template", "blip", *options)
    assert done.exit_code == 0 and "from a hub: text; where none is reached" in text


def test_drawn_data_give_way_to_a_folder(call, tmp_path):
    call("init", "--template", "clip_captioner", "--data", "photos")
    spec = load_spec(tmp_path / "clip_captioner.yaml")
    assert spec.data.kind == "folder" and spec.data.report == ()
    assert spec.search.trials == 16  # the sections behind it stay


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--template is missing; known: blip, clip_captioner, retrieval, speech_search"),
        (["--template", "blib"], "did you mean 'blip'"),
        (["--template", "blip", "--source", "eye=./x"], "no node 'eye' has a source"),
        (["--template", "blip", "--source", "eyes"], "expected node=source"),
        (["--template", "blip", "--target", "soon"], "target"),
    ],
)
def test_what_makes_no_spec_leaves_none(call, tmp_path, arguments, message):
    done, text = call("init", *arguments)
    assert done.exit_code == 2 and message in text
    assert not list(tmp_path.glob("*.yaml"))


def test_init_without_data_says_which_option_names_them(call, tmp_path, monkeypatch):
    monkeypatch.delenv("CAPTIONS_DIR")
    done, text = call("init", "--template", "blip")
    assert done.exit_code == 2
    assert "blip needs a folder of your data: give --data FOLDER, or set CAPTIONS_DIR" in text
    assert not list(tmp_path.glob("*.yaml"))


def test_comments_on_what_was_replaced_go(call, tmp_path):
    call("init", "--template", "speech_search", "--data", "talk", "--out", "mine.yaml")
    written = (tmp_path / "mine.yaml").read_text()
    assert "LJSPEECH_DIR" not in written and "SPEECH_WEIGHTS=pip:" in written
    assert load_spec(tmp_path / "mine.yaml").name == "mine"
    sources = [f"--source={node}=./{node}" for node in ("ears", "writer", "sentence")]
    call("init", "--template", "speech_search", "--data", "talk", "--out", "own.yaml", *sources)
    head = (tmp_path / "own.yaml").read_text().partition("inputs:")[0]
    assert "SPEECH_WEIGHTS" not in head and "# Speech in; what was said" in head


def test_a_file_is_never_replaced(call, tmp_path):
    (tmp_path / "mine.yaml").write_text("precious")
    done, text = call("init", "--template", "blip", "--out", "mine.yaml")
    assert done.exit_code == 2 and "is there already" in text
    assert (tmp_path / "mine.yaml").read_text() == "precious"


def test_on_a_terminal_init_asks_for_all_that_is_not_given(call, tmp_path, monkeypatch):
    monkeypatch.setattr("mmcompress.cli.init._can_ask", lambda: True)
    (tmp_path / "my_clip").mkdir()
    # Pipeline, file, target, data; the captioner stays, and the text tower is that of the vision.
    answers = ["clip_captioner", "mine.yaml", "3x", "", "./my_clip", "", ""]
    done, text = call("init", input="\n".join(answers) + "\n")
    assert done.exit_code == 0, text
    spec = load_spec(tmp_path / "mine.yaml")
    assert spec.target == "3x"
    assert spec.nodes["vision"].source == spec.nodes["text"].source == str(tmp_path / "my_clip")
    assert spec.nodes["captioner"].source == "embedded:clip_captioner/captioner"
    assert "mmcompress explain mine.yaml says how long that takes" in text


def test_a_question_that_is_answered_wrongly_is_asked_again(call, tmp_path, monkeypatch):
    monkeypatch.setattr("mmcompress.cli.init._can_ask", lambda: True)
    (tmp_path / "there.yaml").write_text("name: there\n")
    answers = ["retrieval", "there.yaml", "mine.yaml", "fast", "2x", "", "", ""]
    done, text = call("init", input="\n".join(answers) + "\n")
    assert done.exit_code == 0, text
    assert (
        "there.yaml is there already" in text and load_spec(tmp_path / "mine.yaml").target == "2x"
    )


def test_pipelines_are_listed(call):
    text = call("list", "pipelines")[1]
    for name in PIPELINE_TEMPLATES.list_names():
        assert name in text


def test_a_run_is_explained_before_it_runs(call, tiny, run_folder):
    done, text = call("explain", tiny / "spec.yaml")
    assert done.exit_code == 0, text
    for part in (
        "vision",
        "heads",
        "ffn",
        "0% to 75% of the units",
        "multiply-adds",
        "GB of memory",
    ):
        assert part in text, part
    assert "captioner: " in text and "cross_attention" in text  # the reason of what is protected
    assert "1.22x: an artifact takes about" in text and "another one adds" in text
    done, text = call("explain", tiny / "spec.yaml", "--run", run_folder, "--target", "3x")
    assert done.exit_code == 0 and "measured latencies" in text and " ms" in text
    assert f"Milliseconds are those of {run_folder}" in text.replace("\n", "")
    assert "3x: an artifact takes about" in text
    done, text = call("explain", tiny / "spec.yaml", "--set", "prune.protection=3")
    assert "3 times less" in text


def test_the_profile_of_an_earlier_command_is_found(tiny, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = str(tiny / "spec.yaml")
    assert find_profiled_folder(spec, {}) is None
    place = name_profile_folder(spec, {})
    shutil.copytree(run_folder, place)
    assert find_profiled_folder(spec, {}) == place
    own_place = choose_default_folder(spec, {"target": "3x"})
    shutil.copytree(run_folder, own_place)
    assert find_profiled_folder(spec, {"target": "3x"}) == own_place
    assert find_profiled_folder(spec, {}) == place


def test_explain_measures_where_it_is_asked_to(call, tiny, monkeypatch):
    profiled = []

    def profile(run):
        profiled.append(run.folder.path)
        raise DataError("stop here")

    monkeypatch.setattr(explain_tables, "profile_pipeline", profile)
    done, text = call("explain", tiny / "spec.yaml", "--measure")
    assert done.exit_code != 0 and "stop here" in text
    [folder] = profiled
    assert not folder.exists()  # nothing is kept


def test_shares_add_up_and_the_target_is_shared_out(tiny, run_folder, machine, tmp_path):
    dense = read_record(Profile, run_folder / "profile.json")
    run = open_run(tiny / "spec.yaml", tmp_path / "r", overrides={"target": "2x,3x"}, **machine)
    guessed = explain_run(run, None)
    assert sum(node.share for node in guessed.nodes if node.share is not None) == pytest.approx(1)
    measured = explain_run(run, dense)
    asked = sum(node.asked_ms for node in measured.nodes if node.asked_ms is not None)
    assert asked == pytest.approx(sum(ms.p50 for ms in dense.nodes.values()) / 2)
    protected = sum(cut.cross_modal for cut in measured.cuts)
    # Projections are cross-modal too, but no block of units.
    blocks = {(node, block.name) for node, members in run.blocks.items() for block in members}
    reasons = {(node, name) for node, names in run.cross_modal.items() for name in names}
    assert protected == len(blocks & reasons) > 0


def test_the_doctor_says_what_this_machine_has(call):
    done, text = call("doctor")
    assert done.exit_code == 0, text
    for name in ("python", "packages", "processor", "quota", "memory", "disk", "cache", "ray"):
        assert name in text


def test_what_is_missing_is_named_with_its_cure(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    assert environment.check_quota(tmp_path / "none").state == "good"
    quota.write_text("max 100000\n")
    assert environment.check_quota(tmp_path).state == "good"
    quota.write_text("150000 100000\n")
    assert "1.5 cores" in environment.check_quota(tmp_path).detail
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:  8000000 kB\nMemAvailable: 1000000 kB\n")
    assert "--workers 1" in environment.check_memory(memory).detail
    assert environment.check_memory(tmp_path / "none").state == "note"
    monkeypatch.setitem(
        environment.OPTIONAL_PACKAGES,
        "no_such_module",
        environment.OPTIONAL_PACKAGES["torch"],
    )
    found = environment.check_packages()
    assert "pip install 'mmcompress[compress]'" in found.detail and "torch" in found.detail


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_bad(tmp_path):
    tmp_path.chmod(0o500)
    assert environment.check_disk(tmp_path).state == "bad"


def test_an_old_python_is_bad(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    assert environment.check_python().state == "bad"
