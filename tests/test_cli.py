"""Commands as a user types them: output, errors, exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT
from one_node import write_one_node
from PIL import Image

import mmcompress
from mmcompress.cli import COMMANDS, main
from mmcompress.registry import resolve_entry
from mmcompress.results.records import Summary
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.timing import SystemClock
from mmcompress.storage import read_record


def call(*args):
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=True)


def test_validate(tiny):
    done = call("validate", tiny / "spec.yaml")
    assert done.exit_code == 0 and "is valid" in done.output and "captioner" in done.output


def test_validate_looks_whether_sources_and_data_are_there(tiny, tmp_path):
    (tmp_path / "spec.yaml").write_text((tiny / "spec.yaml").read_text())
    done = call("validate", tmp_path / "spec.yaml")
    assert done.exit_code == 2 and "nodes." in done.output and "no such folder" in done.output
    hub = ("--set", "nodes.vision.source=transformers:some/vit")
    done = call("validate", tiny / "spec.yaml", *hub)
    assert done.exit_code == 2 and "the hub can't be reached and no copy" in done.output
    for i in range(9):
        Image.new("RGB", (20, 16), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    rows = [
        {"image": f"{i}.png", "caption": f"{i}", "split": ("train", "val", "test")[i % 3]}
        for i in range(9)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ("--set", "data.kind=folder", "--set", f"data.options={{path: {tmp_path}}}")
    done = call("validate", tiny / "spec.yaml", *own)
    assert done.exit_code == 0 and "3 in test" in done.output and "in train" in done.output
    (tmp_path / "empty").mkdir()
    done = call(
        "validate", tiny / "spec.yaml", *own[:3], f"data.options={{path: {tmp_path / 'empty'}}}"
    )
    assert done.exit_code == 2 and "captions.jsonl" in done.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["nodes.vision.prune.heads=0.5"], "is valid"),
        (["nodes.vision.prune.drop=9"], "nodes.vision.prune.drop: only"),
        (["nodes.vision.prune.blocks={nine.ffn: 0.5}"], "no block is named 'nine.ffn'"),
        (["nodes.vision.source={tiny}/captioner"], "nodes.vision"),
        (["nodes.captioner.source={tiny}/clip"], "nodes.captioner: "),
        (["nodes.captioner.source={smolvlm}"], r"'smolvlm' is not supported \(known: "),
        (["nodes.text.source={cut}"], "cut short"),
        (["nodes.captioner.source={pointer}"], "run 'git lfs pull'"),
        (["nodes.captioner.source={wide}"], "weights are missing or of another shape"),
        (["nodes.captioner.source=hf-hub:org/name"], "as a text_decoder|can't be reached"),
        (["nodes.captioner.prompt=" + "a " * 20], "leave nothing of max_tokens"),
        (["measure.readings=/no/such.json"], "/no/such.json: can't be read"),
    ],
)
def test_validate_refuses_what_a_run_refuses(tiny, tmp_path, settings, message):
    folders = {name: tmp_path / name for name in ("cut", "pointer", "wide", "smolvlm")}
    shutil.copytree(tiny / "clip", folders["cut"])
    weights = folders["cut"] / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(tiny / "captioner", folders["pointer"])
    pointer = "version https://git-lfs.github.com/spec/v1"
    (folders["pointer"] / "model.safetensors").write_text(pointer)
    for name, changes in (
        ("wide", {"decoder_ffn_dim": 96}),
        ("smolvlm", {"model_type": "smolvlm"}),
    ):
        shutil.copytree(tiny / "captioner", folders[name])
        config = json.loads((folders[name] / "config.json").read_text())
        (folders[name] / "config.json").write_text(json.dumps(config | changes))
    arguments = []
    for setting in settings:
        for name, folder in {"tiny": tiny, **folders}.items():
            setting = setting.replace(f"{{{name}}}", str(folder))
        arguments += ["--set", setting]
    done = call("validate", tiny / "spec.yaml", *arguments)
    assert done.exit_code == (0 if message == "is valid" else 2), done.output
    assert re.search(message, " ".join(done.output.split()))
    assert "Traceback" not in done.output


def test_validate_without_torch_says_so_and_is_exit_2(tiny):
    """In a process of its own: modules that are loaded here already would not miss it."""
    code = "import sys; sys.modules['torch'] = None; from mmcompress.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "validate", str(tiny / "spec.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, told
    assert "models and data were not looked at" in told and "'torch' is needed" in told


def test_a_wrong_spec_is_exit_2_and_one_line(tiny):
    done = call("run", tiny / "spec.yaml", "--set", "nodes.vision.prune.fnn=1")
    assert (
        done.exit_code == 2
        and "did you mean 'ffn'" in done.output
        and "Traceback" not in done.output
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--target", "soon"),
        ("--set", "x"),
        ("--space", "none.yaml"),
        ("--set", "data.report=[tset]"),
    ],
)
def test_bad_options_are_exit_2(tiny, tmp_path, arguments):
    done = call("run", tiny / "spec.yaml", "--out", tmp_path / "r", *arguments)
    assert done.exit_code == 2, done.output
    assert not (tmp_path / "r").exists()


def test_no_workers_means_this_process_alone():
    from mmcompress.cli.options import collect_overrides

    inline = {"search.workers": 1, "search.executor": "inline"}
    assert collect_overrides((), workers=0) == inline
    assert collect_overrides((), workers=3) == {"search.workers": 3}
    assert (
        collect_overrides(("search.executor=process",), workers=0)["search.executor"] == "process"
    )


def test_missing_weights_are_exit_2(tiny, tmp_path):
    (tmp_path / "spec.yaml").write_text((tiny / "spec.yaml").read_text())
    done = call("run", tmp_path / "spec.yaml", "--out", tmp_path / "r")
    assert done.exit_code == 2 and "no such folder" in done.output
    shutil.copytree(tiny / "captioner", tmp_path / "captoiner")
    shutil.copytree(tiny / "clip", tmp_path / "clip")
    done = call("run", tmp_path / "spec.yaml", "--out", tmp_path / "r")
    assert "did you mean" in done.output and "captoiner'?" in done.output


def test_weights_of_another_shape_and_pickles_are_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "t", ignore=shutil.ignore_patterns("run*", "cache"))
    config = json.loads((tmp_path / "t/captioner/config.json").read_text())
    (tmp_path / "t/captioner/config.json").write_text(json.dumps(config | {"decoder_ffn_dim": 128}))
    done = call("run", tmp_path / "t/spec.yaml", "--out", tmp_path / "r")
    assert done.exit_code == 2 and "nodes.captioner" in done.output
    (tmp_path / "t/captioner/model.safetensors").rename(tmp_path / "t/captioner/pytorch_model.bin")
    done = call("run", tmp_path / "t/spec.yaml", "--out", tmp_path / "r")
    assert done.exit_code == 2 and "no .safetensors file" in done.output


def test_show_and_report(run_folder):
    done = call("show", run_folder)
    assert done.exit_code == 0 and "end to end, p50" in done.output
    s = json.loads(call("show", run_folder, "--json").output)
    assert {
        "target",
        "baseline",
        "compressed",
        "speedup",
        "quality_retained",
        "predicted_latency_ms_p50",
        "proofs",
        "search",
        "versions",
        "cpu",
        "seed",
        "commit",
    } <= set(s)
    assert {"p50", "p95", "n"} <= set(s["baseline"]["latency_ms"]) and {
        "met",
        "speedup",
        "latency_ms_p50",
    } <= set(s["target"])
    node = s["compressed"]["nodes"]["captioner"]
    assert {"latency_ms_p50", "params", "precision", "unimodal_ratio", "cross_modal_ratio"} <= set(
        node
    )
    assert call("report", run_folder).exit_code == 0
    assert call("show", run_folder / "nothing").exit_code == 2


def test_the_report_is_self_contained(run_folder):
    html = (run_folder / "report.html").read_text()
    assert (
        html.count("<svg") == 6
        and html.count("src=") == html.count('src="data:')
        and "http" not in html.split("</style>")[1].replace("http://www.w3.org", "")
    )
    assert "passed" in html and "Where the time goes" in html
    assert (run_folder / "report.md").read_text().startswith("# tiny")


@pytest.mark.slow
def test_predict_and_bench(run_folder, tmp_path):
    Image.new("RGB", (64, 48), "orange").save(tmp_path / "a.png")
    done = call("predict", run_folder / "bundle", "--input", f"image={tmp_path / 'a.png'}")
    assert done.exit_code == 0
    answer = json.loads(done.output)
    assert isinstance(answer["caption"], str) and len(answer["embedding"][0]) == 32
    done = call("bench", run_folder / "bundle", "--against", run_folder / "baseline", "--rounds", 5)
    assert done.exit_code == 0 and "as fast as" in done.output
    assert call("predict", run_folder / "bundle", "--input", "image=none.png").exit_code == 2
    assert call("predict", tmp_path, "--input", "image=none.png").exit_code == 2


def test_help_names_every_method_and_table(spec):
    from mmcompress.experiments.baselines import BASELINES
    from mmcompress.experiments.cells import list_cells
    from mmcompress.experiments.names import METHODS, TABLES

    compare_help, ablate_help = call("compare", "--help").output, call("ablate", "--help").output
    assert all(name in compare_help for name in BASELINES)
    assert all(name in ablate_help for name in TABLES)
    assert tuple(BASELINES) == METHODS
    assert sorted(TABLES) == sorted({c.table for c in list_cells(spec)})


def test_a_crash_inside_a_library_leaves_the_lines_that_led_there():
    code = (
        "import ctypes, sys\n"
        "from mmcompress.cli import main\n"
        "sys.argv = ['mmcompress', 'list', 'importance']\n"
        "try: main()\n"
        "except SystemExit: ctypes.string_at(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0 and "Current thread" in done.stderr


def test_the_package_is_run_as_the_command():
    """Where the folder of scripts is not on the path, as on Windows, this is what people call."""
    line = [sys.executable, "-m", "mmcompress", "--version"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert mmcompress.__version__ in done.stdout


def test_a_wrong_spec_is_told_before_torch_is_imported(tmp_path):
    spec = tmp_path / "wrong.yaml"
    spec.write_text("name: wrong\nnodez: {}\n")
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from click.testing import CliRunner\n"
        "from mmcompress.cli import main\n"
        "for command in ('run', 'compare', 'ablate', 'profile', 'export', 'explain'):\n"
        f"    words = [command, {str(spec)!r}]\n"
        "    if command != 'explain':\n"
        f"        words += ['--out', {str(tmp_path / 'r')!r}]\n"
        "    done = CliRunner().invoke(main, words)\n"
        "    assert done.exit_code == 2 and 'nodez' in done.output, (command, done.output)\n"
        "    assert CliRunner().invoke(main, [command, '--help']).exit_code == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_help_imports_no_command():
    code = (
        "import sys\n"
        "for m in ('torch', 'transformers', 'open_clip', 'ray', 'optuna'): sys.modules[m] = None\n"
        "from click.testing import CliRunner\n"
        "from mmcompress.cli import COMMANDS, main\n"
        "done = CliRunner().invoke(main, ['--help'])\n"
        "assert done.exit_code == 0 and all(name in done.output for name in COMMANDS)\n"
        "for line in ('predict', 'show', 'submit', 'schema', 'list', 'bench'):\n"
        "    assert CliRunner().invoke(main, [line, '--help']).exit_code == 0, line\n"
        "assert CliRunner().invoke(main, ['device', 'measure', '--help']).exit_code == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_command_has_its_line_and_its_name():
    for name, row in COMMANDS.items():
        assert resolve_entry(row.target).name == name and row.about.endswith(".")


def test_the_schema_of_a_spec_and_of_a_space_is_printed():
    assert (
        json.loads(call("schema").output)["$defs"]["Search"]["properties"]["trials"]["minimum"] == 0
    )
    assert "dimensions" in json.loads(call("schema", "--space").output)["properties"]


def test_an_old_key_is_told_on_the_terminal(tiny):
    done = call("validate", tiny / "spec.yaml", "--set", "search.mutations=3")
    assert (
        done.exit_code == 0
        and "'search.mutations' is called 'search.level_switches'" in done.output
    )


def test_several_targets_are_refused_before_a_folder_is_made(tiny, tmp_path):
    for command in ("compare", "ablate"):
        done = call(command, tiny / "spec.yaml", "--target", "1.5x,2x", "--out", tmp_path / "c")
        assert done.exit_code == 2 and "one target" in done.output and not (tmp_path / "c").exists()


def test_where_torch_is_missing_the_extra_is_named(tiny, tmp_path):
    code = "import sys\nsys.modules['torch'] = None\nfrom mmcompress.cli import main\nmain()\n"
    asked = ["run", str(tiny / "spec.yaml"), "--out", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, timeout=120
    )
    told = done.stdout + done.stderr
    assert (
        done.returncode == 2 and "the package 'torch' is needed here" in told and "compress" in told
    )


def test_numbers_of_yaml_1_1_are_numbers_on_the_command_line(tiny):
    for change in (
        "distill.learning_rate=1e-4",
        "distill={rate: 1e-4}",
        'name="1e4"',
        "data.report=[]",
    ):
        assert call("validate", tiny / "spec.yaml", "--set", change).exit_code == 0


def test_a_search_space_is_validated(tiny, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "name: s\ndimensions:\n  nodes.*.prune.fnn: {low: 0, high: 1}\n"
    )
    done = call("validate", tiny / "spec.yaml", "--space", tmp_path / "s.yaml")
    assert done.exit_code == 2 and "did you mean 'nodes.*.prune.ffn'" in " ".join(
        done.output.split()
    )


@pytest.mark.parametrize("command", ["bench", "predict"])
@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_that_cannot_be_are_refused(run_folder, command, threads):
    done = call(command, run_folder / "bundle", "--threads", threads)
    assert done.exit_code == 2 and "--threads" in done.output


def test_an_input_that_stands_twice_is_refused(run_folder):
    done = call(
        "predict", run_folder / "bundle", "--input", "image=a.png", "--input", "image=b.png"
    )
    assert done.exit_code == 2 and "--input image stands twice" in " ".join(done.output.split())


@pytest.mark.slow
def test_figures_of_bench_are_given_as_json(run_folder):
    bundle = run_folder / "bundle"
    done = call("bench", bundle, "--against", run_folder / "baseline", "--requests", 8, "--json")
    page = (Path(__file__).parents[1] / "docs/reference/json_output.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", page.split("## `verify`")[0], re.MULTILINE))
    figures_by_name = json.loads(done.output)
    assert {*figures_by_name["bundle"], "times_as_fast"} == documented
    figures = json.loads(done.output)
    assert figures["bundle"]["path"] == str(bundle)
    assert figures["bundle"]["latency_ms"]["n"] >= 8
    ratio = figures["against"]["latency_ms"]["p50"] / figures["bundle"]["latency_ms"]["p50"]
    assert figures["times_as_fast"] == pytest.approx(ratio)
    assert set(figures["bundle"]["nodes_ms"]) == {"vision", "captioner", "text", "choose"}


def test_list(tiny):
    done = call("list")
    assert (
        done.exit_code == 0 and "fisher" in done.output and "open_clip/image_encoder" in done.output
    )
    assert call("list", "importance").exit_code == 0
    bad = call("list", "importanc")
    assert bad.exit_code == 2 and "did you mean 'importance'" in bad.output


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_target_that_cannot_be_met_is_exit_3_with_the_best_found(tiny, tmp_path, monkeypatch):
    """A text encoder alone, the whole way on this machine: device table, processes of their own."""
    # a command waits for a busy machine to become calm; this target can't be met anyway
    monkeypatch.setattr(SystemClock, "sleep", lambda clock, seconds: None)
    # Only one precision is measured.
    options = ("--target", "0.01ms", "--space", ROOT / "search_spaces/prune_only.yaml")
    done = call("run", write_one_node(tmp_path, tiny), "--out", tmp_path / "r", *options)
    assert done.exit_code == 3, done.output
    assert "bottleneck" in " ".join(done.output.split())
    summary = read_record(Summary, tmp_path / "r/summary.json")
    assert all(proof.passed for proof in summary.proofs)
    assert set(summary.compressed.quality) == {"embedding_r1"}
    answer = load_bundle(tmp_path / "r/bundle")(text="a red a")
    assert answer["embedding"].shape[-1] == 32


def test_profile_tells_why_a_layer_is_cross_modal(tiny, tmp_path, run_folder):
    """The command prints a profile that a simulated machine has made."""
    shutil.copytree(run_folder, tmp_path / "p")
    done = call("profile", tiny / "spec.yaml", "--out", tmp_path / "p", "--resume")
    text = " ".join(done.output.split())
    assert done.exit_code == 0 and "cross-modal" in text and "inside models" in text


def test_own_modules_go_along_with_a_job(tmp_path, monkeypatch):
    from mmcompress.errors import SpecError
    from mmcompress.search.jobs import find_own_modules

    monkeypatch.chdir(tmp_path)
    (tmp_path / "towers").mkdir()
    (tmp_path / "towers" / "__init__.py").touch()
    (tmp_path / "alone.py").touch()
    of = lambda *sources: find_own_modules(
        {"nodes": {str(i): {"source": s} for i, s in enumerate(sources)}}
    )
    assert of(
        "python:towers.eye:build", "python:alone:build", "python:towers:other", "open_clip:ViT-B-32"
    ) == [
        tmp_path / "towers",
        tmp_path / "alone.py",
    ]
    assert of("python:numpy.linalg:build") == []  # installed: the cluster has it too
    with pytest.raises(SpecError, match="no module 'nowhere'"):
        of("python:nowhere:build")


def test_submit_without_a_server_is_an_error(tiny, tmp_path):
    done = call(
        "submit", tiny / "spec.yaml", "--address", "http://127.0.0.1:9", "--out", tmp_path / "r"
    )
    assert done.exit_code == 2 and "no job server answers" in done.output


def test_quality_is_told_before_and_after_training_in_known_metrics(run_folder):
    lines = [json.loads(line) for line in (run_folder / "progress.jsonl").read_text().splitlines()]
    messages = [line.get("message", "") for line in lines]
    # Each artifact tells it, and a run may make several.
    [before, *_] = [m for m in messages if m.startswith("before training, on 16 validation pairs")]
    [after, *_] = [m for m in messages if m.startswith("after training, on 16 validation pairs")]
    assert "token_accuracy" in before and "image_to_text_r1" in after and "(dense " in after
    training = read_record(Summary, run_folder / "summary.json").training
    shown = {figure.name: figure for figure in training.quality}
    assert 0 <= shown["token_accuracy"].before <= 1 and shown["token_accuracy"].after is not None
    assert "| token_accuracy" not in (run_folder / "report.md").read_text()
    assert "token_accuracy on validation pairs" in (run_folder / "report.md").read_text()
    assert "<td>token_accuracy</td>" in (run_folder / "report.html").read_text()


def fail_unforeseen(*arguments, **options):
    """Stand in for a fault of the code or of a plug-in."""
    raise ZeroDivisionError("nobody thought of this")


@pytest.mark.parametrize("flag_at", [0, -1, None])
def test_a_traceback_is_shown_with_debug_alone(tmp_path, monkeypatch, capfd, flag_at):
    """An error says what, where and what to do; what nobody foresaw names its place."""
    monkeypatch.setattr("mmcompress.cli.validate.load_spec", fail_unforeseen)
    words = ["validate", str(tmp_path / "x.yaml")]
    if flag_at is not None:
        words.insert(len(words) if flag_at else 0, "--debug")
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    told = capfd.readouterr().err
    assert ended.value.code == 1
    assert "unexpected ZeroDivisionError: nobody thought of this (at " in told
    assert "test_cli.py:" in told
    assert ("Traceback" in told) is (flag_at is not None)


def test_a_foreseen_error_shows_its_traceback_with_debug_too(tmp_path, capfd):
    for words, is_shown in (
        (["validate", "none.yaml"], False),
        (["--debug", "validate", "none.yaml"], True),
    ):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        told = capfd.readouterr().err
        assert ended.value.code == 2 and "none.yaml: can't be read" in told
        assert ("Traceback" in told) is is_shown


def test_a_reader_that_goes_away_ends_a_command_in_silence():
    """As `mmcompress schema | head` does."""
    line = [sys.executable, "-m", "mmcompress", "schema"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert told == b""


def test_a_usage_error_is_none_of_the_code(capfd):
    with pytest.raises(SystemExit) as ended:
        main.main(["run", "--bogus"])
    assert ended.value.code == 2 and "unexpected" not in capfd.readouterr().err


def test_names_of_commands_are_completed_without_importing_them():
    code = (
        "import sys\n"
        "for m in ('torch', 'altair', 'vl_convert', 'optuna', 'ray'): sys.modules[m] = None\n"
        "from click.shell_completion import ShellComplete\n"
        "from mmcompress.cli import main\n"
        "from click.testing import CliRunner\n"
        "complete = ShellComplete(main, {}, 'mmcompress', '_MMCOMPRESS_COMPLETE')\n"
        "names = [item.value for item in complete.get_completions([], 're')]\n"
        "assert names == ['report'], names\n"
        "for name in ('report', 'compare-runs'):\n"
        "    assert CliRunner().invoke(main, [name, '--help']).exit_code == 0, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_folder_in_place_of_an_image_is_called_that(run_folder, tmp_path):
    done = call("predict", run_folder / "bundle", "--input", f"image={tmp_path}")
    assert done.exit_code == 2 and "a folder; name one image in it" in done.output


@pytest.mark.slow
def test_show_names_the_report(run_folder):
    assert str(run_folder / "report.html") in call("show", run_folder).output.replace("\n", "")


@pytest.mark.parametrize(("policy", "count"), [("", "2000"), ("active", None)])
def test_idle_threads_sleep_soon_unless_the_user_says_how_they_wait(monkeypatch, policy, count):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the command sets
        monkeypatch.delenv(name)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert CliRunner().invoke(main, ["list", "pipelines"]).exit_code == 0
    assert os.environ.get("GOMP_SPINCOUNT") == count
