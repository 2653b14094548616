"""The whole way on models of milliseconds."""

from __future__ import annotations

import json

import pytest

from mmcompress import workflow
from mmcompress.errors import DataError
from mmcompress.records import Summary, read


def test_a_run_leaves_a_summary_a_report_and_a_bundle(run_folder):
    s = read(Summary, run_folder / "summary.json")
    assert {"bundle", "baseline", "report.html", "report.md", "study.journal", "weights"} <= {
        p.name for p in run_folder.iterdir()
    }
    assert all(p.passed for p in s.proofs) and len(s.proofs) > 10
    assert s.search.trials >= 4 and s.search.failed == 0
    assert set(s.compressed.quality) == {"image_to_text_r1", "text_to_image_r1", "caption_exact_match"}
    assert all(q.n == 24 for q in s.compressed.quality.values())
    assert s.compressed.latency_ms.n == 8
    assert s.speedup == pytest.approx(s.baseline.latency_ms.p50 / s.compressed.latency_ms.p50)
    assert s.target.met == (s.compressed.latency_ms.p50 <= s.target.latency_ms_p50)


def test_what_was_cut_is_gone_from_the_artifact(run_folder):
    s = read(Summary, run_folder / "summary.json")
    cut = any(s.kept[n].get(b.name, b.units) < b.units for n, bs in s.blocks.items() for b in bs)
    assert cut == (s.compressed.params < s.baseline.params)


def test_a_finished_run_resumes_to_the_same_structure_without_new_trials(run_folder, tiny):
    before = json.loads((run_folder / "summary.json").read_text())
    again = workflow.run(tiny / "spec.yaml", run_folder, resume=True)
    assert again.kept == before["kept"] and again.search.trials == before["search"]["trials"]


def test_an_occupied_folder_is_refused_without_resume(run_folder, tiny):
    with pytest.raises(DataError, match="--resume"):
        workflow.run(tiny / "spec.yaml", run_folder)


def test_resume_with_another_spec_is_refused(run_folder, tiny):
    with pytest.raises(DataError, match="changed"):
        workflow.run(tiny / "spec.yaml", run_folder, overrides={"seed": 5}, resume=True)


def test_what_a_spec_pins_is_kept_by_every_trial(tiny, tmp_path):
    pins = {"nodes.vision.precision": "fp32", "nodes.text.prune.ffn": 0.5, "nodes.text.prune.heads": 0.0}
    pins |= {
        "search.trials": 4,
        "distill.steps": 1,
        "nodes.captioner.prune.blocks.0.ffn": 0.25,
        "prune.protection": 3.0,
    }
    s = workflow.run(tiny / "spec.yaml", tmp_path / "r", overrides=pins)
    for t in s.trials:
        assert t.candidate.precision["vision"] == "fp32"
        assert t.candidate.kept["captioner"]["0.ffn"] == 48
    text = s.kept["text"]
    assert sum(text.get(f"{i}.ffn", 128) for i in (0, 1)) <= 144


def test_a_criterion_from_a_plugin_reaches_the_workers(tiny, tmp_path, monkeypatch):
    code = "import torch\nfrom mmcompress.registry import IMPORTANCE\n"
    code += "up = lambda b: torch.arange(b.units).float() + 1\n"
    code += "f = lambda m: {n: {b.name: up(b) for b in x.blocks} for n, x in m.models.items()}\n"
    (tmp_path / "backwards_criterion.py").write_text(code + "IMPORTANCE.add('backwards', f)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    changes = {"plugins": ["backwards_criterion"], "prune.importance": "backwards", "search.executor": "process"}
    changes |= {"search.trials": 1, "search.mutations": 0, "distill.steps": 1}
    s = workflow.run(tiny / "spec.yaml", tmp_path / "r", overrides=changes)
    assert s.search.failed == 0 and s.search.trials >= 1


def test_asking_for_more_trials_on_resume_searches_again(tiny, tmp_path):
    few = {"search.trials": 1, "search.mutations": 0, "distill.steps": 1, "target": "1.1x"}
    first = workflow.run(tiny / "spec.yaml", tmp_path / "r", overrides=few)
    more = workflow.run(tiny / "spec.yaml", tmp_path / "r", overrides=few | {"search.trials": 5}, resume=True)
    assert more.search.trials > first.search.trials


def test_another_search_space_is_refused_on_resume(run_folder, tiny):
    from mmcompress.workflow import default_space

    with pytest.raises(DataError, match="search space has changed"):
        workflow.run(tiny / "spec.yaml", run_folder, space=default_space().with_name("prune_only.yaml"), resume=True)
