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
