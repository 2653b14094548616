"""The study of a run folder: a journal file, to which finished trials are written whole. No torch.

The driver alone writes to it, in `search_session.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from mmcompress.errors import DataError
from mmcompress.results.records import Trial
from mmcompress.runtime.progress import ignore_progress
from mmcompress.runtime.quiet_loggers import silence_logger
from mmcompress.search.journal_repair import PlainRecord, find_damaged_line, repair_journal
from mmcompress.search.sampling import OPTUNA_LOGGER
from mmcompress.storage import InvalidValue, build_record

STUDY_NAME = "mmcompress"
"""Name of the only study in a journal."""

KEPT_TRIALS = "kept_trials"
"""Attribute of a study: finished trials of lines that were damaged."""
DASHBOARD_CONSTRAINTS_KEY = "constraints"
"""System attribute under which optuna-dashboard looks for constraints: a list, as in Optuna 4."""


@silence_logger(OPTUNA_LOGGER)
def open_study(path: Path, *, tell: Callable[[str], None] = ignore_progress) -> optuna.Study:
    """Open the study of a journal file, or make it.

    What is damaged of the file is put aside, and the finished trials in it are kept. Trials that an
    earlier version left running are marked as failed.

    Args:
        path: The journal file.
        tell: Receives what was damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    repair = repair_journal(path)
    try:
        storage = _load_storage(path)
    except Exception:  # Optuna replays the lines, and meets whatever is wrong with them
        repair = repair_journal(path, keep_lines=False)
        storage = _load_storage(path)
    if repair.lines_aside:
        tell(repair.describe(path))
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
    # To create a study that is there writes a line each time.
    make_study = optuna.load_study if STUDY_NAME in names else optuna.create_study
    study: optuna.Study = make_study(study_name=STUDY_NAME, storage=storage)
    _keep_trials(study, repair.trials)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _keep_trials(study: optuna.Study, records: Sequence[PlainRecord]) -> None:
    """Keep the finished trials of a journal that its damage hides from Optuna."""
    known_texts = {json.dumps(record, sort_keys=True) for record in _list_records(study)}
    hidden_records = []
    for record in records:
        if json.dumps(record, sort_keys=True) not in known_texts:
            hidden_records.append(record)
    if hidden_records:
        kept_records = [*study.user_attrs.get(KEPT_TRIALS, ()), *hidden_records]
        study.set_user_attr(KEPT_TRIALS, kept_records)


def _list_records(study: optuna.Study) -> list[PlainRecord]:
    """List every trial with a result as plain data."""
    # Of damaged lines only the results are left. Samplers don't see them.
    records = list(study.user_attrs.get(KEPT_TRIALS, ()))
    for optuna_trial in study.get_trials(deepcopy=False):
        if "trial" in optuna_trial.user_attrs:
            records.append(optuna_trial.user_attrs["trial"])
    return records


def _load_storage(path: Path) -> JournalStorage:
    """Load a journal, and read all of it."""
    storage = JournalStorage(JournalFileBackend(str(path)))
    for study in storage.get_all_studies():
        storage.get_all_trials(study._study_id, deepcopy=False)
    return storage


@silence_logger(OPTUNA_LOGGER)
def list_study_faults(path: Path) -> list[str]:
    """List what is wrong with the journal of a study that nobody works on. Nothing is written.

    Args:
        path: The journal.

    Returns:
        Faults in words; empty for a journal that is whole.
    """
    damaged_line = find_damaged_line(path)
    if damaged_line is not None:
        return [f"line {damaged_line} is damaged"]
    try:
        study = optuna.load_study(study_name=STUDY_NAME, storage=_load_storage(path))
        trials = read_finished_trials(study)
    except Exception as error:  # Optuna replays the lines, and meets whatever is wrong with them
        return [f"it can't be replayed: {type(error).__name__}: {error}"]
    return list_trial_faults(study, trials)


def list_trial_faults(study: optuna.Study, trials: Sequence[Trial]) -> list[str]:
    """List what is wrong with the trials of a study that nobody works on.

    Args:
        study: The study.
        trials: Its finished trials.

    Returns:
        Faults in words; empty where every trial stands in it once, and whole.
    """
    faults: list[str] = []
    numbers = [trial.number for trial in trials]
    for number in sorted(set(numbers)):
        if numbers.count(number) > 1:
            faults.append(f"trial {number} stands in it {numbers.count(number)} times")
    for optuna_trial in study.get_trials(deepcopy=False):
        if optuna_trial.state == TrialState.RUNNING:
            faults.append(f"trial {optuna_trial.number} is still running, and nobody works on it")
        is_finished = optuna_trial.state == TrialState.COMPLETE
        if is_finished and DASHBOARD_CONSTRAINTS_KEY not in optuna_trial.system_attrs:
            faults.append(f"trial {optuna_trial.number} has no constraint: it counts as feasible")
        if is_finished and "trial" not in optuna_trial.user_attrs:
            faults.append(f"trial {optuna_trial.number} has no structure")
    return faults


def read_finished_trials(study: optuna.Study) -> list[Trial]:
    """Read every trial with a result, oldest first.

    Raises:
        DataError: Another version of mmcompress wrote them otherwise.
    """
    try:
        trials = [build_record(Trial, record) for record in _list_records(study)]
    except InvalidValue as error:
        raise DataError(
            f"the study holds trials of another version of mmcompress: {error}; use a new --out"
        ) from error
    return sorted(trials, key=_get_number)


def _get_number(trial: Trial) -> int:
    """Return the key that sorts trials by age, and leaves equal ones in their order."""
    return trial.number


def read_first_error(study: optuna.Study) -> str:
    """Read the error of the first failed trial; empty where none failed."""
    for optuna_trial in study.get_trials(deepcopy=False):
        if "error" in optuna_trial.user_attrs:
            return str(optuna_trial.user_attrs["error"])
    return ""


def count_failures(study: optuna.Study, origin: str | None = None) -> int:
    """Count trials whose evaluation raised an error, of one origin or of all.

    Trials that a dead driver left behind do not count: they are asked for again.
    """
    failures = 0
    for optuna_trial in study.get_trials(deepcopy=False):
        attributes = optuna_trial.user_attrs
        if "error" in attributes and origin in (None, attributes.get("origin")):
            failures += 1
    return failures
