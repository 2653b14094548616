"""Figures that another device measured of a finished run, in the place of predicted ones."""

from __future__ import annotations

import json
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.devices.readings import BundleCheck
from mmcompress.report.comparison_pages import write_front
from mmcompress.report.page import load_summary, write_report
from mmcompress.results.records import Summary
from mmcompress.run.assemble import replace_measurements
from mmcompress.runtime.bundle import hash_bundle_models
from mmcompress.storage import read_record, write_record
from mmcompress.workspace.folder import RunFolder


def adopt_measurements(folder: Path, figures: Path) -> Path:
    """Put the figures of a `device check` into a run folder: its summary, its report, and the front it is part of.

    A copy stays there, so that going on with the run keeps them. Raises `DataError` for figures of another device or
    of other bundles. Returns the report.
    """
    check = read_record(BundleCheck, figures)
    target = RunFolder(folder)
    summary = _with(load_summary(folder), check, folder=target)
    write_record(target.device_check, check)
    write_record(target.summary, summary)
    front = target.shared_by_targets.front
    if front.exists():
        names = json.loads(front.read_text())
        write_front({n: load_summary(folder.parent / n) for n in names}, folder.parent)
    return write_report(summary, folder)


def restore_measurements(summary: Summary, folder: RunFolder) -> Summary:
    """A summary with what was measured of these very bundles before, if anything was."""
    if not folder.device_check.exists():
        return summary
    try:
        return _with(summary, read_record(BundleCheck, folder.device_check), folder=folder)
    except DataError:  # of the bundle that lay here before
        return summary


def _with(summary: Summary, check: BundleCheck, *, folder: RunFolder) -> Summary:
    dense = next(
        (p for p in (folder.baseline, folder.shared_by_targets.baseline) if p.exists()),
        folder.path,
    )
    return replace_measurements(
        summary, check, hash_bundle_models(dense), hash_bundle_models(folder.bundle)
    )
