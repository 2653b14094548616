"""Looks through a run folder before a run goes on: what is damaged is set aside and made again.

A full disk or a lost power supply tears files. No stage has to think of that: each makes what is
missing, and all that is damaged is missing after this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open

from mmcompress.distill.checkpoint import check_checkpoint
from mmcompress.errors import DataError
from mmcompress.graph.blocks import Block
from mmcompress.measure.cost_model.drift import ReferenceRuns
from mmcompress.measure.cost_model.footprint import Footprint
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.devices.bundle_check import BundleCheck
from mmcompress.results.records import ArtifactJournal, Summary, ValidationQuality
from mmcompress.run.answers import SplitAnswers
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.learned_corrections import NodeCorrections
from mmcompress.run.profile import Profile
from mmcompress.run.unproved import FailedProof
from mmcompress.runtime.bundle import read_manifest, verify_files
from mmcompress.search.linearize import InteractionFactors
from mmcompress.search.sensitivity.measured_curves import MeasuredCurves
from mmcompress.search.sensitivity.store import check_sensitivity, is_sensitivity_stored
from mmcompress.search.short_finetune import FinetunedStructures
from mmcompress.stats import SplitScores
from mmcompress.storage import is_leftover, read_plain, read_record, set_aside_if_damaged
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder
from mmcompress.workspace.move_artifacts import remove_unfinished


class RecordChecker(Protocol):
    """What is done about the files of a folder that can't be read."""

    def check(self, read: Callable[[], object], paths: Sequence[Path]) -> None:
        """Try to read some files.

        Args:
            read: Reads them; raises an error when they are damaged.
            paths: What is of no use any more then.
        """
        ...


class DamagedFileMover:
    """Moves damaged files aside.

    Args:
        tell: Receives what is wrong with a file.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell

    def check(self, read: Callable[[], object], paths: Sequence[Path]) -> None:
        """Move the files aside when they can't be read."""
        set_aside_if_damaged(read, paths=paths, tell=self.tell)


def set_damaged_shared_aside(run: RunContext) -> None:
    """Set aside what is damaged of the records that the targets share, and tell of it.

    What a killed process was writing is removed: not every file of it is written anew.
    """
    remove_unfinished(run.shared)
    check_shared_records(run.shared, DamagedFileMover(run.tell_damage), blocks=run.blocks)


def set_damaged_artifact_aside(run: RunContext) -> None:
    """Set aside what is damaged of one target, and tell of it."""
    mover = DamagedFileMover(run.tell_damage)
    check_artifact_records(run.folder, mover, nodes=list(run.models))
    if run.folder.device_check.exists():
        set_aside_if_damaged(
            partial(read_record, BundleCheck, run.folder.device_check),
            paths=[run.folder.device_check],
            tell=run.tell_damage,
            sequel="the device has to measure the bundle again (mmcompress device check)",
        )


def check_shared_records(
    folder: RunFolder,
    checker: RecordChecker,
    *,
    blocks: Mapping[str, Sequence[Block]] | None = None,
) -> None:
    """Check the records that the targets of a run share.

    Args:
        folder: The run folder.
        checker: What is done about damaged ones.
        blocks: Blocks by node, which the sensitivity is of; None where no model is loaded.
    """
    check_record = partial(_check_record, checker)
    check_record(Profile, folder.profile)
    _check_bundle(checker, folder.baseline)
    check_record(Predictor, folder.predictor)
    for bundle in _list_bundles(folder.quantized):
        # The predictor is made again for them: that stage alone writes them.
        _check_bundle(checker, bundle, dependents=[folder.predictor])
    check_record(Footprint, folder.footprint)
    check_record(ReferenceRuns, folder.reference_runs)
    check_record(NodeCorrections, folder.node_corrections)
    check_record(MeasuredCurves, folder.sensitivity_curves)
    if is_sensitivity_stored(folder):
        files = [folder.sensitivity, folder.sensitivity_tensors]
        read = partial(_check_weight_file, folder.sensitivity_tensors)
        if blocks is not None:
            read = partial(check_sensitivity, folder, blocks)
        checker.check(read, files)
    _check_existing(checker, _check_texts, path=folder.teacher_texts)
    for answers in folder.list_dense_answers():
        check_record(SplitAnswers, answers)


