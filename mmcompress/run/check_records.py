"""Looks through a run folder before a run goes on: what is damaged is set aside and made again.

A full disk or a lost power supply tears files. No stage has to think of that: each makes what is
missing, and all that is damaged is missing after this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mmcompress.distill.checkpoint import check_checkpoint
from mmcompress.errors import DataError
from mmcompress.measure.cost_model.drift import ReferenceRuns
from mmcompress.measure.cost_model.footprint import Footprint
from mmcompress.measure.cost_model.predictor import Predictor
from mmcompress.measure.devices.bundle_check import BundleCheck
from mmcompress.results.records import ArtifactJournal, Summary, ValidationQuality
from mmcompress.run.answers import SplitAnswers
from mmcompress.run.fitted_structure import FittedStructure
from mmcompress.run.profile import Profile
from mmcompress.run.unproved import FailedProof
from mmcompress.runtime.bundle import read_manifest, verify_files
from mmcompress.search.linearize import InteractionFactors
from mmcompress.search.sensitivity.store import check_sensitivity, is_sensitivity_stored
from mmcompress.search.short_finetune import FinetunedStructures
from mmcompress.stats import SplitScores
from mmcompress.storage import read_plain, read_record, set_aside_if_damaged
from mmcompress.workspace.context import RunContext
from mmcompress.workspace.folder import RunFolder


def set_damaged_shared_aside(run: RunContext) -> None:
    """Set aside what is damaged of the records that the targets share, and tell of it."""
    folder = run.shared
    setter = _Setter(run.tell_damage)
    setter.check_record(Profile, folder.profile)
    setter.check_bundle(folder.baseline)
    setter.check_record(Predictor, folder.predictor)
    for bundle in _list_folders(folder.quantized):
        # The predictor is made again for them: that stage alone writes them.
        setter.check_bundle(bundle, [folder.predictor])
    setter.check_record(Footprint, folder.footprint)
    setter.check_record(ReferenceRuns, folder.reference_runs)
    if is_sensitivity_stored(folder):
        files = [folder.sensitivity, folder.sensitivity_tensors]
        setter.check(partial(check_sensitivity, folder, run.blocks), files)
    setter.check_existing(_check_texts, folder.teacher_texts)
    for answers in folder.list_dense_answers():
        setter.check_record(SplitAnswers, answers)


def set_damaged_artifact_aside(run: RunContext) -> None:
    """Set aside what is damaged of one target, and tell of it: search, artifact, earlier artifact.

    What was made from a damaged record goes with it where it is of no use without.
    """
    folder = run.folder
    setter = _Setter(run.tell_damage)
    setter.check_record(InteractionFactors, folder.interaction_factors)
    setter.check_record(FinetunedStructures, folder.short_finetunings)
    for weights in folder.short_finetuned.list_node_weights():
        # Without one of them, the training begins from freshly cut weights.
        setter.check_existing(_check_weight_file, weights)
    for history in folder.list_training_histories():
        setter.check_existing(_check_history, history)
    setter.check_record(ValidationQuality, folder.validation_quality)
    setter.check_existing(check_checkpoint, folder.training_checkpoint)
    # Weights are of no use without the structure that they were trained for.
    dependents = [folder.weights, folder.training_checkpoint, *folder.list_training_histories()]
    dependents += [folder.summary, folder.outcomes]
    setter.check_record(FittedStructure, folder.fitted, dependents=dependents)
    if folder.units.exists():
        nodes = list(run.models)
        setter.check(partial(_check_weights, folder, nodes), [folder.weights])
    if folder.has_bundle():
        setter.check_bundle(folder.bundle)
    setter.check_record(ArtifactJournal, folder.artifacts)
    setter.check_record(Summary, folder.summary, dependents=[folder.outcomes])
    setter.check_record(SplitScores, folder.outcomes, dependents=[folder.summary])
    if folder.device_check.exists():
        set_aside_if_damaged(
            partial(read_record, BundleCheck, folder.device_check),
            paths=[folder.device_check],
            tell=run.tell_damage,
            sequel="the device has to measure the bundle again (mmcompress device check)",
        )
    for unproved in folder.list_unproved():
        setter.check_record(FailedProof, unproved.failed_proof)
        for history in unproved.list_training_histories():
            setter.check_existing(_check_history, history)
    if folder.has_stash():
        setter.check(partial(_check_stash, folder.stash), [folder.stash.path])


class _Setter:
    """Sets damaged files of one folder aside.

    Args:
        tell: Receives what is wrong with a file.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell

    def check(self, read: Callable[[], object], paths: Sequence[Path]) -> None:
        """Set paths aside when a function can't read them."""
        set_aside_if_damaged(read, paths=paths, tell=self.tell)

    def check_existing(self, read: Callable[[Path], object], path: Path) -> None:
        """Set a file aside when it is there and a function can't read it."""
        if path.exists():
            self.check(partial(read, path), [path])

    def check_record(
        self, record_type: type, path: Path, *, dependents: Sequence[Path] = ()
    ) -> None:
        """Set a record aside when it is there and damaged, together with what depends on it."""
        if path.exists():
            self.check(partial(read_record, record_type, path), [path, *dependents])

    def check_bundle(self, bundle: Path, dependents: Sequence[Path] = ()) -> None:
        """Set a bundle aside when it is there and damaged, together with what depends on it."""
        if bundle.exists():
            self.check(partial(check_bundle, bundle), [bundle, *dependents])


def check_bundle(bundle: Path) -> None:
    """Check a bundle and every file in it. Raises `BundleError` when anything is wrong."""
    verify_files(bundle, read_manifest(bundle))


def _list_folders(folder: Path) -> list[Path]:
    """List the folders in a folder; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if (path / "manifest.json").exists())


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


def _check_stash(stash: RunFolder) -> None:
    """Check the artifact that is set aside. Raises an error when it can't be put back."""
    read_record(FittedStructure, stash.fitted)
    read_record(Summary, stash.summary)
    check_bundle(stash.bundle)
