"""Records -> one self-contained HTML file, a Markdown file and `summary.json`. No torch, no
network."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from mmcompress.errors import DataError
from mmcompress.report.charts.node_bars import draw_node_bars
from mmcompress.report.charts.prediction import draw_prediction
from mmcompress.report.charts.quality_bars import draw_quality_bars
from mmcompress.report.charts.structure_map import draw_structure_map
from mmcompress.report.charts.trials import draw_trials
from mmcompress.results.records import Prediction, Summary
from mmcompress.results.target import target_share
from mmcompress.stats import Quality
from mmcompress.storage import read_record
from mmcompress.version import PACKAGE_FOLDER

PREDICTION_FILE = "prediction.json"
"""In a run folder: random structures, predicted and measured, where somebody asked for it."""


def load_summary(folder: str | Path) -> Summary:
    """The summary of a run folder. Raises `DataError` when the run has not got that far."""
    path = Path(folder) / "summary.json"
    if not path.is_file():
        several = sorted(p.parent.name for p in Path(folder).glob("*/summary.json"))
        told = (
            f"; it has several runs in it: {', '.join(several)}"
            if several
            else ": not a finished run"
        )
        raise DataError(f"{folder}: no summary.json in it{told}")
    return read_record(Summary, path)


def template_environment() -> Any:
    """The templates of this folder."""
    import jinja2

    here = jinja2.FileSystemLoader(PACKAGE_FOLDER / "report" / "templates")
    escape = jinja2.select_autoescape(["html"])
    env = jinja2.Environment(loader=here, autoescape=escape, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {
        "percent": format_percent,
        "quality": format_quality,
        "count": format_count,
        "of_target": target_share,
        "glued": keep_together,
    }
    return env


def write_report(summary: Summary, folder: str | Path) -> Path:
    """Write `report.html` and `report.md` into a folder; returns the HTML file."""

    env = template_environment()
    drawings = {
        "nodes": draw_node_bars(summary),
        "structure": draw_structure_map(summary),
        "search": draw_trials(summary),
        "quality": draw_quality_bars(summary.baseline.quality, summary.compressed.quality),
    }
    if tried := summary.attempts:
        points = [a.predicted_ms for a in tried], [a.measured_ms for a in tried]
        drawings["prediction"] = draw_prediction(*points)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if drawn := _drawn(summary, out):
        drawings["structures"] = draw_prediction(drawn.predicted_ms, drawn.measured_ms)
    for name in ("report.html", "report.md"):
        text = env.get_template(name).render(s=summary, charts=drawings, drawn=drawn)
        (out / name).write_text(text)
    return out / "report.html"


def _drawn(summary: Summary, folder: Path) -> Prediction | None:
    """What lies of that in the folder of a run, or of several targets together; nothing of another
    pipeline."""
    for at in (folder / PREDICTION_FILE, folder.parent / PREDICTION_FILE):
        with suppress(DataError):  # a report does not fail for it
            if at.exists() and (found := read_record(Prediction, at)).pipeline == summary.pipeline:
                return found
    return None


def format_percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def format_quality(q: Quality) -> str:
    return f"{100 * q.value:.1f} % ({100 * q.low:.1f} – {100 * q.high:.1f})"


def keep_together(text: str) -> str:
    """A figure and its interval, to be broken between the two alone."""
    one = text.replace(" ", "\N{NO-BREAK SPACE}").replace("–", "–\N{WORD JOINER}")
    return one.replace("\N{NO-BREAK SPACE}(", " (")


def format_count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:.0f}"
