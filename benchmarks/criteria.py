"""Which criterion leaves a pipeline most: uniform cuts at several depths, refitted and untrained, on choosing pairs.

Damage and search choose how much of each block goes; a criterion chooses which units. Depths are shares of all units,
in fp32. Nothing here reads the test split, so a default may be chosen by it.

    python benchmarks/criteria.py pipelines/clip_captioner.yaml --run RUN
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mmcompress.cli.options import parse_settings
from mmcompress.experiments.ablate import CRITERIA
from mmcompress.experiments.compare import replace_scores
from mmcompress.graph.structure import Candidate, cut_uniformly
from mmcompress.run.stages import prepare_run
from mmcompress.runtime.machine import describe_cpu
from mmcompress.search.candidate_models import build_pruned_models
from mmcompress.workspace import context as workflow
from mmcompress.workspace.context import RunContext

ROOT = Path(__file__).resolve().parents[1]


def uniform(run: RunContext, share: float) -> Candidate:
    """A share of the units of every block gone."""
    return Candidate(cut_uniformly(run.blocks, share), dict.fromkeys(run.blocks, "fp32"))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("spec")
    p.add_argument(
        "--run", type=Path, required=True, help="a run folder: gone on with where there is one"
    )
    p.add_argument("--depths", default="0.2,0.4,0.6")
    p.add_argument("--pairs", type=int, default=512)
    p.add_argument("--set", action="append", default=[], help="as the run was started with")
    a = p.parse_args()
    run = workflow.open_run(a.spec, a.run, overrides=parse_settings(tuple(a.set)), resume=True)
    ev = prepare_run(run).sensitivity
    pairs = run.pipeline.collate(run.data.load("val", a.pairs))
    anchors = run.pipeline.reference_outputs(run.models, pairs)
    dense = run.pipeline.loss_of_models(run.models, pairs, dense=anchors)
    depths = [float(d) for d in a.depths.split(",")]
    lines = [
        f"# Which units go: {run.spec.name}",
        "",
        f"Loss of the pipeline on {len(pairs)} choosing pairs above the dense one's {dense:.3f}, a share of each block "
        f"cut and refitted, nothing trained, fp32; {describe_cpu()['name']}.",
        "",
        "| criterion | seconds | " + " | ".join(f"{d:.0%} cut" for d in depths) + " |",
        "|---|---:" + "|---:" * len(depths) + "|",
    ]
    print("\n".join(lines), flush=True)
    for name in CRITERIA:
        began = time.perf_counter()
        scored = replace_scores(run, ev, importance=name)
        took, row = time.perf_counter() - began, []
        for depth in depths:
            models = build_pruned_models(run, scored, candidate=uniform(run, depth), refit=True)
            row.append(run.pipeline.loss_of_models(models, pairs, dense=anchors) - dense)
        lines.append(f"| {name} | {took:.1f} | " + " | ".join(f"{x:.3f}" for x in row) + " |")
        print(lines[-1], flush=True)
    text = "\n".join([*lines, "", "Made by `python benchmarks/criteria.py`."]) + "\n"
    (ROOT / "reports" / f"criteria-{run.spec.name}.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
