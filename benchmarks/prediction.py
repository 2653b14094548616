"""Predicted against measured latency of random structures of one pipeline, each exported whole.

    python benchmarks/prediction.py pipelines/clip_captioner.yaml --run runs/demo-2x-s0 --out reports/prediction

Every structure and the dense pipeline answer the same requests in turn, both writing what the dense one does; the
ratio of their medians, times the dense p50 the predictor was calibrated on, is what was measured. Writes OUT-NAME.json
and OUT-NAME.svg, prints the mean absolute error and Spearman's rank correlation; what lies in the run folder as
prediction.json is drawn by `mmcompress report RUN`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from mmcompress import workflow
from mmcompress.cli.shared import settings
from mmcompress.measure.apart import reloaded
from mmcompress.measure.machine import commit, cpu, versions
from mmcompress.models.sources import connect
from mmcompress.prune.allocation import after, steps
from mmcompress.prune.surgery import resized
from mmcompress.records import Candidate, Prediction, write
from mmcompress.report import PREDICTION
from mmcompress.report.charts import predicted_measured
from mmcompress.workflow.dense import REQUESTS


def drawn(run, rng: np.random.Generator) -> Candidate:
    """A random structure of the search space: how much is cut differs from one to the next, and from block to block;
    of every other node some sub-layers are gone, as many as the space allows or fewer."""
    kept, much = {}, rng.uniform(0, 0.8)
    for n, blocks in run.blocks.items():
        kept[n] = {}
        for b in blocks:
            high = getattr(run.space.dimensions.get(f"nodes.{n}.prune.{b.group}"), "high", 0) or 0
            share = float(np.clip(rng.normal(much, 0.2), 0, high))
            kept[n][b.name] = int(after(b, round(share * steps(b))))
        drop = getattr(run.space.dimensions.get(f"nodes.{n}.prune.drop"), "high", 0) or 0
        some, most = [b.name for b in blocks if b.drop], int(rng.integers(0, int(drop) + 1))
        kept[n] |= dict.fromkeys(rng.permutation(some)[: most * int(rng.integers(0, 2))].tolist(), 0)
    return Candidate(kept, {n: str(rng.choice(["fp32", "int8"])) for n in run.blocks})


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("spec")
    p.add_argument("--run", type=Path, required=True, help="a run folder of it: its profile and predictor are used")
    p.add_argument("--out", default="reports/prediction")
    p.add_argument("--count", type=int, default=30)
    p.add_argument("--seconds", type=float, default=15, help="how long each structure is measured")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", action="append", default=[], help="as the run was started with")
    a = p.parse_args()
    run = workflow.open_run(a.spec, a.run, overrides=settings(tuple(a.set)), resume=True)
    dense = workflow.profile(run)
    predict = workflow.predictor(run, dense)
    requests = run.requests(REQUESTS)[: len(dense.said)]
    bundles, threads = {"new": a.run / "scratch", "dense": a.run / "baseline"}, run.spec.measure.threads
    rng, rows = np.random.default_rng(a.seed), []
    for i in range(a.count):
        c = drawn(run, rng)
        models = {n: resized(m, c.kept[n]) for n, m in run.models.items()}
        connect(run.spec, models)
        run.bundle(models, c.precision, c.kept, a.run / "scratch", prove=False)
        found = reloaded(bundles, threads, requests, 3, 10_000, dense.said, a.seconds)
        share = np.median(found["new"].ms) / np.median(found["dense"].ms)
        rows.append({"predicted_ms": predict(c), "measured_ms": float(share) * dense.latency_ms.p50})
        print(
            f"{i + 1:3d}  predicted {rows[-1]['predicted_ms']:8.2f} ms, measured {rows[-1]['measured_ms']:8.2f} ms",
            flush=True,
        )
    shutil.rmtree(a.run / "scratch", ignore_errors=True)
    x, y = ([float(r[k]) for r in rows] for k in ("predicted_ms", "measured_ms"))
    error = float(np.mean(np.abs(np.array(x) / np.array(y) - 1)))
    rank = float(spearmanr(x, y).statistic)
    found = Prediction(run.spec.name, error, rank, tuple(x), tuple(y), cpu(), commit(), versions())
    write(Path(f"{a.out}-{run.spec.name}.json"), found)
    write(a.run / PREDICTION, found)
    Path(f"{a.out}-{run.spec.name}.svg").write_text(predicted_measured(x, y))
    print(f"{run.spec.name}: mean absolute error {error:.1%}, Spearman {rank:.3f} over {len(rows)} structures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
