"""Put what another device measured of a finished run in place of predictions. No torch."""

from __future__ import annotations

from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.devices.bundle_check import BundleCheck
from mmcompress.report.comparison_pages import write_front
from mmcompress.report.page import write_report
from mmcompress.results.records import Summary
from mmcompress.run.assemble import replace_measurements
from mmcompress.runtime.bundle import hash_bundle_models
from mmcompress.storage import read_plain, read_record, write_record
from mmcompress.workspace.folder import RESUME_CURE, RunFolder
from mmcompress.workspace.load_summary import load_summary


def adopt_measurements(folder: Path, figures: Path) -> Path:
    """Put the figures of a `device check` into a run folder: its summary, report and front.

    A copy of the figures stays in the folder, so that a resumed run keeps them.

    Args:
        folder: The run folder of one target.
        figures: The file that `device check` wrote.

    Returns:
        The report.

    Raises:
        DataError: The figures are of another device or of other bundles.
    """
    target_folder = RunFolder(path=folder)
    check = read_record(BundleCheck, figures)
    summary = _adopt_check(load_summary(folder), check, folder=target_folder)
    write_record(target_folder.device_check, check)
    write_record(target_folder.summary, summary)
    _rewrite_front(target_folder.shared_by_targets)
    return write_report(summary, folder)


def _rewrite_front(shared: RunFolder) -> None:
    """Write the front of several targets anew, if there is one."""
    if not shared.front.exists():
        return
    names = read_plain(dict, shared.front, cure=RESUME_CURE)
    summaries = {name: load_summary(shared.get_subfolder(name).path) for name in names}
    write_front(summaries, shared)


def restore_measurements(summary: Summary, folder: RunFolder) -> Summary:
    """Return a summary with what a device measured of these bundles before, if it did."""
    if not folder.device_check.exists():
        return summary
    try:
        return _adopt_check(summary, read_record(BundleCheck, folder.device_check), folder=folder)
    except DataError:
        # The figures are of a bundle that lay here before.
        return summary


def _adopt_check(summary: Summary, check: BundleCheck, *, folder: RunFolder) -> Summary:
    """Return a summary with the figures of a check of the folder's own bundles."""
    return replace_measurements(
        summary,
        check,
        dense_identity=hash_bundle_models(_find_baseline(folder)),
        bundle_identity=hash_bundle_models(folder.bundle),
    )


def _find_baseline(folder: RunFolder) -> Path:
    """Return the dense bundle; several targets share the one in the folder above."""
    for baseline in (folder.baseline, folder.shared_by_targets.baseline):
        if baseline.exists():
            return baseline
    return folder.path
