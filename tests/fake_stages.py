"""Stages of milliseconds: they write the records that the real ones write, and build no model.

The order of the stages, what a resumed run makes anew, and which artifact stays are tested with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from made_summary import make_summary
from safetensors.torch import load_file, save_file

from mmcompress.errors import ProofFailed
from mmcompress.graph.structure import Candidate
from mmcompress.report.comparison_pages import write_front
from mmcompress.results.records import Attempt, RetainedCheck, Summary
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.forecast import Pace
from mmcompress.run.next_artifact import ArtifactLimits
from mmcompress.run.prepared_run import PreparedRun
from mmcompress.run.resume import read_valid_structure
from mmcompress.run.stages import RunStages
from mmcompress.stats import Latency, Quality
from mmcompress.storage import write_record
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder

DENSE_MS = 3.0
"""Milliseconds of the dense pipeline, as it was profiled."""

TARGET_MS = 1.0
"""Milliseconds that every target asks for."""


QUICK_PACE = Pace(
    trial_pair_seconds=0.0,
    cut_seconds=0.0,
    draw_pair_seconds=0.0,
    teacher_pair_seconds=0.0,
    cut_pair_seconds=0.0,
    student_pair_seconds=0.0,
    dense_ms=1.2,
    megabytes=0.0,
    nodes=3,
    blocks=6,
    references=0,
    requests=8,
    workers=1,
    worker_start_seconds=0.0,
    validation_pairs=16,
    training_validation_pairs=16,
    final_pairs_factor=1,
    finalists=1,
    calibration_pairs=16,
    sensitivity_pairs=16,
    steps=4,
    batch=4,
    validations=1,
    judged_pairs=24,
    further_splits=0,
    measures_memory=False,
)
"""A machine that draws, cuts and trains in no time."""


def read_artifact_number(folder: RunFolder) -> int:
    """Return which artifact, counted from 1, the weights of a folder are of."""
    return int(load_file(folder.units)["artifact"])


@dataclass
class FakeStages:
    """Stages that note what they were called for, and make artifacts that were decided beforehand."""

    shares: Sequence[float]
    """Measured latency / target of the artifacts, in the order they are made; the last one stays."""
    losses: Sequence[float] = (0.1,)
    """Their validation losses."""
    calls: list[str] = field(default_factory=list)
    """What was made: `prepare`, `search`, `train`, `evaluate`, `report`."""
    retained: Mapping[str, float] = field(default_factory=dict)
    """Share of the dense quality that is kept on validation pairs, by target; 1 for all others."""
    unproved: Sequence[int] = ()
    """Artifacts whose proof fails, counted from 1."""
    excluded: list[tuple[str, ...]] = field(default_factory=list)
    """What every search was told to leave out."""
    interrupt: str = ""
    """The stage that is killed when it begins."""
    pace: Pace = QUICK_PACE
    """The pace of the machine."""
    artifacts: int = 0
    """Artifacts that were trained."""

    @property
    def stages(self) -> RunStages:
        """The stages as a run takes them."""
        return RunStages(
            prepare=self.prepare,
            fit=self.fit,
            compress=self.compress,
            evaluate=self.evaluate,
            report=self.report,
            measure_pace=self.measure_pace,
            report_front=self.report_front,
        )

    def measure_pace(
        self, run: RunContext, prepared: PreparedRun | None, *, known: Pace | None = None
    ) -> Pace:
        """Return the pace of a machine on which every stage takes no time, or the given one."""
        return self.pace

    def prepare(self, run: RunContext) -> PreparedRun:
        """Return the run itself: of what the targets share, only the dense latency is looked at."""
        self._begin("prepare")
        dense = SimpleNamespace(latency_ms=Latency(p50=DENSE_MS, p95=DENSE_MS, n=9))
        return PreparedRun(run=run, dense=dense, predictor=None, sensitivity=None)

    def fit(self, run, prepared, *, plan, tolerances) -> FittedStructure:
        """Return the structure on record if it is valid, else another one."""
        effort = ArtifactLimits.from_spec(run.spec).search_effort
        stored = read_valid_structure(run.folder, plan, effort=effort)
        if stored:
            return stored
        self._begin("search")
        self.excluded.append(plan.excluded)
        attempt = Attempt(predicted_ms=0.97, measured_ms=0.97, target_ms=TARGET_MS)
        fitted = FittedStructure(
            candidate=Candidate(
                kept_units={"vision": {"0.ffn": self.artifacts}}, precision={"vision": "fp32"}
            ),
            predicted_ms=0.97,
            measured_ms=0.97,
            target_ms=TARGET_MS,
            search_effort=effort,
            correction=1.0,
            attempts=(attempt,),
            final_to_fitted=plan.final_to_fitted,
            writing_factor=plan.writing_factor,
        )
        write_record(run.folder.fitted, fitted)
        return fitted

    def compress(self, run, prepared, *, fitted, earlier) -> None:
        """Train unless the weights are there, and write the bundle."""
        folder = run.folder
        if not folder.units.exists():
            self._begin("train")
            self.artifacts += 1
            folder.weights.mkdir(exist_ok=True)
            for path in (folder.units, *(folder.locate_node_weights(node) for node in run.models)):
                save_file({"artifact": torch.tensor(self.artifacts)}, path)
            folder.training_history.write_text(json.dumps([{"step": 10 * self.artifacts}]))
        if read_artifact_number(folder) in self.unproved:
            raise ProofFailed("vision: masked == sliced: difference 3.00e-02 (in '0.ffn')")
        self._begin("export")
        folder.bundle.mkdir(exist_ok=True)
        manifest = {
            "format": 2,
            "name": str(read_artifact_number(folder)),
            "files": {},
            "graph": {"inputs": {}, "outputs": {}, "nodes": {}},
        }
        write_record(folder.bundle / "manifest.json", manifest)

    def evaluate(self, run, prepared, *, fitted, compressed, measuring) -> Summary:
        """Write the summary of the artifact whose weights lie in the folder."""
        self._begin("evaluate")
        number = read_artifact_number(run.folder) - 1
        share = self.shares[min(number, len(self.shares) - 1)]
        loss = self.losses[min(number, len(self.losses) - 1)]
        made = make_summary()
        latency = Latency(p50=share * TARGET_MS, p95=share * TARGET_MS, n=9)
        target = replace(
            made.target, latency_ms=TARGET_MS, met=share <= 1, text=run.spec.target, floor_ms=0.1
        )
        summary = replace(
            made,
            pipeline=run.spec.name,
            target=target,
            compressed=replace(made.compressed, latency_ms=latency),
            kept_units=fitted.candidate.kept_units,
            validation_losses=(0.05, loss),
            retained=self._judge_quality(run),
        )
        write_record(run.folder.outcomes, {"baseline": {}, "compressed": {}})
        write_record(run.folder.summary, summary)
        return summary

    def _judge_quality(self, run: RunContext) -> RetainedCheck | None:
        """Return what is kept, if the spec asks for a share; on the test split it is less."""
        limit = run.spec.limits.retained
        if limit is None:
            return None
        value = self.retained.get(run.spec.target, 1.0)
        return RetainedCheck(
            limit=limit,
            choosing=Quality(value=value, low=value - 0.01, high=value + 0.01, n=16),
            test=Quality(value=value - 0.02, low=value - 0.03, high=value - 0.01, n=24),
        )

    def report(self, summary: Summary, folder: Path) -> Path:
        """Write a page of one line."""
        self._begin("report")
        page = folder / "report.html"
        page.write_text(f"{summary.compressed.latency_ms.p50}")
        return page

    def report_front(self, summaries: Mapping[str, Summary], folder: RunFolder) -> Path:
        """Write the real page of several targets."""
        return write_front(summaries, folder)

    def _begin(self, stage: str) -> None:
        if stage == self.interrupt:
            raise KeyboardInterrupt(stage)
        self.calls.append(stage)
