"""Compare importance criteria: the loss of uniform cuts at several depths, refitted and untrained.

    python benchmarks/criteria.py pipelines/clip_captioner.yaml --run RUN

The search decides how much of each block goes, a criterion decides which units go. A depth is a
share of all units; everything is fp32. Losses are those of validation pairs. Nothing here reads the
test split, so a default may be chosen by it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mmcompress.cli.options import parse_settings
from mmcompress.experiments.cells import CRITERIA
from mmcompress.experiments.make_cell import replace_scores
from mmcompress.graph.structure import Candidate, cut_whole_pipeline
from mmcompress.run.stages import prepare_run
from mmcompress.runtime.machine import describe_cpu
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.workspace.context import RunContext, open_run

ROOT = Path(__file__).resolve().parents[1]


def make_uniform_candidate(run: RunContext, share: float) -> Candidate:
    """Cut the same share of the units of every block; all nodes are fp32."""
    kept_units = cut_whole_pipeline(run.blocks, share)
    return Candidate(kept_units=kept_units, precision=dict.fromkeys(run.blocks, "fp32"))


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec")
    parser.add_argument(
        "--run", type=Path, required=True, help="a run folder; a run that is in it goes on"
    )
    parser.add_argument("--depths", default="0.2,0.4,0.6", help="shares of all units that are cut")
    parser.add_argument("--pairs", type=int, default=512, help="validation pairs")
    parser.add_argument(
        "--set", action="append", default=[], help="the settings that the run was started with"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    run = open_run(
        arguments.spec,
        arguments.run,
        overrides=parse_settings(tuple(arguments.set)),
        resume=True,
    )
    sensitivity = prepare_run(run).sensitivity
    pairs = run.pipeline.collate(run.data.load("val", arguments.pairs))
    reference = run.pipeline.compute_reference_outputs(run.models, pairs)
    dense_loss = run.pipeline.compute_loss(run.models, pairs, dense=reference)
    depths = [float(depth) for depth in arguments.depths.split(",")]
    columns = " | ".join(f"{depth:.0%} cut" for depth in depths)
    lines = [
        f"# Which units go: {run.spec.name}",
        "",
        f"Loss of the pipeline on {len(pairs)} validation pairs, minus the {dense_loss:.3f} of the "
        f"dense one. A share of each block is cut and refitted, nothing is trained, everything is "
        f"fp32; {describe_cpu()['name']}.",
        "",
        f"| criterion | seconds | {columns} |",
        "|---|---:" + "|---:" * len(depths) + "|",
    ]
    print("\n".join(lines), flush=True)
    for criterion in CRITERIA:
        start = time.perf_counter()
        scored = replace_scores(run, sensitivity, importance=criterion)
        seconds = time.perf_counter() - start
        cells: list[str] = []
        for depth in depths:
            candidate = make_uniform_candidate(run, depth)
            models = build_pruned_models(run, scored, candidate=candidate, refit=True)
            loss = run.pipeline.compute_loss(models, pairs, dense=reference)
            cells.append(f"{loss - dense_loss:.3f}")
        lines.append(f"| {criterion} | {seconds:.1f} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    text = "\n".join([*lines, "", "Made by `python benchmarks/criteria.py`."]) + "\n"
    (ROOT / "reports" / f"criteria-{run.spec.name}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
