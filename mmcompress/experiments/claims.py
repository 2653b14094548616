"""Claims that some cells keep more quality than others, judged at equal latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mmcompress.measure.latency.bench import MAX_REQUESTS_FACTOR, summarize_pipelines
from mmcompress.results.claims import ClaimResult
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.profile import Profile, bench_beside_dense
from mmcompress.stats import PerSampleScores, SplitScores, decide_claim
from mmcompress.storage import read_plain, read_record, write_record
from mmcompress.workspace.context import RunContext

MAX_LATENCY_RATIO = 1.05
"""Slowest over fastest: latencies within this ratio count as equal. The search fits within 5 %."""


NO_COMMON_METRIC = "undetermined: no metric has a figure on both sides"
"""Verdict where metrics failed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence that one side keeps more quality than another."""

    text: str
    """The sentence."""
    better: tuple[str, ...]
    """Folders of the cells that keep more; the scores of several are averaged."""
    worse: tuple[str, ...]
    """Folders of the cells that keep less; the scores of several are averaged."""
    at_any_latency: bool = False
    """Whether the claim holds at whatever latency the two sides have."""


def judge_claim(run: RunContext, claim: Claim, *, dense: Profile) -> ClaimResult:
    """Judge a claim by the answers of both sides to the same test inputs.

    At unequal latency there is no verdict, unless the side that keeps more is no slower either.

    Args:
        run: The run whose folder holds the cells.
        claim: The claim.
        dense: Profile of the dense pipeline, which latencies are divided by.

    Returns:
        The verdict, with the paired difference and half its 95 % interval.
    """
    better_scores = _read_scores(run, claim.better)
    worse_scores = _read_scores(run, claim.worse)
    names = list_common_metrics([*better_scores, *worse_scores])
    if not names:
        return ClaimResult(
            text=claim.text, verdict=NO_COMMON_METRIC, difference=0.0, ci_half_width=0.0
        )
    verdict, difference, ci_half_width = decide_claim(
        _select_metrics(better_scores, names), _select_metrics(worse_scores, names)
    )
    result = ClaimResult(
        text=claim.text, verdict=verdict, difference=difference, ci_half_width=ci_half_width
    )
    if claim.at_any_latency:
        return result

    latencies = measure_side_by_side(run, (*claim.better, *claim.worse), dense=dense)
    lowest = min(latencies.values())
    highest = max(latencies.values())
    if highest <= MAX_LATENCY_RATIO * lowest or _wins_twice(claim, result, latencies=latencies):
        return result
    unequal = f"not at equal latency ({lowest:.1%} and {highest:.1%} of the dense pipeline's)"
    return replace(result, verdict=unequal)


def measure_side_by_side(
    run: RunContext, names: Sequence[str], *, dense: Profile
) -> dict[str, float]:
    """Measure the artifacts of some cells in turn, once; the latencies are kept in the run folder.

    Their summaries were measured minutes apart. Meanwhile a shared machine changes its speed by as
    much as the differences that a claim is about. On another device, predictions are returned
    instead. Cells with the same structure are not measured.

    Args:
        run: The run whose folder holds the cells.
        names: Folders of the cells.
        dense: Profile of the dense pipeline.

    Returns:
        Latency of each cell / latency of the dense pipeline.
    """
    fits = {
        name: read_record(FittedStructure, run.folder.get_subfolder(name).fitted) for name in names
    }
    structures = {fit.candidate.make_key() for fit in fits.values()}
    if run.device_readings or len(structures) == 1:
        return {name: fit.measured_ms / dense.latency_ms.p50 for name, fit in fits.items()}

    record = run.folder.side_by_side
    measured: dict[str, dict[str, float]] = {}
    if record.exists():
        measured = read_plain(dict, record, cure="remove it: it is measured again")
    key = " ".join(names)
    if key not in measured:
        measured[key] = _benchmark_cells(run, names, dense=dense)
        write_record(record, measured)
    return measured[key]


def _read_scores(run: RunContext, names: Sequence[str]) -> list[dict[str, PerSampleScores]]:
    """Return the scores of the compressed pipeline of each cell, by metric."""
    return [
        read_record(SplitScores, run.folder.get_subfolder(name).outcomes).compressed
        for name in names
    ]


def list_common_metrics(scores: Sequence[Mapping[str, PerSampleScores]]) -> list[str]:
    """Return the metrics that all runs have a figure of: one may have failed in some."""
    common_names = set(scores[0]).intersection(*scores)
    return [name for name in scores[0] if name in common_names]


def _select_metrics(
    scores: Sequence[Mapping[str, PerSampleScores]], names: Sequence[str]
) -> list[dict[str, PerSampleScores]]:
    """Return the scores of some metrics alone, run by run."""
    selected_scores: list[dict[str, PerSampleScores]] = []
    for run_scores in scores:
        selected_scores.append({name: run_scores[name] for name in names})
    return selected_scores


def _wins_twice(claim: Claim, result: ClaimResult, *, latencies: dict[str, float]) -> bool:
    """Return whether the side that clearly keeps more is also no slower."""
    if abs(result.difference) <= result.ci_half_width:
        return False
    winners = claim.better
    losers = claim.worse
    if result.difference <= 0:
        winners = claim.worse
        losers = claim.better
    slowest_winner = max(latencies[name] for name in winners)
    fastest_loser = min(latencies[name] for name in losers)
    return slowest_winner <= fastest_loser


def _benchmark_cells(run: RunContext, names: Sequence[str], *, dense: Profile) -> dict[str, float]:
    """Measure the bundles of cells and the dense one in turn; return latencies / the dense one."""
    run.on_progress("measure", f"{', '.join(names)} and the dense pipeline, in turn", None)
    bundles = {"fp32": run.shared.baseline}
    for name in names:
        bundles[name] = run.folder.get_subfolder(name).bundle
    max_requests = MAX_REQUESTS_FACTOR * run.spec.measure.requests
    samples = bench_beside_dense(run, bundles, dense=dense, max_requests=max_requests)
    latencies = summarize_pipelines(samples)
    dense_ms = latencies["fp32"].latency.p50
    return {name: latencies[name].latency.p50 / dense_ms for name in names}
