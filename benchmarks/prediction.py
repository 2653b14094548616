"""Compare predicted with measured latency on random structures of one pipeline.

    python benchmarks/prediction.py pipelines/clip_captioner.yaml \\
        --run runs/demo-2x-s0 --out reports/prediction

Every structure is exported whole. It and the dense pipeline answer the same requests in turn, and
both write what the dense one writes. The measured latency is the ratio of their medians, times the
dense p50 that the predictor was calibrated on.

Writes OUT-NAME.json and OUT-NAME.svg, and prints the mean absolute error and Spearman's rank
correlation. The structures so far lie in the run folder as prediction.json, which
`mmcompress report RUN` draws; `--resume` goes on from there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from mmcompress.cli.options import parse_settings
from mmcompress.graph.blocks import Block, cut_by_share
from mmcompress.graph.structure import Candidate, KeptUnits
from mmcompress.measure.latency.bench import BenchmarkOptions
from mmcompress.measure.latency.benchmark_in_subprocess import bench_repeated
from mmcompress.models.sources import set_context_lengths
from mmcompress.prune.surgery import copy_resized
from mmcompress.report.charts.prediction import draw_prediction
from mmcompress.results.records import Prediction
from mmcompress.run.predictor import build_predictor
from mmcompress.run.profile import BENCH_REQUESTS, profile_pipeline
from mmcompress.runtime.machine import describe_cpu, list_package_versions, read_git_commit
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.context import RunContext, open_run

MAX_MEAN_SHARE = 0.8
"""Largest mean share of a structure that is cut, over its blocks."""
SHARE_SPREAD = 0.2
"""Standard deviation of the share from block to block."""
PRECISIONS = ("fp32", "int8")
"""Precisions that a node may have."""
WARMUP_REQUESTS = 3
"""Requests that are sent before the measurement."""
MAX_REQUESTS = 10_000
"""Requests at most; the seconds end a measurement before."""


def find_highest_value(run: RunContext, path: str) -> float:
    """Find the highest value of a dimension of the search space; 0 if the space has no such one."""
    dimension = run.space.dimensions.get(path)
    if dimension is None:
        return 0.0
    return dimension.high or 0.0


def draw_kept_units(
    run: RunContext, node_name: str, *, mean_share: float, rng: np.random.Generator
) -> KeptUnits:
    """Draw the units that are kept in the blocks of a node.

    Args:
        run: its space limits what may be cut.
        node_name: the node.
        mean_share: share that is cut, on average over blocks.
        rng: draws in the order of the blocks.
    """
    blocks: tuple[Block, ...] = run.blocks[node_name]
    kept_units: KeptUnits = {}
    for block in blocks:
        highest = find_highest_value(run, f"nodes.{node_name}.prune.{block.group}")
        share = float(np.clip(rng.normal(mean_share, SHARE_SPREAD), 0, highest))
        kept_units[block.name] = cut_by_share(block, share)
    # Every other node also loses some sub-layers, as many as the space allows or fewer.
    max_dropped = int(find_highest_value(run, f"nodes.{node_name}.prune.drop"))
    droppable = [block.name for block in blocks if block.drop]
    drop_count = int(rng.integers(0, max_dropped + 1))
    shuffled = rng.permutation(droppable)
    drop_count *= int(rng.integers(0, 2))
    for block_name in shuffled[:drop_count].tolist():
        kept_units[block_name] = 0
    return kept_units


def draw_candidate(run: RunContext, rng: np.random.Generator) -> Candidate:
    """Draw a random structure of the search space.

    How much is cut differs from structure to structure, and from block to block.
    """
    mean_share = rng.uniform(0, MAX_MEAN_SHARE)
    kept_units: dict[str, KeptUnits] = {}
    for node_name in run.blocks:
        kept_units[node_name] = draw_kept_units(run, node_name, mean_share=mean_share, rng=rng)
    precision = {node_name: str(rng.choice(PRECISIONS)) for node_name in run.blocks}
    return Candidate(kept_units=kept_units, precision=precision)


def summarize_errors(
    pipeline: str, predicted_ms: list[float], *, measured_ms: list[float]
) -> Prediction:
    """Make the record of predicted and measured milliseconds."""
    errors = np.abs(np.array(predicted_ms) / np.array(measured_ms) - 1)
    # A rank correlation needs three structures.
    rank_correlation = 0.0
    if len(predicted_ms) > 2:
        rank_correlation = float(spearmanr(predicted_ms, measured_ms).statistic)
    return Prediction(
        pipeline=pipeline,
        mean_absolute_error=float(np.mean(errors)),
        spearman=rank_correlation,
        predicted_ms=tuple(predicted_ms),
        measured_ms=tuple(measured_ms),
        cpu=describe_cpu(),
        commit=read_git_commit(),
        versions=list_package_versions(),
    )


def export_candidate(run: RunContext, candidate: Candidate, *, folder: Path) -> None:
    """Write the bundle of a structure with the dense weights that it keeps."""
    models = {}
    for node_name, model in run.models.items():
        models[node_name] = copy_resized(model, candidate.kept_units[node_name])
    set_context_lengths(run.spec, models)
    run.write_bundle(
        models, candidate.precision, kept=candidate.kept_units, folder=folder, prove=False
    )


def parse_arguments() -> argparse.Namespace:
    """Read the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec")
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        help="a run folder of the spec, whose profile and predictor are used",
    )
    parser.add_argument("--out", default="reports/prediction", help="start of the files' names")
    parser.add_argument("--count", type=int, default=30, help="number of structures")
    parser.add_argument(
        "--seconds", type=float, default=15, help="how long each structure is measured"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the structures")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the structures that the run folder has",
    )
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
    dense = profile_pipeline(run)
    predictor = build_predictor(run, dense)
    requests = run.load_requests(BENCH_REQUESTS)[: len(dense.traces)]
    scratch = run.folder.scratch
    bundles = {"candidate": scratch, "dense": run.folder.baseline}
    options = BenchmarkOptions(
        warmup=WARMUP_REQUESTS,
        max_requests=MAX_REQUESTS,
        seconds=arguments.seconds,
        traces=dense.traces,
        threads=run.spec.measure.threads,
    )
    record_path = run.folder.prediction
    predicted_ms: list[float] = []
    measured_ms: list[float] = []
    if arguments.resume and record_path.exists():
        earlier = read_record(Prediction, record_path)
        predicted_ms = list(earlier.predicted_ms)
        measured_ms = list(earlier.measured_ms)
    rng = np.random.default_rng(arguments.seed)
    for i in range(arguments.count):
        # Known structures are drawn as well, so that the ones after them stay the same.
        candidate = draw_candidate(run, rng)
        if i < len(predicted_ms):
            continue
        export_candidate(run, candidate, folder=scratch)
        samples = bench_repeated(bundles, requests, options=options)
        latency_ratio = float(np.median(samples["candidate"].ms) / np.median(samples["dense"].ms))
        predicted_ms.append(predictor(candidate))
        measured_ms.append(latency_ratio * dense.latency_ms.p50)
        print(
            f"{i + 1:3d}  predicted {predicted_ms[-1]:8.2f} ms, measured {measured_ms[-1]:8.2f} ms",
            flush=True,
        )
        prediction = summarize_errors(run.spec.name, predicted_ms, measured_ms=measured_ms)
        write_record(record_path, prediction)
    shutil.rmtree(scratch, ignore_errors=True)
    prediction = summarize_errors(run.spec.name, predicted_ms, measured_ms=measured_ms)
    write_record(Path(f"{arguments.out}-{run.spec.name}.json"), prediction)
    chart = draw_prediction(predicted_ms, measured_ms)
    Path(f"{arguments.out}-{run.spec.name}.svg").write_text(chart)
    print(
        f"{prediction.pipeline}: mean absolute error {prediction.mean_absolute_error:.1%}, "
        f"Spearman {prediction.spearman:.3f} over {len(predicted_ms)} structures"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
