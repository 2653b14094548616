"""The report of one run: its summary in, a self-contained page out. No torch, no network."""

from __future__ import annotations

from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.report.bundle_card import write_bundle_card
from mmcompress.report.charts.node_bars import draw_node_bars
from mmcompress.report.charts.prediction import draw_prediction
from mmcompress.report.charts.quality_bars import draw_quality_bars
from mmcompress.report.charts.search_history import draw_search_history
from mmcompress.report.charts.structure_map import draw_structure_map
from mmcompress.report.charts.trials import draw_trials
from mmcompress.report.charts.waveform import draw_waveform
from mmcompress.report.fill_templates import write_pages
from mmcompress.report.node_shares import list_node_shares
from mmcompress.report.trial_rows import list_front_trials
from mmcompress.results.records import Prediction, Summary
from mmcompress.storage import read_record
from mmcompress.workspace.folder import RunFolder

EFFORT_NOTES = {
    "quick": "Effort: quick. This is a first look; normal effort keeps more at the same target.",
    "best": "Effort: best.",
}
"""What stands at the top of the report, by level of effort."""


def write_report(summary: Summary, folder: str | Path) -> Path:
    """Write `report.html` and `report.md` of a run, and the card of its bundle.

    Args:
        summary: What the report shows.
        folder: The run folder. It is made when it is missing.

    Returns:
        The HTML file.

    Raises:
        DataError: The folder can't be written.
    """
    run_folder = RunFolder(path=Path(folder))
    prediction = _find_prediction(run_folder, summary.pipeline)
    page = write_pages(
        run_folder.report,
        summary=summary,
        charts=_draw_charts(summary, prediction),
        prediction=prediction,
        node_shares=list_node_shares(summary),
        front_trials=list_front_trials(summary.trials),
        waveforms=[draw_waveform(sample.shown.peaks) for sample in summary.samples],
        effort_note=EFFORT_NOTES.get(summary.settings.get("effort", ""), ""),
    )
    write_bundle_card(summary, run_folder)
    return page


def _draw_charts(summary: Summary, prediction: Prediction | None) -> dict[str, str]:
    """Draw every chart that there are figures for, by its name in the template."""
    charts = {
        "nodes": draw_node_bars(summary),
        "structure": draw_structure_map(summary),
        "trials": draw_trials(summary),
        "history": draw_search_history(summary),
        "quality": draw_quality_bars(summary.baseline.quality, summary.compressed.quality),
        "attempts": "",
        "prediction": "",
    }
    if summary.attempts:
        predicted_ms = [attempt.predicted_ms for attempt in summary.attempts]
        measured_ms = [attempt.measured_ms for attempt in summary.attempts]
        charts["attempts"] = draw_prediction(predicted_ms, measured_ms)
    if prediction and prediction.predicted_ms:
        charts["prediction"] = draw_prediction(prediction.predicted_ms, prediction.measured_ms)
    return charts


def _find_prediction(folder: RunFolder, pipeline: str) -> Prediction | None:
    """Find random structures of the same pipeline that were predicted and measured.

    They lie in the run folder, or in the folder above, which several targets share.
    """
    for place in (folder, folder.shared_by_targets):
        if not place.prediction.exists():
            continue
        try:
            prediction = read_record(Prediction, place.prediction)
        except DataError:
            # A damaged file is no reason to have no report.
            continue
        if prediction.pipeline == pipeline:
            return prediction
    return None
