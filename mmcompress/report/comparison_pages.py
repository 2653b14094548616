"""Reports over several runs: targets, methods or cells side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcompress.report.charts.comparison import draw_comparison
from mmcompress.report.charts.front import draw_front
from mmcompress.report.page import template_environment
from mmcompress.results.claims import ClaimResult
from mmcompress.results.records import Summary
from mmcompress.results.target import target_share
from mmcompress.storage import write_record


def summary_row(s: Summary) -> dict[str, Any]:
    """The figures of one run."""

    return {
        "speedup": s.speedup,
        "share_of_target": target_share(s),
        "latency_ms_p50": s.compressed.latency_ms.p50,
        "met": s.target.met,
        "retained": s.quality_retained,
        "quality": {
            k: {"value": q.value, "low": q.low, "high": q.high}
            for k, q in s.compressed.quality.items()
        },
        "params": s.compressed.params,
        "size_mb": s.compressed.size_mb,
    }


def _pages(name: str, folder: Path, **values: Any) -> Path:

    for suffix in (".md", ".html"):
        (folder / (name + suffix)).write_text(
            template_environment().get_template(name + suffix).render(**values)
        )
    return folder / f"{name}.html"


def write_claims(claims: Sequence[ClaimResult], folder: Path) -> Path:
    """Write `claims.json`."""
    rows = [
        {
            "claim": claim.text,
            "verdict": claim.verdict,
            "gap": claim.difference,
            "half": claim.ci_half_width,
        }
        for claim in claims
    ]
    return write_record(folder / "claims.json", rows)


def write_comparison(
    summaries: Mapping[str, Summary],
    about: Mapping[str, str],
    *,
    claims: Sequence[ClaimResult],
    folder: Path,
) -> Path:
    """Write `compare.json`, `.md` and `.html`, and the claims; `summaries` and what they are, by
    method."""

    write_claims(claims, folder)
    write_record(folder / "compare.json", {name: summary_row(s) for name, s in summaries.items()})
    one, chart = next(iter(summaries.values())), draw_comparison(summaries)
    return _pages(
        "compare", folder, s=one, summaries=summaries, about=about, claims=claims, chart=chart
    )


def write_ablation(
    tables: Mapping[str, Mapping[str, Summary]], claims: Sequence[ClaimResult], *, folder: Path
) -> Path:
    """Write `ablation.json`, `.md` and `.html`, and the claims: cells by table, and what they say
    of each."""

    write_claims(claims, folder)
    write_record(
        folder / "ablation.json",
        {t: {name: summary_row(s) for name, s in by.items()} for t, by in tables.items()},
    )
    one, charts = (
        next(iter(next(iter(tables.values())).values())),
        {t: draw_comparison(by) for t, by in tables.items()},
    )
    return _pages("ablation", folder, s=one, tables=tables, claims=claims, charts=charts)


def write_front(summaries: Mapping[str, Summary], folder: Path) -> Path:
    """Write `front.json`, `.md` and `.html`; `summaries` by the name of their folder. Returns the
    page."""

    summaries = dict(sorted(summaries.items(), key=lambda named: named[1].target.speedup))
    write_record(folder / "front.json", {name: summary_row(s) for name, s in summaries.items()})
    return _pages(
        "front",
        folder,
        s=next(iter(summaries.values())),
        summaries=summaries,
        chart=draw_front(summaries),
    )
