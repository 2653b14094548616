"""Predicted against measured latency of random structures of one pipeline, each exported whole.

    python benchmarks/prediction.py pipelines/clip_captioner.yaml --run runs/demo-2x-s0 --out reports/prediction

Every structure and the dense pipeline answer the same requests in turn, both writing what the dense one does; the
ratio of their medians, times the dense p50 the predictor was calibrated on, is what was measured. Writes OUT-NAME.json
and OUT-NAME.svg, prints the mean absolute error and Spearman's rank correlation. The structures so far lie in the run
folder as prediction.json, which `mmcompress report RUN` draws; `--resume` goes on from there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from mmcompress.cli.options import parse_settings
from mmcompress.graph.blocks import cut_by_share
from mmcompress.graph.structure import Candidate
from mmcompress.measure.latency.bench import BenchmarkOptions
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.surgery import copy_resized
from mmcompress.report.charts import draw_prediction
from mmcompress.report.page import PREDICTION_FILE
from mmcompress.results.records import Prediction
from mmcompress.run.predictor import build_predictor
from mmcompress.run.profile import BENCH_REQUESTS, profile_pipeline
from mmcompress.runtime.machine import describe_cpu, list_package_versions, read_git_commit
from mmcompress.storage import read_record, write_record
from mmcompress.workspace import context as workflow


def drawn(run, rng: np.random.Generator) -> Candidate:
    """A random structure of the search space: how much is cut differs from one to the next, and from block to block;
    of every other node some sub-layers are gone, as many as the space allows or fewer."""
    kept, much = {}, rng.uniform(0, 0.8)
    for n, blocks in run.blocks.items():
        kept[n] = {}
        for b in blocks:
            high = getattr(run.space.dimensions.get(f"nodes.{n}.prune.{b.group}"), "high", 0) or 0
            share = float(np.clip(rng.normal(much, 0.2), 0, high))
            kept[n][b.name] = cut_by_share(b, share)
        drop = getattr(run.space.dimensions.get(f"nodes.{n}.prune.drop"), "high", 0) or 0
        some, most = [b.name for b in blocks if b.drop], int(rng.integers(0, int(drop) + 1))
        kept[n] |= dict.fromkeys(
            rng.permutation(some)[: most * int(rng.integers(0, 2))].tolist(), 0
        )
    return Candidate(kept, {n: str(rng.choice(["fp32", "int8"])) for n in run.blocks})


def result(pipeline: str, x: list[float], y: list[float]) -> Prediction:
    """Predicted milliseconds x against measured y."""
    error = float(np.mean(np.abs(np.array(x) / np.array(y) - 1)))
    rank = float(spearmanr(x, y).statistic) if len(x) > 2 else 0.0
    return Prediction(
        pipeline=pipeline,
        mean_absolute_error=error,
        spearman=rank,
        predicted_ms=tuple(x),
        measured_ms=tuple(y),
        cpu=describe_cpu(),
        commit=read_git_commit(),
        versions=list_package_versions(),
    )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("spec")
    p.add_argument(
        "--run",
        type=Path,
        required=True,
        help="a run folder of it: its profile and predictor are used",
    )
    p.add_argument("--out", default="reports/prediction")
    p.add_argument("--count", type=int, default=30)
    p.add_argument("--seconds", type=float, default=15, help="how long each structure is measured")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--resume", action="store_true", help="go on with the structures that the run folder has"
    )
    p.add_argument("--set", action="append", default=[], help="as the run was started with")
    a = p.parse_args()
    run = workflow.open_run(a.spec, a.run, overrides=parse_settings(tuple(a.set)), resume=True)
    dense = profile_pipeline(run)
    predict = build_predictor(run, dense)
    requests = run.load_requests(BENCH_REQUESTS)[: len(dense.traces)]
    bundles, threads = (
        {"new": a.run / "scratch", "dense": a.run / "baseline"},
        run.spec.measure.threads,
    )
    known = (
        read_record(Prediction, a.run / PREDICTION_FILE)
        if a.resume and (a.run / PREDICTION_FILE).exists()
        else None
    )
    x, y = (list(known.predicted_ms), list(known.measured_ms)) if known else ([], [])
    rng = np.random.default_rng(a.seed)
    for i in range(a.count):
        c = drawn(run, rng)
        if i < len(x):
            continue
        models = {n: copy_resized(m, c.kept_units[n]) for n, m in run.models.items()}
        set_context_lengths(run.spec, models)
        run.write_bundle(
            models, c.precision, kept=c.kept_units, folder=a.run / "scratch", prove=False
        )
        options = BenchmarkOptions(
            warmup=3,
            max_requests=10_000,
            seconds=a.seconds,
            traces=dense.traces,
            threads=threads,
        )
        found = bench_repeated(bundles, requests, options=options)
        share = float(np.median(found["new"].ms) / np.median(found["dense"].ms))
        x.append(predict(c))
        y.append(share * dense.latency_ms.p50)
        print(f"{i + 1:3d}  predicted {x[-1]:8.2f} ms, measured {y[-1]:8.2f} ms", flush=True)
        told = result(run.spec.name, x, y)
        write_record(a.run / PREDICTION_FILE, told)
    shutil.rmtree(a.run / "scratch", ignore_errors=True)
    told = result(run.spec.name, x, y)
    write_record(Path(f"{a.out}-{run.spec.name}.json"), told)
    Path(f"{a.out}-{run.spec.name}.svg").write_text(draw_prediction(x, y))
    figures = f"mean absolute error {told.mean_absolute_error:.1%}, Spearman {told.spearman:.3f}"
    print(f"{told.pipeline}: {figures} over {len(x)} structures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
