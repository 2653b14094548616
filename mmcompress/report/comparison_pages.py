"""Pages over several runs: targets, methods or cells side by side.

Each page lies beside a JSON file with the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmcompress.report.charts.comparison import draw_comparison
from mmcompress.report.charts.front import draw_front
from mmcompress.report.fill_templates import write_pages
from mmcompress.results.claims import ClaimResult
from mmcompress.results.records import Summary
from mmcompress.results.target_met import compute_target_share
from mmcompress.storage import write_record
from mmcompress.workspace.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class QualityFigure:
    """A metric as the JSON files hold it."""

    value: float
    """The figure itself."""
    low: float
    """Lower end of its 95 % interval."""
    high: float
    """Upper end of its 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """The figures of one run as the JSON files hold them."""

    speedup: float
    """Median latency of the dense pipeline over that of the compressed one."""
    share_of_target: float
    """Measured latency / target."""
    latency_ms_p50: float
    """Median milliseconds of a request, end to end."""
    met: bool
    """Whether the target and every limit are kept."""
    retained: float
    """The smallest ratio of compressed to dense over all metrics."""
    quality: dict[str, QualityFigure]
    """Every metric by name."""
    params: int
    """Parameters of all models."""
    size_mb: float
    """MB of the bundle."""


@dataclass(frozen=True, kw_only=True)
class ClaimFigures:
    """A claim as `claims.json` holds it."""

    claim: str
    """The claim as a sentence."""
    verdict: str
    """Whether it is supported."""
    difference: float
    """Share of the test inputs: difference of both sides, mean over the metrics."""
    ci_half_width: float
    """Share of the test inputs: half the width of its 95 % interval."""


def write_comparison(
    summaries: Mapping[str, Summary],
    about: Mapping[str, str],
    *,
    claims: Sequence[ClaimResult],
    folder: RunFolder,
) -> Path:
    """Write the page and the figures of several methods, and their claims.

    Args:
        summaries: The result of each method, by its name; at least one.
        about: What each method is, by its name.
        claims: What the comparison says.
        folder: The folder of the comparison.

    Returns:
        The page.
    """
    _write_claims(claims, folder)
    write_record(folder.comparison, _list_figures(summaries))
    return write_pages(
        folder.comparison_page,
        first=next(iter(summaries.values())),
        summaries=summaries,
        about=about,
        claims=claims,
        chart=draw_comparison(summaries),
    )


def write_ablation(
    tables: Mapping[str, Mapping[str, Summary]],
    claims: Sequence[ClaimResult],
    *,
    folder: RunFolder,
) -> Path:
    """Write the page and the figures of an ablation, and its claims.

    Args:
        tables: The result of each cell, by table and name of the cell; at least one.
        claims: What the ablation says.
        folder: The folder of the ablation.

    Returns:
        The page.
    """
    _write_claims(claims, folder)
    figures = {table: _list_figures(summaries) for table, summaries in tables.items()}
    write_record(folder.ablation, figures)
    charts = {table: draw_comparison(summaries) for table, summaries in tables.items()}
    first_table = next(iter(tables.values()))
    return write_pages(
        folder.ablation_page,
        first=next(iter(first_table.values())),
        tables=tables,
        claims=claims,
        charts=charts,
    )


def write_front(summaries: Mapping[str, Summary], folder: RunFolder) -> Path:
    """Write the page and the figures of several targets.

    Args:
        summaries: The result of each target, by the name of its folder; at least one.
        folder: The folder that the targets share.

    Returns:
        The page.
    """
    by_speedup = dict(sorted(summaries.items(), key=_get_target_speedup))
    write_record(folder.front, _list_figures(by_speedup))
    return write_pages(
        folder.front_page,
        first=next(iter(by_speedup.values())),
        summaries=by_speedup,
        report_name=folder.report.stem,
        chart=draw_front(by_speedup),
    )


def _get_target_speedup(named_summary: tuple[str, Summary]) -> float:
    """Return the speedup of a target, by which targets are sorted."""
    _, summary = named_summary
    return summary.target.speedup


def _list_figures(summaries: Mapping[str, Summary]) -> dict[str, RunFigures]:
    """Return the figures of every run by its name."""
    return {name: _collect_figures(summary) for name, summary in summaries.items()}


def _collect_figures(summary: Summary) -> RunFigures:
    """Return the figures of one run."""
    compressed = summary.compressed
    quality: dict[str, QualityFigure] = {}
    for metric, figure in compressed.quality.items():
        quality[metric] = QualityFigure(value=figure.value, low=figure.low, high=figure.high)
    return RunFigures(
        speedup=summary.speedup,
        share_of_target=compute_target_share(summary),
        latency_ms_p50=compressed.latency_ms.p50,
        met=summary.target.met,
        retained=summary.quality_retained,
        quality=quality,
        params=compressed.params,
        size_mb=compressed.size_mb,
    )


def _write_claims(claims: Sequence[ClaimResult], folder: RunFolder) -> None:
    """Write the claims with their verdicts."""
    figures: list[ClaimFigures] = []
    for claim in claims:
        figures.append(
            ClaimFigures(
                claim=claim.text,
                verdict=claim.verdict,
                difference=claim.difference,
                ci_half_width=claim.ci_half_width,
            )
        )
    write_record(folder.claims, figures)