def check_artifact_records(
    folder: RunFolder, checker: RecordChecker, *, nodes: Sequence[str]
) -> None:
    """Check the records of one target: search, and artifact.

    What was made from a damaged record goes with it where it is of no use without. While another
    artifact is made, the best one so far is checked as a whole.

    Args:
        folder: The folder of the target.
        checker: What is done about damaged ones.
        nodes: The nodes with a model.
    """
    check_record = partial(_check_record, checker)
    check_existing = partial(_check_existing, checker)
    check_record(InteractionFactors, folder.interaction_factors)
    check_record(FinetunedStructures, folder.short_finetunings)
    for weights in folder.short_finetuned.list_node_weights():
        # Without one of them, the training begins from freshly cut weights.
        check_existing(_check_weight_file, path=weights)
    check_record(ArtifactJournal, folder.artifacts)
    for unproved in folder.list_unproved():
        check_record(FailedProof, unproved.failed_proof)
        for history in unproved.list_training_histories():
            check_existing(_check_history, path=history)
    if folder.has_next():
        checker.check(partial(_check_finished, folder.best), folder.best.list_artifact())
        _check_artifact(folder.next, checker, nodes=nodes)
    else:
        _check_artifact(folder.best, checker, nodes=nodes)


def _check_artifact(folder: RunFolder, checker: RecordChecker, *, nodes: Sequence[str]) -> None:
    """Check the records of an artifact, finished or not."""
    check_record = partial(_check_record, checker)
    check_existing = partial(_check_existing, checker)
    for history in folder.list_training_histories():
        check_existing(_check_history, path=history)
    check_record(ValidationQuality, folder.validation_quality)
    check_existing(check_checkpoint, path=folder.training_checkpoint)
    # Weights are of no use without the structure that they were trained for.
    dependents = [folder.weights, folder.training_checkpoint, folder.shared_training]
    dependents += folder.list_training_histories()
    dependents += [folder.summary, folder.outcomes]
    check_record(FittedStructure, folder.fitted, dependents=dependents)
    if folder.units.exists():
        checker.check(partial(_check_weights, folder, nodes), [folder.weights])
    if folder.has_bundle():
        _check_bundle(checker, folder.bundle)
    check_record(Summary, folder.summary, dependents=[folder.outcomes])
    check_record(SplitScores, folder.outcomes, dependents=[folder.summary])


def _check_existing(checker: RecordChecker, read: Callable[[Path], object], *, path: Path) -> None:
    """Check a file, if it is there, by a function that reads it."""
    if path.exists():
        checker.check(partial(read, path), [path])


def _check_record(
    checker: RecordChecker, record_type: type, path: Path, *, dependents: Sequence[Path] = ()
) -> None:
    """Check a record, if it is there; what depends on it is of no use without."""
    if path.exists():
        checker.check(partial(read_record, record_type, path), [path, *dependents])


def _check_bundle(checker: RecordChecker, bundle: Path, *, dependents: Sequence[Path] = ()) -> None:
    """Check a bundle, if it is there; what depends on it is of no use without."""
    if bundle.exists():
        checker.check(partial(check_bundle, bundle), [bundle, *dependents])


def check_bundle(bundle: Path) -> None:
    """Check a bundle and every file in it. Raises `BundleError` when anything is wrong."""
    verify_files(bundle, read_manifest(bundle))


def _list_bundles(folder: Path) -> list[Path]:
    """List the bundles in a folder, without leftovers; none where there is no such folder."""
    if not folder.is_dir():
        return []
    places = [path for path in folder.iterdir() if not is_leftover(path)]
    return sorted(place for place in places if (place / "manifest.json").exists())


def _check_texts(path: Path) -> None:
    """Check what the dense pipeline wrote. Raises `DataError` when the file is damaged."""
    for name, text in read_plain(dict, path).items():
        if not isinstance(text, str):
            raise DataError(f"{path}: damaged: the label of {name} is no text")


def _check_history(path: Path) -> None:
    """Check the losses of a training. Raises `DataError` when the file is damaged."""
    for row in read_plain(list, path):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            raise DataError(f"{path}: damaged: {row!r} has no step")


def _check_weights(folder: RunFolder, nodes: Sequence[str]) -> None:
    """Check the files of trained weights. Raises `DataError` when one is missing or torn."""
    for path in [folder.units, *(folder.locate_node_weights(node) for node in nodes)]:
        _check_weight_file(path)


def _check_weight_file(path: Path) -> None:
    """Check one file of trained weights. Raises `DataError` when it is missing or torn."""
    try:
        # The header says how long the file has to be.
        with safe_open(path, "pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: the weights can't be read: {error}") from error


def _check_finished(best: RunFolder) -> None:
    """Check a finished artifact. Raises an error when it can't be the result of the run."""
    read_record(FittedStructure, best.fitted)
    read_record(Summary, best.summary)
    check_bundle(best.bundle)
