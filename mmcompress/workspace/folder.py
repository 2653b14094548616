"""The names of all paths of a run folder, what lies in it, and what becomes invalid.

A run of one target has one folder. A run of several targets has one folder for what they share
(profile, predictor, sensitivity) and in it one folder for each target. No other module joins these
names by hand. No torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mmcompress.errors import DataError
from mmcompress.measure.cost_model.plan import QUANTIZED_FOLDER
from mmcompress.storage import (
    UNFINISHED_SUFFIX,
    is_leftover,
    read_plain,
    remove_path,
    set_aside_if_damaged,
    write_record,
)
from mmcompress.version import __version__

ARTIFACT_PATTERNS = (
    "bundle",
    "weights",
    "fitted.json",
    "distill*.json",
    "validation_quality.json",
    "outcomes.json",
    "summary.json",
)
"""Globs of everything that belongs to one artifact: it is set aside, put back and removed as a
whole."""

RUN_FORMAT = 2
"""Format of run folders that this version writes and reads."""

FIRST_FORMAT = 1
"""Format of run folders that state none."""

FIRST_VERSION = "0.1.0"
"""Version of mmcompress that wrote them."""

NEW_FOLDER_CURE = "put the file back from a copy, or begin a new run with another --out"
"""What a person can do about a damaged file that says what the run was asked for."""

RESUME_CURE = "add --resume to the command that made it: it is made again"
"""What a person can do about a damaged file that the run can make again."""

LOCK_FILE = "run.lock"
"""Name of the file that one process holds while it works on the folder."""

CLAIM_NAMES = (
    "spec.json",
    "space.json",
    "format.json",
    "sources.json",
    "timings.json",
    "progress.jsonl",
)
"""Names of the files that a run has when it has begun and made nothing yet."""

NEXT_FOLDER = "next"
"""Where another artifact is made while the best one so far stays in its place."""

BETTER_FOLDER = "next.better"
"""What `NEXT_FOLDER` is called while its artifact takes the place of the best one, and a further
one is to be made."""

BEST_FOLDER = "next.best"
"""The same at the end of a run."""

OLD_STASH_FOLDER = "earlier"
"""Where earlier versions kept the best artifact while they made another one in its place."""

OLD_STASHING_FOLDER = "earlier.new"
"""What that folder was called while an artifact was moved into it."""

OLD_RESTORING_FOLDER = "earlier.back"
"""What it was called while its artifact was put back."""

DISCARDED_FOLDER = "next.worse"
"""What `NEXT_FOLDER` is called while its artifact is removed and a further one is to be made."""

MOVING_FOLDERS = (
    BETTER_FOLDER,
    BEST_FOLDER,
    DISCARDED_FOLDER,
    OLD_STASH_FOLDER,
    OLD_STASHING_FOLDER,
    OLD_RESTORING_FOLDER,
)
"""Folders that are there while an artifact is moved."""

OWN_FOLDERS = (NEXT_FOLDER, *MOVING_FOLDERS)
"""Folders that hold artifacts of the same target."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The paths of one run folder. Making this record writes nothing."""

    path: Path
    """The folder itself; it need not exist yet."""
    is_next: bool = False
    """Its artifact is another one than the best so far: it is made in `next/`. Everything else is
    the same."""

    def __str__(self) -> str:
        return str(self.path)

    # What the run was asked for.

    @property
    def spec(self) -> Path:
        """The spec with all overrides applied."""
        return self.path / "spec.json"

    @property
    def sources(self) -> Path:
        """The commits that models of a hub are pinned to, by the source that the spec names."""
        return self.path / "sources.json"

    @property
    def format(self) -> Path:
        """The format of the folder, and the version of mmcompress that began the run."""
        return self.path / "format.json"

    @property
    def space(self) -> Path:
        """The search space."""
        return self.path / "space.json"

    @property
    def readings(self) -> Path:
        """A copy of another device's readings, where the run is for another device."""
        return self.path / "readings.json"

    @property
    def timings(self) -> Path:
        """Seconds spent in every stage."""
        return self.path / "timings.json"

    @property
    def lock(self) -> Path:
        """The file that the process holds which works on the folder."""
        return self.path / LOCK_FILE

    @property
    def progress(self) -> Path:
        """Where the run is, line by line, for `mmcompress watch`."""
        return self.path / "progress.jsonl"

    # What does not depend on the target.

    @property
    def facts(self) -> Path:
        """What the records that do not depend on the target are made of."""
        return self.path / "facts.json"

    @property
    def baseline(self) -> Path:
        """The bundle of the dense pipeline."""
        return self.path / "baseline"

    @property
    def profile(self) -> Path:
        """Latency, sizes and proofs of the dense pipeline."""
        return self.path / "profile.json"

    @property
    def predictor(self) -> Path:
        """The latency predictor."""
        return self.path / "predictor.json"

    @property
    def footprint(self) -> Path:
        """File sizes and memory by structure."""
        return self.path / "footprint.json"

    @property
    def sensitivity(self) -> Path:
        """Loss increases by block and precision."""
        return self.path / "sensitivity.json"

    @property
    def sensitivity_curves(self) -> Path:
        """Loss increases of the blocks that are measured, while others are not yet."""
        return self.path / "sensitivity_curves.json"

    @property
    def sensitivity_tensors(self) -> Path:
        """Importance scores and input moments."""
        return self.path / "sensitivity.safetensors"

    @property
    def reference_runs(self) -> Path:
        """Every measurement of the whole pipelines that structures are compared with."""
        return self.path / "reference_runs.json"

    @property
    def node_corrections(self) -> Path:
        """How wrong the predictor was about each node, as the last fit measured it."""
        return self.path / "node_corrections.json"

    @property
    def quantized(self) -> Path:
        """The folder of the dense pipeline in other precisions, and of smaller ones."""
        return self.path / QUANTIZED_FOLDER

    @property
    def teacher_texts(self) -> Path:
        """What the dense pipeline writes for training and validation inputs."""
        return self.path / "teacher_texts.json"

    @property
    def teacher_outputs(self) -> Path:
        """The folder of the dense pipeline's outputs on training pairs, a file for every draw."""
        return self.path / "teacher_outputs"

    def locate_dense_answers(self, split: str) -> Path:
        """Return the file of what the dense pipeline answers to a split."""
        return self.path / f"dense-{split}.json"

    # The search.

    @property
    def study(self) -> Path:
        """The journal of all trials."""
        return self.path / "study.journal"

    @property
    def database_study(self) -> Path:
        """Where the trials are, if they are kept in a database."""
        return self.path / "study.json"

    @property
    def interaction_factors(self) -> Path:
        """Loss increases measured among other cuts."""
        return self.path / "interaction_factors.json"

    @property
    def short_finetunings(self) -> Path:
        """Structures that were trained for a short while, with their losses."""
        return self.path / "short_finetunings.json"

    @property
    def short_finetuned(self) -> RunFolder:
        """The folder of the weights of the best of these structures."""
        return RunFolder(path=self.path / "short-finetuned")

    def numbered_checkpoint(self, number: int) -> Path:
        """Return the file of the state of one of several trainings."""
        return self.path / f"training-{number}.safetensors"

    # The artifact.

    @property
    def artifact_path(self) -> Path:
        """The folder of the artifact: the folder itself, or `next/`."""
        return self.path / NEXT_FOLDER if self.is_next else self.path

    @property
    def fitted(self) -> Path:
        """The structure that is trained, with its predicted and measured latency."""
        return self.artifact_path / "fitted.json"

    @property
    def weights(self) -> Path:
        """The folder of the trained weights, one file for each node."""
        return self.artifact_path / "weights"

    @property
    def units(self) -> Path:
        """The units of the dense models that are left; written last, after the weights."""
        return self.weights / "units.safetensors"

    def locate_node_weights(self, node: str) -> Path:
        """Return the file of the trained weights of a node."""
        return self.weights / f"{node}.safetensors"

    def list_node_weights(self) -> list[Path]:
        """Return the files of trained weights in the folder."""
        return sorted(self.weights.glob("*.safetensors"))

    @property
    def training_checkpoint(self) -> Path:
        """The state of a training that is under way."""
        return self.artifact_path / "training.safetensors"

    @property
    def shared_training(self) -> Path:
        """The folder of a training that several workers share, while it is under way."""
        return self.artifact_path / "training.workers"

    def discard_training_state(self) -> None:
        """Remove the state of a training: its weights are on disk."""
        self.training_checkpoint.unlink(missing_ok=True)
        shutil.rmtree(self.shared_training, ignore_errors=True)

    @property
    def weights_room(self) -> Path:
        """A file that holds room on the disk for the weights while they are trained."""
        return self.artifact_path / "training.room"

    @property
    def training_history(self) -> Path:
        """Losses of the training, or of the last one of several rounds."""
        return self.artifact_path / "distill.json"

    @property
    def validation_quality(self) -> Path:
        """Quality on validation pairs before and after the training."""
        return self.artifact_path / "validation_quality.json"

    def round_history(self, number: int) -> Path:
        """Return the file of the losses of one round; 0 is an earlier artifact's training."""
        return self.artifact_path / f"distill-{number}.json"

    @property
    def bundle(self) -> Path:
        """The bundle of the compressed pipeline."""
        return self.artifact_path / "bundle"

    @property
    def scratch(self) -> Path:
        """A folder for bundles and files that are removed after their use."""
        return self.path / "scratch"

    @property
    def outcomes(self) -> Path:
        """Scores of both sides, input by input, on the test split."""
        return self.artifact_path / "outcomes.json"

    @property
    def summary(self) -> Path:
        """The record that the report shows; written last, when the artifact is finished."""
        return self.artifact_path / "summary.json"

    @property
    def artifacts(self) -> Path:
        """What became of every finished artifact of this target, also of those that are gone."""
        return self.path / "artifacts.json"

    @property
    def device_check(self) -> Path:
        """Latencies of both bundles that another device measured."""
        return self.path / "measured.json"

    # What people read. Every page lies beside a Markdown file of the same name.

    @property
    def report(self) -> Path:
        """The page of a finished run."""
        return self.path / "report.html"

    @property
    def prediction(self) -> Path:
        """Random structures, predicted and measured, where somebody asked for them."""
        return self.path / "prediction.json"

    @property
    def front(self) -> Path:
        """The results of several targets, side by side."""
        return self.path / "front.json"

    @property
    def front_page(self) -> Path:
        """The page of several targets."""
        return self.path / "front.html"

    # What a comparison or an ablation leaves.

    @property
    def comparison(self) -> Path:
        """The results of several methods, side by side."""
        return self.path / "compare.json"

    @property
    def comparison_page(self) -> Path:
        """The page of several methods."""
        return self.path / "compare.html"

    @property
    def ablation(self) -> Path:
        """The results of all cells of an ablation, by table."""
        return self.path / "ablation.json"

    @property
    def ablation_page(self) -> Path:
        """The page of an ablation."""
        return self.path / "ablation.html"

    @property
    def claims(self) -> Path:
        """Claims with their verdicts."""
        return self.path / "claims.json"

    @property
    def side_by_side(self) -> Path:
        """Latencies of the artifacts of a comparison, all measured in turn."""
        return self.path / "side_by_side.json"

    @property
    def cell(self) -> Path:
        """What one cell of an ablation is."""
        return self.path / "cell.json"

    # Folders that belong to this one.

    @property
    def best(self) -> RunFolder:
        """This folder with the best artifact so far."""
        return RunFolder(path=self.path)

    @property
    def next(self) -> RunFolder:
        """This folder with the artifact that is made while the best one stays in its place."""
        return RunFolder(path=self.path, is_next=True)

    @property
    def failed_proof(self) -> Path:
        """Why an artifact was set aside as unproved; it lies beside its weights."""
        return self.artifact_path / "failed_proof.json"

    @property
    def unproved(self) -> Path:
        """The folder of the artifacts whose proof failed, numbered from 1."""
        return self.path / "unproved"

    def list_unproved(self) -> list[RunFolder]:
        """Return the folders of the artifacts whose proof failed, in the order they were made."""
        records = self.unproved.glob(f"*/{self.failed_proof.name}")
        numbers = sorted(int(record.parent.name) for record in records)
        return [RunFolder(path=self.unproved / str(number)) for number in numbers]

    def get_subfolder(self, name: str) -> RunFolder:
        """Return the folder of one method or cell of a comparison."""
        return RunFolder(path=self.path / name)

    def get_target_folder(self, target: str) -> RunFolder:
        """Return the folder of one of several targets."""
        return self.get_subfolder(name_target_folder(target))

    @property
    def shared_by_targets(self) -> RunFolder:
        """The folder above, which holds what several targets share."""
        return RunFolder(path=self.path.parent)

    # What lies in it.

    def list_dense_answers(self) -> list[Path]:
        """Return the files of what the dense pipeline answers to each split."""
        return sorted(self.path.glob("dense-*.json"))

    def list_training_histories(self) -> list[Path]:
        """Return the files of all training histories of the artifact, in no particular order."""
        return list(self.artifact_path.glob("distill*.json"))

    def list_inner_folders(self) -> list[RunFolder]:
        """List the folders in this one that may be those of targets, methods or cells, sorted."""
        if not self.path.is_dir():
            return []
        folders = []
        for path in sorted(self.path.iterdir()):
            if path.is_dir() and path.name not in OWN_FOLDERS and not is_leftover(path):
                folders.append(RunFolder(path=path))
        return folders

    def list_finished_subfolders(self) -> list[str]:
        """Return the names of the folders in this one that hold a finished run, sorted."""
        return [folder.path.name for folder in self.list_inner_folders() if folder.summary.exists()]

    def read_timings(self, tell: Callable[[str], None]) -> dict[str, float]:
        """Return the seconds spent in every stage so far; empty before the first stage.

        A damaged file is set aside: that costs nothing but these figures.

        Args:
            tell: Receives what is wrong with a damaged file.
        """
        if not self.timings.exists():
            return {}
        if set_aside_if_damaged(self._load_timings, paths=[self.timings], tell=tell):
            return {}
        return self._load_timings()

    def _load_timings(self) -> dict[str, float]:
        """Load the timings. Raises `DataError` when they are damaged."""
        seconds_by_stage = read_plain(dict, self.timings)
        for seconds in seconds_by_stage.values():
            if not isinstance(seconds, int | float):
                raise DataError(f"{self.timings}: damaged: {seconds!r} is no number of seconds")
        return seconds_by_stage

    def read_sources(self) -> dict[str, str]:
        """Return what the sources of models at a hub are pinned to; empty before the run began."""
        if not self.sources.exists():
            return {}
        pinned_sources: dict[str, str] = read_plain(dict, self.sources)
        return pinned_sources

    def write_format(self) -> None:
        """Write down the format of a new folder."""
        stated_format = {"format": RUN_FORMAT, "mmcompress": __version__}
        write_record(self.format, stated_format)

    def check_format(self) -> None:
        """Check that this version of mmcompress can go on with the run of the folder.

        Raises:
            DataError: The run was begun in another format; the message names both. Or the file is
                damaged.
        """
        stated_format = {}
        if self.format.exists():
            stated_format = read_plain(dict, self.format, cure=NEW_FOLDER_CURE)
        run_format = stated_format.get("format", FIRST_FORMAT)
        if run_format != RUN_FORMAT:
            version = stated_format.get("mmcompress", FIRST_VERSION)
            raise DataError(
                f"{self}: a run folder of format {run_format} (mmcompress {version}); "
                f"this version reads format {RUN_FORMAT}: use a new --out"
            )

    def has_files(self) -> bool:
        """Return whether the folder exists and anything but its lock lies in it."""
        if not self.path.exists():
            return False
        return any(path.name != LOCK_FILE for path in self.path.iterdir())

    def holds_claim_only(self) -> bool:
        """Return whether a run was begun in the folder, and nothing was made in it.

        Its spec was refused later, or it was stopped at once.
        """
        names = {path.name for path in self.path.iterdir()}
        return self.spec.name in names and names <= {LOCK_FILE, *CLAIM_NAMES}

    def require_free(self, *, resume: bool) -> None:
        """Check that a run can be begun in the folder, or gone on with.

        Raises:
            DataError: It holds something else, or a run that nobody asked to go on with.
        """
        has_run = self.spec.exists()
        if (has_run and resume) or not self.has_files() or self.holds_claim_only():
            return
        if has_run:
            raise DataError(
                f"{self}: not empty; add --resume to go on with the run in it, or choose another "
                "--out"
            )
        raise DataError(f"{self}: not empty, and there is no run in it; choose another --out")

    def has_bundle(self) -> bool:
        """Return whether the compressed bundle is complete: its manifest is written last."""
        return (self.bundle / "manifest.json").exists()

    def has_baseline(self) -> bool:
        """Return whether the dense bundle is complete."""
        return (self.baseline / "manifest.json").exists()

    def has_next(self) -> bool:
        """Return whether another artifact is being made than the best one so far."""
        return self.next.artifact_path.exists()

    def is_finished(self) -> bool:
        """Return whether an artifact is finished, and no other one is being made."""
        is_moving = self.has_interrupted_move()
        return self.best.summary.exists() and not self.has_next() and not is_moving

    def find_earlier(self) -> RunFolder | None:
        """Return the folder with the best artifact so far, if another one is made in this one."""
        return self.best if self.is_next else None

    # What becomes invalid.

    def discard_fitted_structure(self, *, search_goes_on: bool) -> None:
        """Remove a fitted structure and everything made from it.

        Args:
            search_goes_on: More trials are asked for than before. Short trainings are then
                chosen anew as well.
        """
        # The weights go first: they belong to the structure that is still on record.
        shutil.rmtree(self.weights, ignore_errors=True)
        stale_paths = [*self.list_training_histories(), *self.artifact_path.glob("training.*")]
        stale_paths += [self.summary, self.outcomes]
        if search_goes_on:
            self.discard_short_finetunings()
        for path in stale_paths:
            remove_path(path)
        self.fitted.unlink()

    def discard_short_finetunings(self) -> None:
        """Remove the short trainings: more trials are asked for, so others may be better."""
        self.short_finetunings.unlink(missing_ok=True)
        shutil.rmtree(self.short_finetuned.path, ignore_errors=True)

    def has_interrupted_move(self) -> bool:
        """Return whether a move that `finish_interrupted_move` completes was cut off."""
        places = [self.path / name for name in MOVING_FOLDERS]
        places += [self.best.failed_proof, self.next.failed_proof]
        return any(path.exists() for path in places)

    def list_unfinished(self) -> list[Path]:
        """List the files and folders that a killed process was writing; nothing reads them.

        Those of the targets' folders are listed as well. The artifact that an earlier version was
        moving lies in such a folder too, and is not listed.
        """
        unfinished: list[Path] = []
        for path in sorted(self.path.rglob(f"*{UNFINISHED_SUFFIX}")):
            is_inside_another = any(place in path.parents for place in unfinished)
            if not is_inside_another and path.name != OLD_STASHING_FOLDER:
                unfinished.append(path)
        return unfinished

    def list_artifact(self) -> list[Path]:
        """Return everything in the folder that belongs to its artifact."""
        paths: list[Path] = []
        for pattern in ARTIFACT_PATTERNS:
            paths += self.artifact_path.glob(pattern)
        return paths


def name_target_folder(target: str) -> str:
    """Return the folder name of one of several targets: `1.2x p95` lies in `1.2x-p95`."""
    return target.replace(" ", "-")
