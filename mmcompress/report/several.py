"""Reports over several runs: targets, methods or cells side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcompress.records import Summary, write


def row(s: Summary) -> dict[str, Any]:
    """The figures of one run."""
    from mmcompress.measure.bounds import of_target

    return {
        "speedup": s.speedup,
        "share_of_target": of_target(s),
        "latency_ms_p50": s.compressed.latency_ms.p50,
        "met": s.target.met,
        "retained": s.quality_retained,
        "quality": {k: {"value": q.value, "low": q.low, "high": q.high} for k, q in s.compressed.quality.items()},
        "params": s.compressed.params,
        "size_mb": s.compressed.size_mb,
    }


def _pages(name: str, folder: Path, **values: Any) -> Path:
    from mmcompress.report import environment

    for suffix in (".md", ".html"):
        (folder / (name + suffix)).write_text(environment().get_template(name + suffix).render(**values))
    return folder / f"{name}.html"


Judged = tuple[str, str, float, float]
"""A claim, its verdict, the gap and half its 95 % interval."""


def write_claims(claims: Sequence[Judged], folder: Path) -> Path:
    """Write `claims.json`."""
    keys = ("claim", "verdict", "gap", "half")
    return write(folder / "claims.json", [dict(zip(keys, c, strict=True)) for c in claims])


def write_comparison(
    summaries: Mapping[str, Summary], about: Mapping[str, str], claims: Sequence[Judged], folder: Path
) -> Path:
    """Write `compare.json`, `.md` and `.html`, and the claims; `summaries` and what they are, by method."""
    from mmcompress.report.charts import comparison

    write_claims(claims, folder)
    write(folder / "compare.json", {name: row(s) for name, s in summaries.items()})
    one, chart = next(iter(summaries.values())), comparison(summaries)
    return _pages("compare", folder, s=one, summaries=summaries, about=about, claims=claims, chart=chart)


def write_ablation(tables: Mapping[str, Mapping[str, Summary]], claims: Sequence[Judged], folder: Path) -> Path:
    """Write `ablation.json`, `.md` and `.html`, and the claims: cells by table, and what they say of each."""
    from mmcompress.report.charts import comparison

    write_claims(claims, folder)
    write(folder / "ablation.json", {t: {name: row(s) for name, s in by.items()} for t, by in tables.items()})
    one, charts = next(iter(next(iter(tables.values())).values())), {t: comparison(by) for t, by in tables.items()}
    return _pages("ablation", folder, s=one, tables=tables, claims=claims, charts=charts)


def write_front(summaries: Mapping[str, Summary], folder: Path) -> Path:
    """Write `front.json`, `.md` and `.html`; `summaries` by the name of their folder. Returns the page."""
    from mmcompress.report.charts import front

    summaries = dict(sorted(summaries.items(), key=lambda named: named[1].target.speedup))
    write(folder / "front.json", {name: row(s) for name, s in summaries.items()})
    return _pages("front", folder, s=next(iter(summaries.values())), summaries=summaries, chart=front(summaries))
