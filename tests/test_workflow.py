"""The whole way on models of milliseconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from conftest import SENSITIVITY
from recording_data import RecordingData
from simulated import InProcessBenchmarker

from mmcompress.cli import main
from mmcompress.errors import DataError, ModelError, SpecError
from mmcompress.graph.blocks import (
    count_droppable_blocks,
    count_steps,
    count_units_after,
)
from mmcompress.graph.structure import Candidate, measure_removed_share
from mmcompress.results.records import (
    Attempt,
    Bound,
    FreeWriting,
    Summary,
    TrainingResult,
    Trial,
)
from mmcompress.run import run_targets as workflow
from mmcompress.run.answers import answer_split, estimate_qualities
from mmcompress.run.approach_target import (
    MAX_ALLOWED_MARGIN,
    ApproachOptions,
    FitAttempt,
    approach_target,
)
from mmcompress.run.compress.restart import StartChoice, choose_start
from mmcompress.run.fitted_structure import MIN_TARGET_SHARE, FittedStructure, FitTolerances
from mmcompress.run.next_artifact import (
    Artifact,
    ArtifactLimits,
    Done,
    Retry,
    is_better,
    next_step,
    plan_artifact,
)
from mmcompress.run.run_policy import RunPolicy
from mmcompress.run.stages import prepare_run, reach_target
from mmcompress.run.structure_benchmark import (
    MIN_MARGIN,
    StructureBenchmark,
)
from mmcompress.run.warnings import list_warnings
from mmcompress.runtime.graph import load_bundle
from mmcompress.runtime.progress import ignore_progress
from mmcompress.search.build_problem import AIMED_SHARE
from mmcompress.spec.schema import Limits
from mmcompress.spec.space import Dimension, find_default_space
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import _select_decisive_options, open_run
from mmcompress.workspace.folder import RunFolder


def test_a_run_leaves_a_summary_a_report_and_a_bundle(run_folder):
    s = read_record(Summary, run_folder / "summary.json")
    assert {"bundle", "baseline", "report.html", "report.md", "study.journal", "weights"} <= {
        p.name for p in run_folder.iterdir()
    }
    assert all(p.passed for p in s.proofs) and len(s.proofs) > 10
    assert s.search.trials >= 4 and s.search.failed == 0
    assert s.search.linearization_evaluations >= len(s.search.split_losses)
    told = "Before the trials, the budget was split" in (run_folder / "report.html").read_text()
    assert told == (len(s.search.split_losses) > 1)
    assert set(s.compressed.quality) == {
        "image_to_text_r1",
        "text_to_image_r1",
        "caption_exact_match",
    }
    assert all(q.n == 24 for q in s.compressed.quality.values())
    assert 8 <= s.compressed.latency_ms.n <= 90
    assert s.speedup == pytest.approx(s.baseline.latency_ms.p50 / s.compressed.latency_ms.p50)
    assert s.target.met == (s.compressed.latency_ms.p50 <= s.target.latency_ms)


def test_what_was_cut_is_gone_from_the_artifact(run_folder):
    s = read_record(Summary, run_folder / "summary.json")
    weighted = [(n, b) for n, bs in s.blocks.items() for b in bs if b.group != "tokens"]
    cut = any(s.kept_units[n].get(b.name, b.units) < b.units for n, b in weighted)
    assert cut == (s.compressed.params < s.baseline.params)


def test_a_finished_run_resumes_to_the_same_structure_without_new_trials(run_folder, tiny, machine):
    before = json.loads((run_folder / "summary.json").read_text())
    again = workflow.run(tiny / "spec.yaml", run_folder, resume=True, **machine)
    assert (
        again.kept_units == before["kept_units"]
        and again.search.trials == before["search"]["trials"]
    )
    assert (
        again.compressed.latency_ms.p50 == before["compressed"]["latency_ms"]["p50"]
    )  # nor measured again


@pytest.mark.very_slow
def test_a_run_that_was_cut_off_before_its_summary_measures_what_was_made(
    run_folder, tiny, tmp_path, one_artifact
):
    before = read_record(Summary, run_folder / "summary.json")
    shutil.copytree(run_folder, tmp_path / "r")
    (tmp_path / "r" / "summary.json").unlink()
    again = workflow.run(
        tiny / "spec.yaml",
        tmp_path / "r",
        resume=True,
        bench=InProcessBenchmarker(),
        policy=one_artifact,
    )
    assert again.kept_units == before.kept_units and again.samples == before.samples
    assert again.compressed.latency_ms.p50 != before.compressed.latency_ms.p50


def test_an_occupied_folder_is_refused_without_resume(run_folder, tiny, machine):
    with pytest.raises(DataError, match="--resume"):
        workflow.run(tiny / "spec.yaml", run_folder, **machine)


def test_resume_with_another_spec_is_refused(run_folder, tiny, machine):
    with pytest.raises(DataError, match="another spec"):
        workflow.run(tiny / "spec.yaml", run_folder, overrides={"seed": 5}, resume=True, **machine)


@pytest.mark.very_slow
def test_what_a_spec_pins_is_kept_by_every_trial(tmp_path, run_tiny):
    pins = {
        "nodes.vision.precision": "fp32",
        "nodes.text.prune.ffn": 0.5,
        "nodes.text.prune.heads": 0.0,
    }
    pins |= {
        "search.trials": 4,
        "distill.steps": 1,
        "nodes.captioner.prune.blocks.0.ffn": 0.25,
        "prune.protection": 3.0,
    }
    s = run_tiny(tmp_path / "r", overrides=pins)
    for t in s.trials:
        assert t.candidate.precision["vision"] == "fp32"
        assert t.candidate.kept_units["captioner"]["0.ffn"] == 48
        assert t.candidate.kept_units["text"]["0.ffn"] <= 64  # of 128
    for (
        t
    ) in s.trials:  # a protection that is given holds for every structure, wherever it comes from
        cross, rest = (
            measure_removed_share(
                t.candidate.kept_units, s.blocks, cross=s.cross_modal_reasons, crossing=c
            )
            for c in (True, False)
        )
        assert 3.0 * cross <= rest + 1e-6, t.origin


def test_a_protection_that_is_searched_holds_at_its_lower_end(run_folder, tiny):
    """Cross-modal layers lose no larger share than the rest, whatever the knapsack, moves and mutations think."""
    s = read_record(Summary, run_folder / "summary.json")
    assert s.trials
    for t in s.trials:
        cross, rest = (
            measure_removed_share(
                t.candidate.kept_units, s.blocks, cross=s.cross_modal_reasons, crossing=c
            )
            for c in (True, False)
        )
        assert cross <= rest + 1e-6, t.origin


@pytest.mark.very_slow
def test_an_encoder_that_nothing_reads_is_judged_by_its_embeddings(loose, tmp_path, machine):
    path, changes = loose
    changes = changes | {"search.trials": 1, "distill.steps": 2}
    run = prepare_run(open_run(path, tmp_path / "r", overrides=changes, **machine)).run
    shutil.copytree(run.folder.baseline, run.folder.bundle)
    with run.seal.open_for_judging():
        quality = estimate_qualities(answer_split(run, "test"))
    for figures in quality.values():
        assert set(figures) == {"agreement", "embedding_r1"}
        assert all(figure.value == 1 for figure in figures.values())
        assert figures["embedding_r1"].n == 24
    curves = json.loads((tmp_path / "r" / "sensitivity.json").read_text())["curves"]["text"]
    assert max(max(c["loss_increases"]) for c in curves.values()) > 0  # not cut for free


@pytest.mark.very_slow
def test_rounds_of_training_go_on_with_pairs_not_seen_before(
    tiny, tmp_path, one_artifact, machine, prepare_tiny
):
    changes = {"prune.schedule": "gradual", "prune.rounds": 2, "distill.steps": 14}
    changes |= {"search.trials": 1, "search.level_switches": 0, "target": "1.1x"}
    changes |= {"search.short_finetunings": 0}
    prepare_tiny(tmp_path / "r", changes)
    options = {"overrides": changes, "resume": True, **machine}
    prepared = prepare_run(open_run(tiny / "spec.yaml", tmp_path / "r", **options))
    loaded = []
    recorded = replace(prepared.run, data=RecordingData(prepared.run.data, loaded))
    reach_target(recorded, prepared=prepared, policy=one_artifact)
    steps = [seed for split, count, seed in loaded if (split, count) == ("train", 4) and seed > 100]
    # Some are loaded twice: the teacher is timed on the next ones.
    assert len(set(steps)) == 14
    for number in (1, 2):
        rows = json.loads((tmp_path / "r" / f"distill-{number}.json").read_text())
        assert max(row["step"] for row in rows) == 7


def test_another_search_space_is_refused_on_resume(run_folder, tiny, machine):

    with pytest.raises(DataError, match="another search space"):
        workflow.run(
            tiny / "spec.yaml",
            run_folder,
            space=find_default_space().with_name("prune_only.yaml"),
            resume=True,
            **machine,
        )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("nodes.text.prune.tokens", 0.5, "this model has no tokens to cut"),
        ("nodes.vision.prune.drop", 9, "only 2 of its blocks can be removed whole"),
        ("nodes.vision.prune.blocks.0.fn", 0.5, "no block is named '0.fn'; did you mean '0.ffn'"),
    ],
)
def test_a_cut_that_a_model_cannot_take_is_refused(tiny, tmp_path, path, value, message, machine):
    with pytest.raises(ModelError, match=message):
        workflow.run(tiny / "spec.yaml", tmp_path / "r", overrides={path: value}, **machine)


@pytest.mark.slow
def test_random_structures_are_drawn_in_the_report_of_their_run(run_folder, tmp_path):
    from mmcompress.report.page import write_report
    from mmcompress.results.records import Prediction
    from mmcompress.storage import write_record

    summary, page = (
        read_record(Summary, run_folder / "summary.json"),
        tmp_path / "run" / "2x" / "report.html",
    )
    write_report(summary, page.parent)
    assert "random structures" not in page.read_text()
    write_record(
        RunFolder(path=tmp_path / "run").prediction,
        Prediction(
            pipeline=summary.pipeline,
            mean_absolute_error=0.0321,
            spearman=0.987,
            predicted_ms=(1.0, 2.0),
            measured_ms=(1.1, 1.9),
            cpu={},
        ),
    )
    write_report(summary, page.parent)  # what several targets share lies a folder above
    write_record(
        RunFolder(path=page.parent).prediction,
        Prediction(
            pipeline="another",
            mean_absolute_error=0.0,
            spearman=1.0,
            predicted_ms=(1.0,),
            measured_ms=(1.0,),
            cpu={},
        ),
    )
    write_report(summary, page.parent)
    assert "1 structure drawn" not in page.read_text()
    RunFolder(path=page.parent).prediction.write_text(
        "{"
    )  # nor does a report fail for what somebody broke
    write_report(summary, page.parent)
    assert (
        "2 structures drawn at random" in page.read_text()
        and "3.2 %, Spearman 0.987" in page.read_text()
    )


@pytest.fixture(scope="module")
def out_of_reach(run_tiny, tmp_path_factory):
    """(folder, summary) of a run for a target that nothing meets."""
    folder = tmp_path_factory.mktemp("out_of_reach") / "r"
    changes = {"search.trials": 2, "search.level_switches": 0, "distill.steps": 1}
    return folder, run_tiny(folder, overrides={"target": "0.01ms", **changes})


def test_a_target_out_of_reach_says_what_limits_it(out_of_reach):
    folder, s = out_of_reach
    assert not s.target.met and (folder / "bundle" / "manifest.json").exists()
    assert 0 < s.target.fixed_ms <= s.target.floor_ms
    [exceeded] = s.target.exceeded_bounds
    assert exceeded.kind == "p50" and exceeded.node == "" and exceeded.unit == "ms"
    assert exceeded.value == s.compressed.latency_ms.p50 and exceeded.limit == 0.01
    [told] = [w for w in s.warnings if "bottleneck" in w]
    assert f"{s.target.floor_ms:.2f} ms" in told
    assert (
        set(s.target.fixed_ms_by_node) == set(s.compressed.nodes)
        and min(s.target.fixed_ms_by_node.values()) >= 0
    )
    assert all(f"{n} {ms:.2f} ms" in told for n, ms in s.target.fixed_ms_by_node.items())


def test_the_command_exits_with_3_where_a_target_cannot_be_met(tiny, out_of_reach):
    """It goes on with a finished run; `test_cli.py` has one that it makes by itself."""
    folder, _ = out_of_reach
    options = ["--target", "0.01ms", "--trials", "2", "--resume"]
    options += ["--set", "search.level_switches=0", "--set", "distill.steps=1"]
    command = ["run", str(tiny / "spec.yaml"), "--out", str(folder), *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 3, done.output
    assert (folder / "bundle" / "manifest.json").exists()
    assert "bottleneck" in " ".join(done.output.split())


@pytest.mark.very_slow
def test_a_large_pipeline_is_searched_on_estimates_alone(tiny, tmp_path, machine, run_tiny):
    """As `clip_blip_base.yaml` does: loss increases from Fisher scores, trials as sums, no input moments, no model run."""
    scores = {"prune.importance": "fisher", "prune.sensitivity": "estimated"}
    changes = {
        **scores,
        "search.evaluator": "estimated",
        "search.trials": 6,
        "search.level_switches": 2,
    }
    s = run_tiny(tmp_path / "r", overrides={**changes, "distill.steps": 1}, leave_out=SENSITIVITY)
    assert s.search.failed == 0 and s.search.trials >= 6 and all(p.passed for p in s.proofs)
    assert all(t.quality == {} for t in s.trials)
    rounding = json.loads((tmp_path / "r" / "sensitivity.json").read_text())[
        "rounding"
    ]  # of that there is no estimate
    assert all(by["fp32"] == 0 for by in rounding.values()) and any(
        by["int8"] > 0 for by in rounding.values()
    )
    again = {**scores, "quantize.max_loss_increase": 0.1}
    with pytest.raises(
        SpecError, match=r"quantize.max_loss_increase: is found by running the pipeline"
    ):
        workflow.run(tiny / "spec.yaml", tmp_path / "q", overrides=again, **machine)


@pytest.mark.slow
def test_zeros_within_layers_are_counted_and_warned_about(tmp_path, run_tiny):
    changes = {
        "search.trials": 1,
        "search.level_switches": 0,
        "distill.steps": 2,
        "target": "1.05x",
    }
    changes |= {
        f"nodes.{n}.prune.{k}": 0.25
        for n in ("vision", "captioner", "text")
        for k in ("heads", "ffn")
    }
    changes |= {f"nodes.{n}.prune.drop": 0 for n in ("vision", "captioner", "text")}
    s = run_tiny(
        tmp_path / "r",
        overrides={**changes, "prune.sparsity": 0.5, "prune.pattern": "2:4"},
    )
    assert [n.sparsity for n in s.compressed.nodes.values()] == pytest.approx([0.5] * 3, abs=0.03)
    assert all(n.sparsity == 0 for n in s.baseline.nodes.values())
    assert sum("brings no speed" in w for w in s.warnings) == 3


@pytest.mark.slow
def test_blocks_that_rounding_harms_stay_in_fp32(tmp_path, run_tiny):
    changes = {
        "search.trials": 1,
        "search.level_switches": 0,
        "distill.steps": 1,
        "target": "1.05x",
    }
    changes |= {
        "quantize.max_loss_increase": 1e-9,
        "nodes.vision.precision": "int8",
        "nodes.text.precision": "int8",
    }
    run_tiny(tmp_path / "r", overrides=changes, leave_out=SENSITIVITY)
    spared = json.loads((tmp_path / "r" / "sensitivity.json").read_text())["fp32_blocks"]
    manifest = json.loads((tmp_path / "r" / "bundle" / "manifest.json").read_text())["graph"][
        "nodes"
    ]
    assert spared["vision"]["int8"] or spared["text"]["int8"]
    for n in ("vision", "text"):
        assert manifest[n]["spared"] == sorted(spared[n]["int8"])


@pytest.mark.very_slow
def test_limits_bind_the_search_and_are_checked_on_what_was_made(tmp_path, run_folder, run_tiny):
    changes = {"search.trials": 4, "distill.steps": 1, "target": "1.01x"}
    dense = read_record(Summary, run_folder / "summary.json").baseline
    bound = 0.8 * dense.params / 1e6
    asked = {**changes, "limits": {"params_m": bound, "memory_mb": 4000.0}}
    s = run_tiny(tmp_path / "r", overrides=asked)
    assert s.compressed.params / 1e6 <= bound
    assert "parameters" not in {exceeded.kind for exceeded in s.target.exceeded_bounds}
    assert s.compressed.memory_mb > 20
    tight = run_tiny(
        tmp_path / "t",
        overrides={**changes, "limits": {"size_mb": 0.001}},
    )
    assert not tight.target.met
    assert "size" in {exceeded.kind for exceeded in tight.target.exceeded_bounds}
    [lowest] = tight.target.lowest_reachable
    assert lowest.kind == "size" and lowest.limit == 0.001
    assert 0.001 < lowest.value < tight.baseline.size_mb
    assert any(f"predicted at {lowest.value:.2f} MB" in w for w in tight.warnings)


@pytest.mark.very_slow
@pytest.mark.parametrize("schedule", ["gradual", "rewind"])
def test_a_schedule_goes_by_rounds_and_is_proved_at_the_end(
    tiny, tmp_path, schedule, one_artifact, run_tiny
):
    changes = {"search.trials": 2, "search.level_switches": 0, "distill.steps": 4, "target": "1.3x"}
    changes |= {"prune.schedule": schedule, "prune.rounds": 2}
    s = run_tiny(tmp_path / "r", overrides=changes, policy=one_artifact)
    assert all(p.passed for p in s.proofs) and any(p.name == "masked == sliced" for p in s.proofs)
    assert {"distill-1.json", "distill-2.json"} <= {p.name for p in (tmp_path / "r").iterdir()}
    assert (tmp_path / "r" / "distill.json").exists() == (schedule == "rewind")
    (tmp_path / "r" / "summary.json").unlink()
    again = run_tiny(
        tmp_path / "r",
        overrides=changes,
        policy=one_artifact,
    )
    assert again.kept_units == s.kept_units and again.samples == s.samples


@pytest.mark.very_slow
def test_survivors_are_rewound_to_an_earlier_checkpoint(tiny, tmp_path, run_tiny):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import MBartConfig, MBartForCausalLM

    [weights] = (tiny / "clip").glob("*.safetensors")
    shutil.copytree(tiny / "clip", tmp_path / "early")
    save_file(
        {k: 0.5 * t for k, t in load_file(weights).items()}, tmp_path / "early" / weights.name
    )
    changes = {
        "search.trials": 2,
        "search.level_switches": 0,
        "distill.steps": 0,
        "target": "1.2x",
        "prune.refit": False,
    }
    changes |= {
        "prune.schedule": "rewind",
        "prune.rounds": 2,
        "nodes.text.rewind": str(tmp_path / "early"),
    }
    with pytest.raises(SpecError, match=r"nodes.text.rewind: prune.schedule is one_shot"):
        run_tiny(
            tmp_path / "q",
            overrides=changes | {"prune.schedule": "one_shot"},
        )
    config = MBartConfig.from_pretrained(tiny / "captioner", decoder_layers=2)
    MBartForCausalLM(config).save_pretrained(tmp_path / "short")
    shutil.copy(tiny / "captioner" / "tokenizer.json", tmp_path / "short")
    with pytest.raises(ModelError, match=r"nodes.captioner.rewind: .* is not the model of"):
        other = changes | {"nodes.captioner.rewind": str(tmp_path / "short")}
        open_run(tiny / "spec.yaml", tmp_path / "q", overrides=other)
    run_tiny(tmp_path / "r", overrides=changes)
    dense = open_run(tiny / "spec.yaml", tmp_path / "d").models
    for node, factor in (("text", 0.5), ("vision", 1.0)):
        made = load_file(tmp_path / "r" / "weights" / f"{node}.safetensors")
        whole = dict(dense[node].named_parameters())
        alike = [
            k for k, t in made.items() if k in whole and t.shape == whole[k].shape and t.ndim > 1
        ]
        assert alike and all(torch.allclose(made[k], factor * whole[k], atol=1e-6) for k in alike)


def _judged_artifact(share, *, speed_factor=1.0, effort=0, params=1e6, floor_ms=0.1, aimed=0.97):
    """An artifact of a target of 1 ms that takes `share` ms, as far as the policy looks at it."""
    target = SimpleNamespace(
        latency_ms=1.0, statistic="p50", floor_ms=floor_ms, met=share <= 1, lowest_reachable=()
    )
    side = SimpleNamespace(
        latency_ms=SimpleNamespace(p50=share), nodes={}, params=params, size_mb=0.0, memory_mb=0.0
    )
    summary = SimpleNamespace(
        target=target,
        compressed=side,
        validation_losses=(),
        machine_speed_factor=speed_factor,
        latency_margin=0.0,
        writing=FreeWriting(),
    )
    fitted = FittedStructure(
        candidate=Candidate(kept_units={}, precision={}),
        predicted_ms=aimed,
        measured_ms=0.97,
        target_ms=1.0,
        search_effort=effort,
        correction=1.0,
        attempts=(Attempt(predicted_ms=1.0, measured_ms=1.0, target_ms=1.0),) * 2,
    )
    return Artifact(fitted=fitted, summary=summary)


@pytest.mark.parametrize(
    ("shares", "speed_factor", "max_artifacts", "made"),
    [
        ((1.02, 0.98), 1.0, 1, 2),
        ((1.02, 1.01, 0.9), 1.0, 1, 2),
        ((1.02, 0.98), 0.96, 1, 2),  # a miss is one, however fast the machine is now
        ((0.9, 0.98), 1.0, 1, 1),
        ((1.0,), 1.0, 1, 1),
        ((0.9, 0.98), 1.0, 2, 2),
        ((0.9, 0.98), 1.07, 2, 1),  # that only seems to be too fast
    ],
)
def test_a_miss_is_tried_once_more_even_where_one_artifact_is_asked(
    shares, speed_factor, max_artifacts, made
):
    limits = ArtifactLimits(
        bounds=Limits(params_m=2.0), max_artifacts=max_artifacts, search_effort=0
    )
    history, first_attempts = [], [plan_artifact((), limits).first_attempt]
    for share in shares:
        history.append(_judged_artifact(share, speed_factor=speed_factor))
        step = next_step(history, limits)
        if isinstance(step, Done):
            break
        first_attempts.append(step.first_attempt)
    assert len(history) == made
    best = history[0].summary
    for artifact in history[1:]:
        best = artifact.summary if is_better(artifact.summary, best) else best
    nearest = min(shares[:made], key=lambda share: (share > 1, abs(share - 1)))
    assert best.compressed.latency_ms.p50 == nearest
    # the second search goes on from what the first measured
    assert first_attempts == [0, 2][:made]


def test_what_an_artifact_taught_is_in_the_plan_of_the_next():
    limits = ArtifactLimits(bounds=Limits(params_m=2.0), max_artifacts=3, search_effort=4)
    missed = _judged_artifact(1.02, effort=4, params=2.2e6)
    step = next_step([missed], limits)
    assert step.final_to_fitted == pytest.approx(1.02 / 0.97)
    assert step.bounds.params_m == pytest.approx(2.0 * 2.0 / 2.2)
    # nothing in the space is predicted to be fast enough
    hopeless = _judged_artifact(1.02, effort=4, floor_ms=1.01)
    assert isinstance(next_step([hopeless], limits), Done)
    # nothing larger was within the target
    assert isinstance(next_step([_judged_artifact(0.9, effort=4, aimed=0.9)], limits), Done)
    # who bounds the trials asks for no further round, unless the target is missed
    bounded = replace(limits, bounds_trials=True)
    faster = _judged_artifact(0.9, effort=4)
    assert isinstance(next_step([faster], limits), Retry)
    assert "trials are bounded" in next_step([faster], bounded).reason
    assert isinstance(next_step([missed], bounded), Retry)
    # an artifact of a shorter search does not count
    one = replace(limits, max_artifacts=1)
    shorter, longer = (_judged_artifact(1.02, effort=effort) for effort in (1, 4))
    assert isinstance(next_step([shorter, longer], one), Retry)
    assert isinstance(next_step([longer, longer], one), Done)


def test_of_two_artifacts_the_faster_is_kept_where_it_lost_no_more():
    def made(share, loss, margin=0.0):
        target = SimpleNamespace(latency_ms=1.0, statistic="p50", met=share <= 1)
        compressed = SimpleNamespace(latency_ms=SimpleNamespace(p50=share))
        return SimpleNamespace(
            target=target,
            compressed=compressed,
            validation_losses=(0.08, loss),
            machine_speed_factor=1.0,
            latency_margin=margin,
        )

    rows = [made(0.92, 0.11), made(0.96, 0.14), made(0.97, 0.10), made(1.01, 0.05), made(1.2, 0.01)]
    best = lambda *of: all(
        is_better(rows[of[0]], rows[i]) and not is_better(rows[i], rows[of[0]]) for i in of[1:]
    )
    assert best(0, 1)  # faster, and it lost less
    assert best(2, 0)  # what uses its target up, where that is worth something
    assert best(2, 1) and best(0, 3) and best(1, 3, 4) and best(3, 4)
    # What may be chance does not count; a target that is met does.
    near = made(0.96, 0.14, margin=0.02)
    faster = made(0.93, 0.15, margin=0.02)
    assert is_better(near, faster) and not is_better(faster, near)
    missed = made(1.01, 0.05, margin=0.02)
    assert is_better(near, missed) and not is_better(missed, near)


@dataclass(frozen=True)
class UnitPredictor:
    """Predicts a hundredth of a millisecond, or what is given, for each unit of the one block."""

    correction: float = 1.0
    unit_ms: float = 0.01
    others: float = 0.0
    """Time outside the node / time inside it."""

    def __call__(self, candidate):
        return (1 + self.others) * self.predict_node_ms("n", candidate)

    def predict_node_ms(self, node_name, candidate):
        return self.correction * self.unit_ms * candidate.kept_units["n"]["b"]


def _trial(units, predictor):
    candidate = Candidate(kept_units={"n": {"b": units}}, precision={"n": "fp32"})
    return Trial(
        number=0,
        origin="seed",
        overrides={},
        candidate=candidate,
        latency_ms=predictor(candidate),
        loss=0.0,
        quality={},
        evaluation_seconds=0.0,
    )


def _approach(propose, predictor, *, measure, target_ms, node_limits_ms=None, first_attempt=0):
    """Approach a target; returns the result and the options."""
    options = ApproachOptions(
        target_ms=target_ms,
        limits=Limits(node_ms=node_limits_ms or {}),
        final_to_fitted=1.0,
        first_attempt=first_attempt,
        reference_runs=Path("nowhere"),
        tolerances=FitTolerances(),
    )

    def measure_candidate(candidate, predicted_ms):
        ms, worst_limit_ratio = measure(candidate)
        return StructureBenchmark(
            ms=ms, worst_limit_ratio=worst_limit_ratio, margin=MIN_MARGIN, node_ratios={}
        )

    result = approach_target(
        propose, predictor, options=options, measure=measure_candidate, progress=ignore_progress
    )
    return result, options


@pytest.mark.parametrize("slower", [1.0, 1.2, 0.85])
def test_a_fit_learns_what_the_predictor_gets_wrong(slower):
    asked = []

    def propose(predictor, budget_ms, attempt):
        asked.append(attempt)
        return _trial(int(100 * budget_ms / predictor.correction), predictor)

    result, options = _approach(
        propose,
        UnitPredictor(),
        measure=lambda candidate: (slower * candidate.kept_units["n"]["b"] / 100, 0.0),
        target_ms=10.0,
        first_attempt=3,
    )
    assert not result.exhausted
    assert asked == list(range(3, 3 + len(result.attempts)))
    assert result.attempts[-1].is_accepted(options)
    assert len(result.attempts) == (1 if slower == 1.0 else 2)
    assert result.predictor.correction == pytest.approx(slower, rel=0.01)


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.015, 0.02, 0.04])
def test_what_a_fit_accepts_leaves_room_for_its_error_at_both_ends(margin):
    """The finished artifact is to lie 0 to 5 % under the target, and is measured anew."""
    benchmark = StructureBenchmark(ms=1.0, worst_limit_ratio=0.0, margin=margin, node_ratios={})
    attempt = FitAttempt(
        trial=_trial(1, UnitPredictor()),
        predicted_ms=1.0,
        benchmark=benchmark,
        measured_ms=1.0,
        bounded_ms=1.0,
        expected_ms=1.0,
    )
    kept_away = min(margin, MAX_ALLOWED_MARGIN)
    high, low = attempt.upper_share, attempt.lower_share(FitTolerances())
    assert high == 1 - kept_away and high - low >= MIN_MARGIN - 1e-9
    assert low >= MIN_TARGET_SHARE + kept_away / 2


@pytest.mark.parametrize(("factor", "exhausted"), [(1.22, False), (1.0, True)])
def test_what_is_faster_than_asked_is_meant_to_be_only_where_nothing_larger_is_there(
    factor, exhausted
):
    """Else the search just had no other proposal."""
    target_ms = 10.0
    result, _ = _approach(
        lambda predictor, budget_ms, attempt: _trial(800, predictor),
        UnitPredictor(correction=factor),
        measure=lambda candidate: (6.5, 0.0),
        target_ms=target_ms,
    )
    assert result.exhausted is exhausted and len(result.attempts) == 1
    [attempt] = result.attempts
    fitted = FittedStructure(
        candidate=attempt.trial.candidate,
        predicted_ms=attempt.predicted_ms,
        measured_ms=attempt.bounded_ms,
        target_ms=target_ms,
        search_effort=0,
        correction=1.0,
        exhausted=result.exhausted,
    )
    assert fitted.aimed_share == pytest.approx(0.65 if exhausted else 0.976)


def test_limits_that_were_exceeded_are_lowered_by_as_much():
    from mmcompress.results.target_met import (
        find_worst_limit_ratio,
        is_out_of_reach,
        tighten_limits,
    )

    ns = SimpleNamespace
    side = ns(
        params=3e6,
        size_mb=22.0,
        memory_mb=90.0,
        nodes={"a": ns(latency_ms_p50=2.2), "b": ns(latency_ms_p50=1)},
    )
    asked = Limits(params_m=4.0, size_mb=20.0, node_ms={"a": 2.0, "b": 3.0})
    assert (
        find_worst_limit_ratio(asked, side) == pytest.approx(1.1)
        and find_worst_limit_ratio(Limits(), side) == 0
    )
    found = tighten_limits(asked, asked, side=side)
    assert (
        found.params_m == 4.0
        and found.size_mb == pytest.approx(20 * 20 / 22)
        and found.memory_mb is None
    )
    size = Bound(kind="size", value=20.1, limit=20.0, unit="MB")
    node_ms = Bound(kind="p50", node="a", value=2.1, limit=2.0, unit="ms")
    params = Bound(kind="parameters", value=3.9, limit=4.0, unit="M")
    assert is_out_of_reach(asked, side, lowest=[size])
    assert is_out_of_reach(asked, side, lowest=[params, node_ms])
    # The node of another limit, and what can be reached, are no reason.
    lower = [replace(size, value=19.9), replace(node_ms, value=1.0), replace(node_ms, node="b")]
    assert not is_out_of_reach(asked, side, lowest=[*lower, params])
    assert found.node_ms == {"a": pytest.approx(2 * 2 / 2.2), "b": 3.0}
    assert tighten_limits(found, asked, side=side).size_mb == pytest.approx(
        20 * (20 / 22) ** 2
    )  # once more, from there


def test_what_a_space_leaves_open_is_never_nothing(tiny, run_folder, tmp_path):
    """Between two steps of a block lies the nearest one; and no more sub-layers go than may."""
    from mmcompress.search.build_problem import build_problem

    r = open_run(tiny / "spec.yaml", run_folder, resume=True)
    prepared = prepare_run(r)
    predict, sensitivity = prepared.predictor, prepared.sensitivity
    heads = {
        p: replace(d, low=0.4, high=0.4)
        for p, d in r.space.dimensions.items()
        if p.endswith(".heads")
    }
    plain = {p: d for p, d in r.space.dimensions.items() if not p.endswith(".drop")}
    narrow = replace(r, space=replace(r.space, dimensions=plain | heads))
    p = build_problem(narrow, sensitivity, predictor=predict, budget_ms=1.0)
    nearest = lambda b: int(count_units_after(b, round(0.4 * count_steps(b))))
    assert all(
        p.unit_choices[n][b.name] == (nearest(b),)
        for n, bs in r.blocks.items()
        for b in bs
        if b.group == "heads"
    )
    open_ = build_problem(
        replace(r, space=replace(r.space, dimensions=plain)),
        sensitivity,
        predictor=predict,
        budget_ms=1.0,
    )
    steep = {f"nodes.{n}.prune.{group}": 0.9 for n in r.blocks for group in ("heads", "ffn")}
    assert open_.is_allowed(open_.resolve(steep)) and not any(
        k == 0 for by in open_.resolve(steep).kept_units.values() for k in by.values()
    )


def test_one_block_through_which_a_node_reads_its_input_stays(tiny, run_folder):
    """However many sub-layers the space lets go; only the spec itself may drop them all."""
    from mmcompress.search.build_problem import build_problem, find_fastest

    run = open_run(tiny / "spec.yaml", run_folder, resume=True)
    prepared = prepare_run(run)
    drops = {f"nodes.{node}.prune.drop": Dimension(low=0, high=9, step=1) for node in run.blocks}
    roomy_run = replace(run, space=replace(run.space, dimensions={**run.space.dimensions, **drops}))
    problem = build_problem(
        roomy_run, prepared.sensitivity, predictor=prepared.predictor, budget_ms=1e-6
    )
    readers = {"vision": "0.attention", "text": "0.attention", "captioner": "0.cross_attention"}
    assert problem.input_readers == {node: (name,) for node, name in readers.items()}
    fastest = find_fastest(problem, prepared.predictor)
    drawn = problem.resolve(dict.fromkeys(drops, 9))
    for candidate in (fastest, drawn):
        assert problem.is_allowed(candidate)
        for node, reader in readers.items():
            assert candidate.kept_units[node][reader] > 0
            dropped = [units for units in candidate.kept_units[node].values() if units == 0]
            assert len(dropped) == count_droppable_blocks(run.blocks[node])
    # What the spec itself drops is gone.
    prune = replace(run.spec.nodes["vision"].prune, blocks={"0.attention": 1.0})
    nodes = {**run.spec.nodes, "vision": replace(run.spec.nodes["vision"], prune=prune)}
    asked = build_problem(
        replace(roomy_run, spec=replace(run.spec, nodes=nodes)),
        prepared.sensitivity,
        predictor=prepared.predictor,
        budget_ms=1e-6,
    )
    assert "vision" not in asked.input_readers
    assert asked.resolve({}).kept_units["vision"]["0.attention"] == 0


def test_a_device_may_lie_elsewhere_when_a_run_goes_on(spec):
    def at(readings):
        return _select_decisive_options(
            replace(spec, measure=replace(spec.measure, readings=readings))
        )

    assert at("/a/device.json") == at("/b/device.json") != at("")


def test_a_node_over_its_limit_is_cut_by_what_it_is_over():
    """How far the pipeline then lies from its own target is another matter."""
    limit, target_ms, wrong = 2.0, 20.0, 1.05

    def propose(predictor, budget_ms, attempt):
        return _trial(int(1000 * AIMED_SHARE * limit / predictor.correction), predictor)

    def measure(candidate):
        ms = candidate.kept_units["n"]["b"] / 1000
        return 3 * ms, wrong * ms / limit

    result, _ = _approach(
        propose,
        UnitPredictor(unit_ms=0.001, others=2.0),
        measure=measure,
        target_ms=target_ms,
        node_limits_ms={"n": limit},
    )
    within = [item.compute_target_share(target_ms) <= item.upper_share for item in result.attempts]
    assert within == [False, True]
    assert result.predictor.correction == pytest.approx(wrong, rel=0.01)


def test_the_test_split_is_read_by_the_last_judgement_alone(run_events):
    """Everything that is chosen is chosen on other pairs; one pair is loaded at the start to see that it is there."""
    events = [tuple(event) if isinstance(event, list) else event for event in run_events]
    loads = [event for event in events if isinstance(event, tuple)]
    assert {split for split, _, _ in loads} == {"train", "val", "test"}
    exported = max(i for i, event in enumerate(events) if event == "export")
    first_read = min(i for i, event in enumerate(events) if event[0] == "test")
    assert exported < first_read


def test_a_static_precision_of_a_plugin_gets_calibration_inputs(tiny, tmp_path):
    """Not only the one that is named int8_static."""
    from mmcompress.quantize.schemes.static import INT8_STATIC
    from mmcompress.registry import PRECISIONS

    PRECISIONS.add("own_static", INT8_STATIC)
    run = open_run(tiny / "spec.yaml", tmp_path / "r")
    precision = {**dict.fromkeys(run.models, "fp32"), "vision": "own_static"}
    proofs = run.write_bundle(run.models, precision, kept={}, folder=tmp_path / "bundle")
    assert proofs
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["graph"]["nodes"]["vision"]["precision"] == "own_static"


class NamedData:
    """Pairs with names, as those of files have."""

    def __init__(self, data):
        self.splits, self.modality, self._data = data.splits, data.modality, data

    def load(self, split, count=None, *, seed=0):
        pairs = self._data.load(split, count, seed=seed)
        return replace(pairs, names=tuple(f"{split}-{i}" for i in range(len(pairs))))


def test_labels_come_from_the_bundle_that_lies_there_now(run_folder, tiny, tmp_path):
    """A bundle that was written anew under the same path is not taken from a cache."""
    from mmcompress.run.teacher_labels import TeacherLabelledData

    run = open_run(tiny / "spec.yaml", run_folder, resume=True)
    data = NamedData(run.data)
    labels = []
    for number, bundle in enumerate(("baseline", "bundle")):
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        shutil.copytree(run_folder / bundle, tmp_path / "bundle")
        labelled = TeacherLabelledData(
            data, bundle=tmp_path / "bundle", record=tmp_path / f"labels-{number}.json"
        )
        pairs = labelled.load("val", 8)
        pipeline = load_bundle(tmp_path / "bundle")
        texts = tuple(pipeline.run(image=image)["captioner"]["text"] for image in pairs.inputs)
        assert pairs.generated_texts == texts
        labels.append(texts)
    assert labels[0] != labels[1]
    with run.seal.open_for_judging():
        assert labelled.load("test", 2).generated_texts == ()


def test_the_run_goes_on_with_labelled_data_and_the_opened_one_stays_as_it_was(
    tiny, tmp_path, run_folder
):
    from mmcompress.run.teacher_labels import label_by_teacher

    run = open_run(tiny / "spec.yaml", run_folder, resume=True)
    assert label_by_teacher(run) is run
    spec = replace(run.spec, data=replace(run.spec.data, labels="teacher"))
    run = replace(run, spec=spec, data=NamedData(run.data))
    labelled = label_by_teacher(run)
    assert labelled.data is not run.data and isinstance(run.data, NamedData)


def test_a_second_artifact_starts_from_the_least_loss():
    """Fresh, learned, and learned and refitted; near what the first one reached, a third of the training is enough."""
    assert choose_start((0.5, 0.2, 0.3), earlier_best=0.2) == StartChoice(
        index=1, is_near_earlier=True
    )
    assert choose_start((0.1, 0.2, 0.3), earlier_best=0.2).index == 0
    assert choose_start((0.5, 0.4, 0.3), earlier_best=0.2) == StartChoice(
        index=2, is_near_earlier=False
    )
    assert choose_start((0.5, 0.4, 0.3), earlier_best=float("inf")).is_near_earlier


@pytest.mark.very_slow
def test_a_second_artifact_goes_on_from_what_the_first_learned(tmp_path, run_tiny):
    def retry_once(history, limits):
        return plan_artifact(history, limits) if len(history) < 2 else Done(reason="two are made")

    messages = []
    changes = {"target": "1.2x", "search.trials": 2, "search.level_switches": 0}
    changes |= {"search.max_artifacts": 2, "distill.steps": 6}
    s = run_tiny(
        tmp_path / "r",
        overrides=changes,
        on_progress=lambda stage, message, share: messages.append(message),
        policy=RunPolicy(next_step=retry_once, fit=FitTolerances(max_attempts=1)),
    )
    # fresh, learned, and learned and refitted
    assert sum(message.startswith("loss before training: ") for message in messages) == 1
    assert all(p.passed for p in s.proofs)
    assert (
        not (tmp_path / "r" / "next").exists()
        and read_record(Summary, tmp_path / "r" / "summary.json") == s
    )
    history = json.loads((tmp_path / "r" / "distill.json").read_text())
    inherits = (tmp_path / "r" / "distill-0.json").exists()
    assert max(row["step"] for row in history) in ((2, 6) if inherits else (6,))


@pytest.mark.very_slow
def test_where_cutting_destroys_structures_are_trained_a_little_and_the_best_is_taken(
    tiny, tmp_path, monkeypatch, one_artifact, machine, run_tiny
):
    from mmcompress.search import evaluator
    from mmcompress.search import repair as moves
    from mmcompress.search.build_problem import AIMED_SHARE, build_problem
    from mmcompress.search.short_finetune import ValidationLoss

    # one structure is measured, and taken: how far the machine moves the budget is another matter
    policy = replace(one_artifact, fit=FitTolerances(max_attempts=1))
    monkeypatch.setattr(evaluator, "COLLAPSE_RATIO", 0.0)
    losses = iter(
        [
            *[0.0],  # of the dense pipeline
            *[3.0, 1.0, 2.0],  # of three structures half-way
            *[0.7, 0.9],  # of the better two at the end
            *[5.0, 1.0, 0.1],  # of a fresh start, of trained weights, and dense: nothing is cut off
        ]
    )
    measure_in_turn = lambda self, models: next(losses)
    monkeypatch.setattr(ValidationLoss, "measure", measure_in_turn)
    told = []
    changes = {
        "target": "1.1x",
        "search.trials": 4,
        "search.level_switches": 2,
        "distill.steps": 20,
        "search.short_finetunings": 3,
    }
    changes["search.linearization_rounds"] = (
        0  # the loss increases that the winner is fitted by are then those of the sensitivity
    )
    s = run_tiny(
        tmp_path / "r",
        overrides=changes,
        on_progress=lambda *a: told.append(a),
        policy=policy,
    )
    tried = json.loads((tmp_path / "r" / "short_finetunings.json").read_text())["tried"]
    # Once, however often the budget was corrected.
    assert [t["loss"] for t in tried] == [3.0, 0.7, 0.9]
    assert [t["is_finished"] for t in tried] == [False, True, True]
    assert [t["steps"] for t in tried] == [1, 2, 2]
    # The training goes on from the best one, whose steps count.
    after_cut, short_training = json.loads((tmp_path / "r" / "distill-0.json").read_text())
    assert after_cut["validation_loss"] == 5.0 and short_training["step"] == 2
    assert s.training.asked_steps == 18 and s.validation_losses[:2] == (0.1, 5.0)
    assert len({json.dumps(t["candidate"], sort_keys=True) for t in tried}) == len(tried)
    winner = Candidate(**min(tried, key=lambda t: t["loss"])["candidate"])
    r = open_run(tiny / "spec.yaml", tmp_path / "r", overrides=changes, resume=True)
    prepared = prepare_run(r)
    dense, predict, ev = prepared.dense, prepared.predictor, prepared.sensitivity
    ms, tail = (
        r.goal.compute_target_ms(dense.latency_ms),
        r.goal.compute_p95_ratio(dense.latency_ms),
    )
    p = build_problem(r, ev, predictor=replace(predict, p95_ratio=tail), budget_ms=AIMED_SHARE * ms)
    fitted = moves.grow_to_budget(
        p,
        moves.cut_to_budget(p, winner, loss_increase=ev.estimate_loss_increase),
        loss_increase=ev.estimate_loss_increase,
        rounding=ev.rounding,
    )
    assert s.kept_units == fitted.kept_units  # the winner, fitted to the budget
    assert (
        any(stage == "short finetuning" for stage, *_ in told) and "short finetuning" in s.timings
    )


def test_structures_that_hardly_differ_are_not_both_tried(run_folder, tiny):
    from mmcompress.search import finetuning_pool as pool
    from mmcompress.search.build_problem import build_problem
    from mmcompress.search.problem import complete_candidate

    r = open_run(tiny / "spec.yaml", run_folder, resume=True)
    prepared = prepare_run(r)
    predict, sensitivity = prepared.predictor, prepared.sensitivity
    whole = {n: {b.name: b.units for b in bs} for n, bs in r.blocks.items()}
    fp32 = dict.fromkeys(r.blocks, "fp32")
    p = build_problem(
        r,
        sensitivity,
        predictor=predict,
        budget_ms=predict(Candidate(kept_units=whole, precision=fp32)),
    )
    cut = lambda n, **by: Candidate(kept_units={**whole, n: {**whole[n], **by}}, precision=fp32)
    one, near, far = (cut("vision", **{"0.ffn": k}) for k in (64, 48, 0))
    assert (
        pool.measure_difference(p, one, other=near)
        == pool.measure_difference(p, near, other=one)
        < pool.MIN_WEIGHT_DIFFERENCE
        < pool.measure_difference(p, one, other=far)
    )
    assert (
        pool.measure_difference(p, one, other=one) == 0
        and pool.measure_difference(p, one, other=cut("vision", tokens=8)) >= 0.5
    )
    assert pool.measure_difference(
        p, one, other=Candidate(kept_units=one.kept_units, precision={**fp32, "text": "int8"})
    ) == float("inf")
    trials = [
        Trial(
            number=i,
            origin="seed",
            overrides={},
            candidate=c,
            latency_ms=p.budget_ms,
            loss=float(i),
            quality={},
            evaluation_seconds=0.0,
        )
        for i, c in enumerate((one, near, far))
    ]
    tried = [
        complete_candidate(p, c)
        for _, c in pool.list_distinct_structures(p, sensitivity, run=r, trials=trials)
    ]
    assert tried[0] == one and near not in tried


def test_a_steep_cut_is_warned_about_where_it_did_harm(run_folder):
    s = read_record(Summary, run_folder / "summary.json")
    kept = {n: {b.name: 0 for b in blocks} for n, blocks in s.blocks.items()}
    steep = replace(s, kept_units=kept, settings={**s.settings, "prune": {"schedule": "one_shot"}})
    told = lambda *losses: any(
        "in one step" in w for w in list_warnings(replace(steep, validation_losses=losses))
    )
    assert told() and told(0.1, 0.2, 0.12) and not told(0.1, 0.105, 0.1)


@pytest.mark.parametrize(
    ("steps", "ended_by", "is_told"),
    [(20, "minutes", True), (30, "minutes", False), (20, "steps", False)],
)
def test_a_training_that_hardly_took_place_is_warned_about(run_folder, steps, ended_by, is_told):
    s = read_record(Summary, run_folder / "summary.json")
    training = TrainingResult(
        asked_steps=100,
        steps=steps,
        seconds=90.0,
        learning_rate=1e-3,
        ended_by=ended_by,
        loss=0.5,
        dense_loss=0.4,
        loss_of_twice_the_steps=0.45,
    )
    found = [w for w in list_warnings(replace(s, training=training)) if "hardly trained" in w]
    assert bool(found) == is_told
    if found:
        assert found[0].startswith(
            "the artifact was hardly trained: 20 of 100 steps fit into 1.5 minutes"
        )


@pytest.mark.parametrize(
    ("reached", "usual", "meant", "told"),
    [
        (0.97, 1.0, 0.97, ""),
        (0.90, 1.08, 0.97, ""),  # it only seems to be: the machine is faster than usual
        (0.90, 1.0, 0.97, "another round may use the rest"),
        (0.87, 1.0, 0.88, "no slower structure"),  # the search had nothing slower to offer
    ],
)
def test_a_target_that_is_not_used_up_is_told_with_its_reason(
    run_folder, reached, usual, meant, told
):
    s = read_record(Summary, run_folder / "summary.json")
    ms = s.compressed.latency_ms.p50 / reached
    target = replace(s.target, latency_ms=ms, statistic="p50", met=True)
    s = replace(s, target=target, machine_speed_factor=usual, aimed_share=meant)
    found = [w for w in list_warnings(s) if "of its target" in w]
    assert bool(found) == bool(told) and all(told in w for w in found)


def test_a_miss_is_told_by_its_bounds_with_the_least_that_can_be_reached(run_folder):
    s = read_record(Summary, run_folder / "summary.json")
    size = Bound(kind="size", value=2.0, limit=1.5, unit="MB")
    latency = Bound(kind="p95", value=12.0, limit=10.0, unit="ms")
    node = Bound(kind="p50", node="vision", value=4.0, limit=3.0, unit="ms")
    reachable = (replace(size, value=1.75), replace(node, value=3.25), replace(node, node="text"))
    target = replace(s.target, met=False, exceeded_bounds=(size,), lowest_reachable=reachable)
    told = list_warnings(replace(s, target=target))[0]
    assert told.startswith("size: 2.00 MB, asked for 1.50: the target is not met")
    assert "The largest model is" in told and "bottleneck" not in told
    assert told.endswith("The least size of this search space is predicted at 1.75 MB")
    target = replace(target, exceeded_bounds=(latency, node))
    told = list_warnings(replace(s, target=target))[0]
    assert told.startswith(
        "p95 end to end: 12.00 ms, asked for 10.00; p50 of 'vision': 4.00 ms, asked for 3.00"
    )
    assert "The bottleneck is" in told
    assert told.endswith("The least p50 of 'vision' of this search space is predicted at 3.25 ms")
    stored = write_record(run_folder.parent / "missed.json", replace(s, target=target))
    assert read_record(Summary, stored).target == target


def test_a_run_folder_of_another_format_is_refused_by_name(tiny, tmp_path, machine):
    open_run(tiny / "spec.yaml", tmp_path / "r", **machine)
    open_run(tiny / "spec.yaml", tmp_path / "r", resume=True, **machine)
    (tmp_path / "r" / "format.json").unlink()
    with pytest.raises(DataError, match=r"of format 1 \(mmcompress 0\.1\.0\).* a new --out"):
        open_run(tiny / "spec.yaml", tmp_path / "r", resume=True, **machine)
