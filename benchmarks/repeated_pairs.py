"""Train structures with fresh pairs in every step, and with pairs that come several times.

    python benchmarks/repeated_pairs.py runs/targets/3x-s0 runs/targets/3x-s1 --out runs/pairs

Each folder is a finished run of `pipelines/clip_captioner.yaml`. Its structure is trained three
times from the start, each time with an empty store of teacher outputs:

    fresh    every step takes new pairs
    repeated as many steps, and a pair comes up to three times
    longer   as `repeated`, with as many steps as take the minutes of `fresh`

The models are judged on validation pairs, before rounding. A training that is on record is not
made again. The differences to `fresh` are printed and written as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmcompress.distill.teacher_cache import Teacher
from mmcompress.distill.teacher_store import TeacherStore
from mmcompress.distill.trainer import distill_models_
from mmcompress.distill.training import TrainingInputs, TrainingOptions
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.stages import prepare_run
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.storage import read_record
from mmcompress.workspace.context import RunContext, open_run

SPEC = "pipelines/clip_captioner.yaml"
"""The pipeline."""
ARMS = ("fresh", "repeated", "longer")
"""The trainings of a structure, in order."""
FIGURES = ("image_to_text_r1", "text_to_image_r1", "caption_exact_match")
"""Figures of quality that are compared."""
REPEATED_PASSES = 3
"""Times that a pair comes in the other trainings."""
STORE_BYTES = 4 * 10**9
"""Bytes of a store: all draws of a training fit into it."""


@dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """What came of one training."""

    run: str
    """Folder of the run."""
    arm: str
    """One of `ARMS`."""
    steps: int
    """Steps of the training."""
    seconds: float
    """Seconds of the training."""
    loss: float
    """The pipeline's own loss on validation pairs."""
    quality: dict[str, float]
    """Figures of quality on these pairs."""


def train_arm(run: RunContext, arm: str, *, steps: int, pairs: int) -> TrainedArm:
    """Train the structure of a run, and judge it on validation pairs."""
    prepared = prepare_run(run)
    fitted = read_record(FittedStructure, run.folder.fitted)
    models = build_pruned_models(
        run, prepared.sensitivity, candidate=fitted.candidate, refit=run.spec.prune.refit
    )
    settings = replace(
        run.spec.distill,
        steps=steps,
        minutes=10_000,
        validations=0,
        max_passes=1 if arm == "fresh" else REPEATED_PASSES,
    )
    with tempfile.TemporaryDirectory() as folder:
        store = TeacherStore(folder=Path(folder), max_bytes=STORE_BYTES)
        teacher = Teacher(run.pipeline, run.models, store=store)
        inputs = TrainingInputs(pipeline=run.pipeline, teacher=teacher, data=run.data)
        start = time.monotonic()
        distill_models_(
            models, inputs, options=TrainingOptions(settings=settings, seed=run.spec.seed)
        )
        seconds = time.monotonic() - start
    batch = run.pipeline.collate(run.data.load("val", pairs))
    outputs = run.pipeline.forward_in_pieces(models, batch)
    figures = run.pipeline.compute_quality(outputs, batch)
    return TrainedArm(
        run=str(run.folder),
        arm=arm,
        steps=steps,
        seconds=seconds,
        loss=run.pipeline.compute_loss_of_outputs(outputs, batch),
        quality={name: figures[name] for name in FIGURES},
    )


def format_report(arms: Sequence[TrainedArm]) -> str:
    """Format the Markdown page: every training, and the mean differences to `fresh`."""
    lines = ["# Pairs that come several times within a training", ""]
    lines.append("| run | training | steps | seconds | steps a minute | loss | R@1, R@1, exact |")
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for arm in arms:
        figures = ", ".join(f"{arm.quality[name]:.1%}" for name in FIGURES)
        pace = 60 * arm.steps / arm.seconds
        lines.append(
            f"| {Path(arm.run).name} | {arm.arm} | {arm.steps} | {arm.seconds:.0f} | "
            f"{pace:.0f} | {arm.loss:.4f} | {figures} |"
        )
    lines.append("")
    by_place = {(arm.run, arm.arm): arm for arm in arms}
    for name in ARMS[1:]:
        differences: list[float] = []
        for arm in arms:
            fresh = by_place.get((arm.run, ARMS[0]))
            if arm.arm == name and fresh is not None:
                differences += [arm.quality[figure] - fresh.quality[figure] for figure in FIGURES]
        if differences:
            listed = ", ".join(f"{100 * difference:+.1f}" for difference in differences)
            mean = 100 * statistics.fmean(differences)
            lines.append(f"`{name}` minus `fresh`, in points: {mean:+.2f} on average ({listed}).")
    return "\n".join([*lines, ""])


def main() -> None:
    """Make every training that is not on record, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/repeated-pairs"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=1000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arms: list[TrainedArm] = []
    for folder in arguments.runs:
        summary_seed = json.loads((Path(folder) / "summary.json").read_text())["seed"]
        seconds: dict[str, float] = {}
        for arm in ARMS:
            record = arguments.out / f"{Path(folder).name}-{arm}.json"
            if not record.exists():
                steps = arguments.steps
                if arm == "longer":
                    steps = round(steps * seconds["fresh"] / seconds["repeated"])
                target = Path(folder).name.partition("-")[0]
                overrides = {"target": target, "seed": summary_seed}
                run = open_run(SPEC, folder, overrides=overrides, resume=True)
                trained = train_arm(run, arm, steps=steps, pairs=arguments.pairs)
                record.write_text(json.dumps(asdict(trained)), encoding="utf-8")
            arms.append(read_record(TrainedArm, record))
            seconds[arm] = arms[-1].seconds
            page = format_report(arms)
            (arguments.out / "repeated_pairs.md").write_text(page, encoding="utf-8")
    print(format_report(arms))


if __name__ == "__main__":
    main()
