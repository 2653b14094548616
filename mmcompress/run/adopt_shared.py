"""Take over what an earlier run has measured of the same dense pipeline (`--from`).

Records whose facts are the same are copied; what differs is told by name and made anew. The dense
pipeline is measured in any case, and the predictor is scaled to it. Nothing is written into the
earlier folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmcompress.errors import DataError, MmcompressError
from mmcompress.measure.cost_model.fit_predictor import PipelineMeasurement
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.cost_model.scale_predictor import scale_predictor
from mmcompress.run.check_records import check_bundle
from mmcompress.run.profile import Profile, measure_adopted_bundle
from mmcompress.run.reuse_rules import (
    DENSE_ANSWERS,
    PREDICTOR,
    PROFILE,
    SENSITIVITY,
    TEACHER_OUTPUTS,
    TEACHER_TEXTS,
    ReuseRule,
)
from mmcompress.run.run_facts import write_facts
from mmcompress.search.sensitivity.store import check_sensitivity, is_sensitivity_stored
from mmcompress.storage import (
    is_leftover,
    read_plain,
    read_record,
    replace_file,
    replace_folder,
    write_record,
)
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder


def adopt_shared_records(run: RunContext) -> None:
    """Keep the facts of a run, and take over what an earlier run has measured of the same ones.

    What the folder of the run has already stays as it is.
    """
    facts = write_facts(run)
    earlier = run.reused_folder
    if earlier is None:
        return
    earlier_facts = read_plain(dict, earlier.facts) if earlier.facts.exists() else None
    adopted: list[str] = []
    for record in _list_shared_records(run, earlier):
        if not record.is_there() or record.is_done():
            continue
        if earlier_facts is None:
            changes: tuple[str, ...] = ("it was made by an older mmcompress, which kept no facts",)
        else:
            changes = record.rule.list_changes(earlier_facts, facts)
        if changes:
            _tell(run, f"{record.name}: made anew: {'; '.join(changes)}")
            continue
        try:
            record.check()
            record.copy()
        except MmcompressError as error:
            _tell(run, f"{record.name}: made anew: {error}")
            continue
        adopted.append(record.name)
    if adopted:
        _tell(run, f"taken over from {earlier}: {', '.join(adopted)}")


def _tell(run: RunContext, message: str) -> None:
    """Tell a person what is taken over."""
    run.on_progress("reuse", message, None)


@dataclass(frozen=True, kw_only=True)
class _SharedRecord:
    """One thing that can be taken over."""

    name: str
    """What a person calls it."""
    rule: ReuseRule
    """What it depends on."""
    is_there: Callable[[], bool]
    """Whether the earlier run has it."""
    is_done: Callable[[], bool]
    """Whether this run has it already."""
    check: Callable[[], object]
    """Raises `MmcompressError` when the earlier one is damaged."""
    copy: Callable[[], object]
    """Copies it, and measures what has to be measured anew."""


def _list_shared_records(run: RunContext, earlier: RunFolder) -> list[_SharedRecord]:
    """List everything that can be taken over; the predictor needs the profile before it."""
    folder = run.shared

    def has_profile() -> bool:
        return earlier.profile.exists() and earlier.has_baseline()

    def has_sensitivity() -> bool:
        return is_sensitivity_stored(earlier)

    def is_predictor_wanted() -> bool:
        # Another device's readings give a predictor at once.
        return earlier.predictor.exists() and not run.device_readings

    records = [
        _SharedRecord(
            name="dense bundle with proofs",
            rule=PROFILE,
            is_there=has_profile,
            is_done=folder.profile.exists,
            check=partial(check_bundle, earlier.baseline),
            copy=partial(_adopt_profile, run, earlier),
        ),
        _SharedRecord(
            name="latency predictor",
            rule=PREDICTOR,
            is_there=is_predictor_wanted,
            is_done=folder.predictor.exists,
            check=partial(read_record, Predictor, earlier.predictor),
            copy=partial(_adopt_predictor, run, earlier),
        ),
        _SharedRecord(
            name="sensitivity",
            rule=SENSITIVITY,
            is_there=has_sensitivity,
            is_done=partial(is_sensitivity_stored, folder),
            check=partial(check_sensitivity, earlier, run.blocks),
            copy=partial(_adopt_sensitivity, folder, earlier),
        ),
        _SharedRecord(
            name="texts of the dense pipeline",
            rule=TEACHER_TEXTS,
            is_there=earlier.teacher_texts.exists,
            is_done=folder.teacher_texts.exists,
            check=partial(read_plain, dict, earlier.teacher_texts),
            copy=partial(_copy_file, earlier.teacher_texts, folder.teacher_texts),
        ),
        _SharedRecord(
            name="outputs of the dense pipeline on training pairs",
            rule=TEACHER_OUTPUTS,
            is_there=earlier.teacher_outputs.exists,
            is_done=folder.teacher_outputs.exists,
            # A damaged file of these is found when it is read.
            check=earlier.teacher_outputs.exists,
            copy=partial(_link_files, earlier.teacher_outputs, folder.teacher_outputs),
        ),
    ]
    for answers in earlier.list_dense_answers():
        target = folder.path / answers.name
        records.append(
            _SharedRecord(
                name=f"dense answers ({answers.stem.removeprefix('dense-')})",
                rule=DENSE_ANSWERS,
                is_there=answers.exists,
                is_done=target.exists,
                check=partial(read_plain, dict, answers),
                copy=partial(_copy_file, answers, target),
            )
        )
    return records


def _adopt_profile(run: RunContext, earlier: RunFolder) -> None:
    """Copy the dense bundle, take its proofs over and measure it."""
    earlier_profile = read_record(Profile, earlier.profile)
    _copy_folder(earlier.baseline, run.shared.baseline)
    with run.time_stage("profile"):
        profile = measure_adopted_bundle(run, earlier_profile.proofs)
    write_record(run.shared.profile, profile)


def _adopt_predictor(run: RunContext, earlier: RunFolder) -> None:
    """Copy what the predictor was fitted to, and scale it to the dense pipeline of today."""
    folder = run.shared
    if not folder.profile.exists():
        raise DataError("the dense bundle was not taken over")
    if earlier.quantized.exists():
        _copy_folder(earlier.quantized, folder.quantized)
    for name in ("reference_runs", "footprint", "node_corrections"):
        record: Path = getattr(earlier, name)
        if record.exists():
            _copy_file(record, getattr(folder, name))
    predictor = scale_predictor(
        read_record(Predictor, earlier.predictor),
        before=_get_measurement(read_record(Profile, earlier.profile)),
        now=_get_measurement(read_record(Profile, folder.profile)),
    )
    # It goes last: without it, everything else here is made again.
    write_record(folder.predictor, predictor)


def _get_measurement(profile: Profile) -> PipelineMeasurement:
    """Return what was measured of the dense pipeline."""
    return PipelineMeasurement(
        latency=profile.latency_ms,
        nodes=profile.nodes,
        model_share=profile.model_share,
        calls=profile.calls,
        in_session_ms=profile.in_session_ms,
    )


def _adopt_sensitivity(folder: RunFolder, earlier: RunFolder) -> None:
    """Copy both files of the sensitivity."""
    _copy_file(earlier.sensitivity_tensors, folder.sensitivity_tensors)
    _copy_file(earlier.sensitivity, folder.sensitivity)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    with replace_file(target) as unfinished:
        shutil.copyfile(source, unfinished)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all."""
    with replace_folder(target) as unfinished:
        shutil.copytree(source, unfinished, dirs_exist_ok=True)


def _link_files(source: Path, target: Path) -> None:
    """Link the files of a folder, or copy them where the disk can't link.

    They are never changed in place, so both runs may have the same file.
    """
    with replace_folder(target) as unfinished:
        for file in sorted(source.iterdir()):
            if is_leftover(file):
                # The earlier run is writing it.
                continue
            try:
                os.link(file, unfinished / file.name)
            except OSError:
                shutil.copyfile(file, unfinished / file.name)
